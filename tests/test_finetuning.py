"""Fine-tuning: weights, models, views, the recipe, the linear probe, profiles, and whole runs."""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.torch
import torch
import torchvision
from conftest import ROOT
from PIL import Image

PUBLISHED = "resnet18-f37072fd.pth"


def settled(program, **values):
    """Settings as they would run on a CPU, small."""
    small = {"data": "shapes", "model": "resnet18", "image_size": 32, "weights": "none", "batch_size": 8}
    return program.fill_defaults(program.Settings(device="cpu", amp="off", **{**small, **values}))


def build(program, classes=10, say=lambda line: None, **values):
    """The model for so many classes."""
    data = SimpleNamespace(classes=[str(c) for c in range(classes)], references={}, heads={})
    return program.build_model(settled(program, **values), data, say)


def resnet18():
    torch.manual_seed(5)
    return torchvision.models.resnet18()


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """Weights as torchvision publishes them: of 1,000 classes."""
    path = tmp_path_factory.mktemp("weights") / PUBLISHED
    torch.save(resnet18().state_dict(), path)
    return path


@pytest.fixture(autouse=True)
def no_outside(imagenet, tmp_path, monkeypatch):
    """No weights anywhere, and no way to fetch any."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(imagenet, "KAGGLE_INPUT", tmp_path / "input")

    def no_network(url, *rest, **named):
        raise OSError("no route to host")

    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)


def test_weights_that_cannot_be_had_are_an_error_that_names_every_way(imagenet, tmp_path):
    data, url = str(tmp_path / "data"), f"https://download.pytorch.org/models/{PUBLISHED}"
    with pytest.raises(imagenet.BadInput, match=r"^[^\n]+$") as error:
        imagenet.load_data(settled(imagenet, weights="imagenet", data_dir=data, train_size=20), print)
    for word in ("no route to host", url, data, str(tmp_path / "input"), "none"):
        assert word in str(error.value)


PLACES = ["data", "input/resnet", "input/datasets/someone/weights/deep", "torch/hub/checkpoints"]


@pytest.mark.parametrize("place", PLACES)
def test_published_weights_are_found_where_they_lie(imagenet, tmp_path, published, place):
    (tmp_path / place).mkdir(parents=True)
    shutil.copy(published, tmp_path / place)
    model = build(imagenet, weights="imagenet", data_dir=str(tmp_path / "data"))
    assert torch.equal(model.conv1.weight, resnet18().conv1.weight)
    assert model.fc.weight.shape == (10, 512)


def test_a_download_goes_to_the_cache_and_is_checked(imagenet, tmp_path, published, monkeypatch):
    asked = []

    def fetch(url, target, hash_prefix, progress):
        asked.append((url, target, hash_prefix))
        shutil.copy(published, target)

    monkeypatch.setattr(torch.hub, "download_url_to_file", fetch)
    for _ in range(2):
        build(imagenet, weights="imagenet", data_dir=str(tmp_path / "data"))
    cached = str(tmp_path / "torch" / "hub" / "checkpoints" / PUBLISHED)
    assert asked == [(f"https://download.pytorch.org/models/{PUBLISHED}", cached, "f37072fd")]


def under(*prefixes):
    """A state dict whose names all stand behind each of the prefixes; behind the first are the right ones."""
    return lambda s: {p + key: v if p == prefixes[0] else 0 * v for p in prefixes for key, v in s.items()}


def trained(state):
    """What a training program may keep beside the weights: none of it is read, and no code of it run."""
    optimizer = {"state": {i: {"exp_avg": torch.zeros(2)} for i in range(99)}, "param_groups": [{"lr": 0.1}]}
    beside = {"args": argparse.Namespace(lr=1, out=Path("x")), "best_acc1": np.float64(71.3), "code": Evil()}
    return {"epoch": 3, "optimizer": optimizer, **beside, "callbacks": {"Ema": {"weights": state}}}


class Evil:
    def __reduce__(self):
        return (print, ("code of the file ran",))


WRAPPED = {name: lambda s, name=name: {"epoch": 3, name: s} for name in ("state_dict", "model", "net", "ema")}
WRAPPED |= {"nothing": lambda s: s, "a training program": trained}
WRAPPED |= {
    "compiled": under("_orig_mod."),
    "in parallel": under("module."),
    "both": under("_orig_mod.module."),
}
WRAPPED |= {"Lightning": lambda s: {"state_dict": under("model.")(s) | {"loss.weight": torch.ones(10)}}}
WRAPPED |= {
    "two networks": under("student.", "teacher."),
    "EMA": lambda s: {"model_ema": under("module.")(s)},
}


def save_old(content, path):
    torch.save(content, path, _use_new_zipfile_serialization=False)


def save_tensors(content, path):
    safetensors.torch.save_file(content, path)


SAVED = [(torch.save, ".pth", name) for name in WRAPPED]
SAVED += [(save_old, ".pt", name) for name in ("nothing", "model", "in parallel")]
SAVED += [(save_tensors, ".safetensors", name) for name in ("nothing", "compiled")]


@pytest.mark.parametrize("save,suffix,name", SAVED)
def test_a_file_gives_all_but_the_head_and_says_what_is_new(imagenet, tmp_path, capfd, save, suffix, name):
    path, theirs, said = tmp_path / f"mine{suffix}", resnet18(), []
    save(WRAPPED[name](theirs.state_dict()), path)
    model = build(imagenet, weights=str(path), say=said.append)
    assert torch.equal(model.conv1.weight, theirs.conv1.weight)
    assert torch.equal(model.bn1.running_var, theirs.bn1.running_var)
    assert said == [f"weights: {path}; begun anew: fc.weight, fc.bias"]
    same = build(imagenet, 1000, weights=str(path), say=said.append)
    assert torch.equal(same.fc.weight, theirs.fc.weight), "a head that fits is kept"
    assert said[1] == f"weights: {path}"
    assert "code of the file ran" not in capfd.readouterr().out


def test_without_safetensors_its_files_are_refused_by_name(imagenet, tmp_path, monkeypatch):
    save_tensors(resnet18().state_dict(), tmp_path / "bad.safetensors")
    monkeypatch.setattr(imagenet.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(imagenet.BadInput, match=r"^[^\n]+ pip install safetensors[^\n]+$"):
        build(imagenet, weights=str(tmp_path / "bad.safetensors"))


@pytest.mark.parametrize("name", ["densenet121", "mnasnet0_5"])
def test_names_and_versions_of_long_ago_are_understood(imagenet, tmp_path, name):
    """DenseNets were published when a layer was called norm.1, not norm1; a plain dict has no version."""
    state = torchvision.models.get_model(name, num_classes=10).state_dict()
    old = {re.sub(r"(denselayer\d+\.(?:norm|conv))([12])", r"\1.\2", key): v for key, v in state.items()}
    assert (old.keys() != state.keys()) == (name == "densenet121")
    torch.save(old, tmp_path / "old.pth")
    model = build(imagenet, model=name, weights=str(tmp_path / "old.pth"))
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_weights_and_data_that_a_run_would_move_away_are_refused(imagenet, tmp_path, published):
    out = tmp_path / "out"
    (out / "images").mkdir(parents=True)
    shutil.copy(published, out)
    settings = settled(imagenet, weights=str(out / PUBLISHED), out=str(out), train_size=20)
    for given in ({}, {"data": str(out / "images"), "weights": "none"}):
        with pytest.raises(imagenet.BadInput, match=f"--out {out}: expected a folder apart from"):
            imagenet.run(replace(settings, **given))


def write_text(content, path):
    path.write_text(content)


def recursive():
    """A dict that holds itself, twice: it has no end, and doubles at every step."""
    one: dict[str, object] = {}
    one.update(one=one, again=one)
    return one


def save_changed(change, path):
    state = resnet18().state_dict()
    torch.save(state | {"conv1.weight": change(state["conv1.weight"])}, path)


ODD_TENSORS = {
    "sparse": lambda value: value.to_sparse(),
    "quantised": lambda value: torch.quantize_per_tensor(value, 0.1, 0, torch.qint8),
    "meta": lambda value: value.to("meta"),
}

BAD_WEIGHTS = {  # what is in the file, how it was written, and what is said of it
    "absent": (None, lambda content, path: None, "No such file"),
    "text": ("no weights", write_text, ""),
    "empty": ("", write_text, ""),
    "code": ({"conv1.weight": Evil()}, torch.save, "no state dict, but builtins.print"),
    "a whole model": (torch.nn.Sequential(torch.nn.Linear(2, 3)), torch.save, "container.Sequential"),
    "a dict of its own": ({"args": defaultdict(list, {"a": [1]})}, torch.save, "collections.defaultdict"),
    "another model's": (torchvision.models.squeezenet1_0().state_dict(), torch.save, "such as features.0."),
    "another library's": (
        under("blocks.")({"norm": torch.ones(3)}),
        torch.save,
        "holds 1 tensors, such as blocks",
    ),
    "no tensors": ([{"epoch": 3}], torch.save, "no state dict, but list"),
    "objects of long ago": (Evil(), save_old, "GLOBAL print"),
    "truncated": (None, lambda content, path: shutil.copy(path.with_name(PUBLISHED), path), ""),
    "no safetensors": ("no weights", write_text, ""),
    "itself": (recursive(), torch.save, "no state dict, but dict"),
    "names that are no text": (
        {number: torch.ones(3) for number in (1, b"2", (3,))},
        torch.save,
        "such as 1;",
    ),
    "a pipe": (None, lambda content, path: os.mkfifo(path), "a pipe, a socket or a device"),
    **{
        kind: (change, save_changed, "conv1.weight is sparse, quanti") for kind, change in ODD_TENSORS.items()
    },
}


@pytest.mark.filterwarnings("ignore:.*(sparse|quantize|TypedStorage)")
@pytest.mark.parametrize("kind", BAD_WEIGHTS)
def test_bad_weights_are_refused_in_one_sentence_that_names_what_is_there(
    imagenet, tmp_path, published, kind, capfd
):
    content, save, told = BAD_WEIGHTS[kind]
    (tmp_path / PUBLISHED).write_bytes(published.read_bytes()[:100_000])
    path = tmp_path / ("bad.safetensors" if kind == "no safetensors" else "bad.pt")
    save(content, path)
    with pytest.raises(
        imagenet.BadInput, match=r"^--weights [^\n]+/bad\.[^\n]+: [^\n]+ or none[^\n]+$"
    ) as error:
        build(imagenet, weights=str(path))
    assert told in str(error.value)
    assert "code of the file ran" not in capfd.readouterr().out


FAMILIES = "alexnet convnext_tiny densenet121 efficientnet_b0 googlenet inception_v3 maxvit_t mnasnet0_5"
FAMILIES += " mobilenet_v3_small resnext50_32x4d shufflenet_v2_x0_5 squeezenet1_1 swin_t vgg11_bn vit_b_16"


@pytest.mark.parametrize("name", FAMILIES.split())
def test_every_family_gives_logits_of_its_own_classes(imagenet, name):
    side = 299 if name == "inception_v3" else 224
    with torch.device("meta"):  # shapes alone, nothing is computed
        model = build(imagenet, 7, model=name, image_size=side)
        logits = model.train()(torch.zeros(2, 3, side, side))
    assert getattr(logits, "shape", None) == (2, 7), "in training too"
    assert imagenet.head_of(model)[1].weight.shape[0] == 7


@pytest.mark.parametrize("named", ["resnet18 SGD", "regnet_y_400mf SGD", "squeezenet1_1 AdamW"])
def test_the_recipe_trains_every_weight_and_without_batch_norm_it_is_adamw(imagenet, named):
    name, kind = named.split()
    model = build(imagenet, 7, model=name)
    optimizer, criterion = imagenet.recipe(settled(imagenet, model=name), model)
    assert type(optimizer).__name__ == kind
    trained = [(p, group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(id(p) for p, _ in trained) == sorted(map(id, model.parameters()))
    assert all((p.ndim > 1) == (decay > 0) for p, decay in trained)
    losses = criterion(model(torch.randn(4, 3, 32, 32)), torch.arange(4))
    assert losses.shape == (4,)
    head = imagenet.head_of(model)[1].weight
    before = head.detach().clone()
    losses.mean().backward()
    optimizer.step()
    assert not torch.equal(head, before)


def test_a_new_head_on_pretrained_weights_learns_faster_than_the_rest(imagenet, published):
    def rates(classes, weights=str(published), **values):
        model = build(imagenet, classes, weights=weights)
        optimizer, _ = imagenet.recipe(settled(imagenet, weights=weights, **values), model)
        rate = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
        (head,) = {rate[id(p)] for p in model.fc.parameters()}
        (rest,) = {rate[id(p)] for name, p in model.named_parameters() if not name.startswith("fc.")}
        return head / rest, rest

    assert rates(7)[0] == pytest.approx(imagenet.HEAD_RATE) == 10
    assert rates(1000)[0] == 1, "a head that fits has learned already"
    assert rates(7, "none")[0] == 1
    assert rates(7)[1] < rates(7, "none")[1]
    assert rates(7, lr=0.5)[1] == 0.5


@pytest.mark.parametrize("named", ["alexnet 24", "inception_v3 32", "vit_b_16 33", "resnet5O 32"])
def test_a_model_and_a_size_that_cannot_be_are_refused_at_start(imagenet, named):
    model, side = named.split()
    with pytest.raises(imagenet.BadInput, match=f"--model {model} --image-size {side}: expected"):
        build(imagenet, model=model, image_size=int(side))


def test_a_vision_transformers_positions_follow_the_size_of_the_images(imagenet, tmp_path, monkeypatch):
    def small(name, image_size=64, num_classes=10):
        return torchvision.models.VisionTransformer(image_size, 16, 1, 2, 16, 32, num_classes=num_classes)

    theirs, said = small("vit_b_16"), []
    torch.save(theirs.state_dict(), tmp_path / "vit.pt")
    monkeypatch.setattr(torchvision.models, "get_model", small)
    for side, patches in ((64, 16), (96, 36)):
        weights = str(tmp_path / "vit.pt")
        model = build(imagenet, model="vit_b_16", image_size=side, weights=weights, say=said.append)
        assert model(torch.randn(2, 3, side, side)).shape == (2, 10)
        assert model.encoder.pos_embedding.shape == (1, patches + 1, 16)
        assert torch.equal(model.encoder.pos_embedding[:, 0], theirs.encoder.pos_embedding[:, 0])
    assert "anew" not in "".join(said)


def test_a_network_from_another_library_trains(imagenet):
    import timm

    torch.manual_seed(0)
    model = timm.create_model("test_vit", num_classes=4, img_size=32)
    train, val = imagenet.sources(settled(imagenet, batch_size=16), colours(imagenet), torch.device("cpu"))
    config = {"target_activation": 0.4, "amp": "off", "batch_size": 16, "device": "cpu"}
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    trainer = imagenet.AdaptiveSparseTrainer(model, train, val, config, optimizer, listeners=[])
    assert (results := trainer.train(epochs=12))["final_accuracy"] > 80
    assert results["activation_rate"] < 0.8


def test_a_view_is_the_picture_or_its_mirror_in_other_colours(imagenet, generator, monkeypatch):
    pictures = torch.randint(0, 256, (64, 24, 24, 3), dtype=torch.uint8, generator=generator)
    views, again = (imagenet.augment(pictures, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(views, again)
    assert views.is_contiguous(memory_format=torch.channels_last)
    monkeypatch.setattr(imagenet, "JITTER", 0.0)
    monkeypatch.setattr(imagenet, "ERASE", 0.0)
    views, plain = imagenet.augment(pictures, generator), imagenet.plain_view(pictures)
    same = [torch.allclose(a, b, atol=1e-4) for a, b in zip(views, plain, strict=True)]
    mirrored = [torch.allclose(a, b.flip(2), atol=1e-4) for a, b in zip(views, plain, strict=True)]
    assert all(a or b for a, b in zip(same, mirrored, strict=True))
    assert 10 < sum(same) < 54


def test_colours_change_by_a_fifth_and_a_tenth_of_the_views_loses_a_rectangle(imagenet, generator):
    mean, std = imagenet.pixel_statistics(torch.device("cpu"))
    views = imagenet.augment(torch.full((3000, 32, 32, 3), 100, dtype=torch.uint8), generator)
    erased = (views == 0).all(1)
    values = (views.permute(0, 2, 3, 1) * std + mean)[~erased]
    assert [values.min(), values.max()] == pytest.approx([80, 120], abs=0.2)
    hit = erased.flatten(1).any(1)
    assert 0.08 < hit.float().mean() < 0.12
    shares = erased[hit].flatten(1).float().mean(1)
    assert 0.005 < shares.min() < shares.max() < 0.4
    rows, columns = erased[hit].any(2).sum(1), erased[hit].any(1).sum(1)
    assert torch.equal(rows * columns, erased[hit].flatten(1).sum(1)), "rectangles"


def test_a_profile_sets_what_nobody_else_did_and_bad_values_are_refused(imagenet):
    def target(*flags, environment=(), **cell):
        return imagenet.parse(imagenet.Settings(**cell), list(flags), dict(environment)).target_activation

    assert target() == 0.4
    assert target("--profile", "efficiency") == 0.15 == target(profile="efficiency")
    assert target("--profile", "efficiency", "--target-activation", "0.3") == 0.3
    variables = {"AST_TARGET_ACTIVATION": "0.25", "AST_PROFILE": "efficiency"}
    assert target(environment=variables) == 0.25
    assert target(profile="efficiency", target_activation=0.5) == 0.5
    assert target("--profile", "efficiency", target_activation=0.5) == 0.5
    assert target("--profile", "efficiency", environment={"AST_TARGET_ACTIVATION": "0.25"}) == 0.25
    assert imagenet.parse(imagenet.Settings(), ["--profile", "efficiency"], {}).warmup_epochs == 1
    assert target("--profile", "accuracy", profile="efficiency") == 0.4
    for bad in ("image-size 4", "workers 0", "val-fraction 1", "compare shorter", "profile fast"):
        with pytest.raises(imagenet.BadInput, match=rf"^--{bad}[.0]*: expected [^\n]+$"):
            target(*f"--{bad}".split())


def colours(program, n=160):
    """Four classes that differ by colour, easy enough for random features."""
    rng, labels = np.random.default_rng(0), np.arange(n) % 4
    base = np.array([[200, 40, 40], [40, 200, 40], [40, 40, 200], [180, 180, 40]])[labels]
    images = np.clip(base[:, None, None] + rng.normal(0, 25, (n, 32, 32, 3)), 0, 255).astype(np.uint8)
    names = ["red", "green", "blue", "yellow"]
    return program.ImageData("colours", False, names, images, labels, images, labels, "drawn")


@pytest.mark.parametrize("name", ["resnet18", "squeezenet1_1"])
def test_the_linear_probe_is_a_lesson_and_where_probe_first_begins(imagenet, name, tmp_path, capsys):
    torch.manual_seed(5)
    theirs = torchvision.models.get_model(name)
    torch.save(theirs.state_dict(), tmp_path / "published.pth")
    settings, data = settled(imagenet, model=name, weights=str(tmp_path / "published.pth")), colours(imagenet)
    imagenet.show_probe(settings, data)
    found, said = data.references["linear probe"], []
    assert found["accuracy"] > 90
    assert capsys.readouterr().out == f"linear probe: {found['words']}\n"
    assert f"{found['accuracy']:.2f} %" in found["words"]
    settings = replace(settings, probe_first=True)
    model = imagenet.build_model(settings, data, said.append).eval()
    assert data.references["linear probe"] is found, "computed once"
    assert found["words"] in "".join(said)
    with torch.no_grad():
        views, labels = zip(*imagenet.sources(settings, data, torch.device("cpu"))[1].in_order(), strict=True)
        right = torch.cat([model(part).argmax(1) for part in views]) == torch.cat(labels)
    assert 100 * right.float().mean() == pytest.approx(found["accuracy"], abs=2)
    assert torch.equal(next(model.parameters()), next(theirs.parameters()))
    optimizer, _ = imagenet.recipe(settings, model)
    assert len({group["lr"] for group in optimizer.param_groups}) == 1, "it has learned already"


@pytest.fixture(scope="module")
def folder(imagenet, tmp_path_factory):
    """Where an images.zip lies: four classes of small photographs, one of them unreadable."""
    made, data = tmp_path_factory.mktemp("colours"), colours(imagenet)
    with zipfile.ZipFile(made / "images.zip", "w") as archive:
        for index, (picture, label) in enumerate(zip(data.train_images, data.train_labels, strict=True)):
            with archive.open(f"{data.classes[label]}/{index:03d}.png", "w") as file:
                if index != 4:
                    Image.fromarray(picture).save(file, "PNG")
    return made


def run(program, folder, out, controls=None, listeners=(), say=lambda line: None, **values):
    own = {"compare": "none", "epochs": 3, "batch_size": 16, "model": "squeezenet1_1", "image_size": 32}
    own |= {"data": str(folder / "images.zip"), "data_dir": str(folder), "device": "cpu", "amp": "off"}
    settings = program.Settings(out=str(out), **(own | values))
    return program.run(settings, listeners=listeners, controls=controls, say=say)


def test_a_run_reports_the_probe_and_what_it_skipped_and_resumed_it_does_so_again(imagenet, folder, tmp_path):
    torch.manual_seed(5)
    torch.save(torchvision.models.squeezenet1_1().state_dict(), tmp_path / "published.pth")
    lines, values = [], {"probe_first": True, "compare": "short", "weights": str(tmp_path / "published.pth")}
    summary = run(imagenet, folder, tmp_path / "out", say=lines.append, **values)
    assert (summary["complete"], summary["synthetic"], summary["dataset"]) == (True, False, "images")
    assert list(summary["policies"]) == ["ast", "short"]
    probe = summary["references"]["linear probe"]
    assert probe["accuracy"] > 80
    assert summary["policies"]["ast"]["final_accuracy"] > 50, "where chance has 25"
    for words in ("linear probe: ", "plain training of as few epochs", "begun anew: classifier.1.weight"):
        assert any(words in line for line in lines)
    (listed,) = (tmp_path / "out" / "skipped_images.txt").read_text().splitlines()
    assert listed.startswith("red/004.png: ")
    resumed = imagenet.run(imagenet.Settings(out=str(tmp_path / "out"), resume=True), say=lambda line: None)
    assert resumed["references"]["linear probe"]["accuracy"] == probe["accuracy"]
    assert resumed["policies"] == summary["policies"]
    assert resumed["skipped_images"] == summary["skipped_images"] == 1


def test_stopped_in_mid_epoch_and_resumed_by_other_threads_it_ends_the_same(imagenet, folder, tmp_path):
    """Crops come from threads that work ahead; what was decoded and not trained on must come again."""
    values = {"weights": "none", "epochs": 4}
    whole = run(imagenet, folder, tmp_path / "whole", workers=2, **values)
    controls = imagenet.Controls()

    def stop(event, data):
        if event == "chunk" and data["progress"] > 0.6:
            controls.ask_stop("a test")

    assert not run(imagenet, folder, tmp_path / "cut", controls, [stop], workers=2, **values)["complete"]
    resumed = run(imagenet, folder, tmp_path / "cut", resume=True, workers=3, **values)
    assert resumed["complete"]
    models = (torch.load(tmp_path / out / "model.pt", weights_only=True) for out in ("cut", "whole"))
    ours, theirs = (model["state_dict"] for model in models)
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    assert resumed["policies"]["ast"]["accuracy_per_seed"] == whole["policies"]["ast"]["accuracy_per_seed"]


def test_it_runs_alone_in_an_empty_folder(tmp_path):
    shutil.copy(ROOT / "standalone" / "imagenet100_ast.py", tmp_path)
    flags = "--data shapes --weights none --image-size 16 --model resnet18 --train-size 100 --epochs 2"
    flags += " --compare none --batch-size 50 --workers 2 --device cpu"
    command = [sys.executable, "-I", "imagenet100_ast.py", *flags.split()]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert "SYNTHETIC" in done.stdout
    out = tmp_path / "runs" / "imagenet100_ast"
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["complete"], summary["synthetic"], summary["n_train"]) == (True, True, 100)
    rows = [json.loads(row) for row in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["activated"] for row in rows] == [100, 40]
