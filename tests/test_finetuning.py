"""The ImageNet-100 program's own cells: weights, models, views, recipe, references, profiles."""

import copy
import itertools
import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
import torchvision
from conftest import ROOT
from PIL import Image
from torch import nn

REAL_IMAGENET = ROOT.parent / "shared" / "data" / "imagenet100-mini.zip"


def settled(program, **values):
    """Settings as they would run on a CPU, small."""
    small = {"data": "shapes", "model": "resnet18", "image_size": 32, "weights": "none", "batch_size": 8}
    return program.let_device_decide(program.Settings(device="cpu", amp="off", **{**small, **values}))[0]


@pytest.fixture(autouse=True)
def empty_cache(imagenet, tmp_path, monkeypatch):
    """No weights anywhere, and no way to fetch any."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(imagenet, "KAGGLE_INPUT", tmp_path / "input")

    def no_network(url, *rest, **named):
        raise OSError("no route to host")

    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)


@pytest.fixture
def published(tmp_path):
    """Weights as torchvision publishes them: 1,000 outputs, and the name that says so."""
    torch.manual_seed(5)
    path = tmp_path / "weights" / "resnet18-f37072fd.pth"
    path.parent.mkdir()
    torch.save(torchvision.models.resnet18().state_dict(), path)
    return path


# --- weights ---


def test_weights_that_cannot_be_had_are_an_error_that_names_every_place(imagenet, tmp_path):
    with pytest.raises(imagenet.BadInput) as error:
        imagenet.find_weights(settled(imagenet, weights="imagenet", data_dir=str(tmp_path / "data")), print)
    for word in ("resnet18-f37072fd.pth", str(tmp_path / "data"), str(tmp_path / "input"), "--weights none"):
        assert word in str(error.value)
    with pytest.raises(imagenet.BadInput):
        imagenet.build_model(settled(imagenet, weights="imagenet", data_dir=str(tmp_path)), 10)


@pytest.mark.parametrize(
    "place", ["data", "input/resnet", "input/datasets/someone/weights/deep", "torch/hub/checkpoints"]
)
def test_attached_weights_are_found(imagenet, tmp_path, published, place):
    folder = tmp_path / place
    folder.mkdir(parents=True)
    published.rename(folder / published.name)
    settings = settled(imagenet, weights="imagenet", data_dir=str(tmp_path / "data"))
    assert imagenet.find_weights(settings, print) == folder / published.name


def test_a_download_goes_to_the_cache_and_is_checked(imagenet, tmp_path, published, monkeypatch):
    asked, said = [], []

    def fetch(url, target, hash_prefix, progress):
        asked.append((url, hash_prefix))
        published.rename(target)

    monkeypatch.setattr(torch.hub, "download_url_to_file", fetch)
    settings = settled(imagenet, weights="imagenet", data_dir=str(tmp_path / "data"))
    path = imagenet.find_weights(settings, said.append)
    assert path == tmp_path / "torch" / "hub" / "checkpoints" / "resnet18-f37072fd.pth"
    assert asked == [("https://download.pytorch.org/models/resnet18-f37072fd.pth", "f37072fd")]
    assert "downloading" in said[0]


@pytest.mark.parametrize(
    "wrapped", [lambda s: s, lambda s: {"state_dict": s}, lambda s: {"module." + k: v for k, v in s.items()}]
)
def test_a_file_gives_all_but_the_head_and_says_what_is_new(imagenet, published, tmp_path, wrapped):
    state = torch.load(published, weights_only=True)
    torch.save(wrapped(state), tmp_path / "mine.pt")
    said = []
    settings = settled(imagenet, weights=str(tmp_path / "mine.pt"), train_size=20)
    imagenet.load_data(settings, said.append)
    assert any("fc.weight, fc.bias" in line for line in said)
    model = imagenet.build_model(settings, 10)
    assert torch.equal(model.conv1.weight, state["conv1.weight"])
    assert model.fc.weight.shape == (10, 512)


def test_weights_of_the_old_file_format_are_read(imagenet, tmp_path):
    """Those that torchvision published before 2020, AlexNet's and VGG's among them."""
    state = torchvision.models.resnet18(num_classes=10).state_dict()
    torch.save(state, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    model = imagenet.build_model(settled(imagenet, weights=str(tmp_path / "old.pth")), 10)
    assert torch.equal(model.conv1.weight, state["conv1.weight"])


def test_a_densenets_published_names_are_understood(imagenet, tmp_path):
    """They are from before torchvision renamed the layers: norm.1 where the model says norm1."""
    state = torchvision.models.densenet121(num_classes=10).state_dict()
    old = {re.sub(r"(denselayer\d+\.(?:norm|conv))([12])", r"\1.\2", name): v for name, v in state.items()}
    assert old.keys() != state.keys()
    torch.save(old, tmp_path / "old.pth")
    model = imagenet.build_model(
        settled(imagenet, model="densenet121", weights=str(tmp_path / "old.pth")), 10
    )
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_a_state_dict_without_a_version_loads_into_mnasnet(imagenet, tmp_path):
    state = dict(torchvision.models.mnasnet0_5(num_classes=10).state_dict())
    torch.save(state, tmp_path / "mnasnet.pth")
    settings = settled(imagenet, model="mnasnet0_5", weights=str(tmp_path / "mnasnet.pth"))
    model = imagenet.build_model(settings, 10)
    assert torch.equal(model.layers[0].weight, state["layers.0.weight"])


def test_weights_that_a_run_would_move_away_are_refused(imagenet, tmp_path):
    (tmp_path / "out").mkdir()
    path = tmp_path / "out" / "model.pt"
    torch.save(torchvision.models.resnet18(num_classes=10).state_dict(), path)
    settings = settled(imagenet, weights=str(path), out=str(tmp_path / "out"), train_size=20)
    with pytest.raises(imagenet.BadInput, match=r"--weights .*lies in --out"):
        imagenet.load_data(settings, print)
    assert imagenet.load_data(replace(settings, resume=True), lambda line: None)
    (tmp_path / "out" / "images").mkdir()
    with pytest.raises(imagenet.BadInput, match=r"--data .*lies in --out"):
        imagenet.load_data(replace(settings, data=str(tmp_path / "out" / "images"), weights="none"), print)


def test_a_head_that_fits_is_kept(imagenet, tmp_path):
    torch.manual_seed(1)
    trained = torchvision.models.resnet18(num_classes=10)
    torch.save(trained.state_dict(), tmp_path / "model.pt")
    model = imagenet.build_model(settled(imagenet, weights=str(tmp_path / "model.pt")), 10)
    assert torch.equal(model.fc.weight, trained.fc.weight)


def pickled_code(path):
    class Evil:
        def __reduce__(self):
            return (print, ("code of the file ran",))

    torch.save({"conv1.weight": Evil()}, path)


def other_model(path):
    torch.save(torchvision.models.squeezenet1_0().state_dict(), path)


BAD_WEIGHTS = {
    "text": lambda path: path.write_text("no weights"),
    "empty": lambda path: path.write_bytes(b""),
    "code": pickled_code,
    "another model": other_model,
    "a network for a vision transformer": other_model,
    "a list": lambda path: torch.save([1, 2], path),
    "no tensors": lambda path: torch.save({"epoch": 3}, path),
    "truncated": lambda path: (
        torch.save(torchvision.models.resnet18().state_dict(), path),
        path.write_bytes(path.read_bytes()[:100_000]),
    ),
}


@pytest.mark.parametrize("kind", BAD_WEIGHTS)
def test_bad_weights_are_refused_in_one_sentence(imagenet, tmp_path, kind, capfd):
    path = tmp_path / "bad.pt"
    BAD_WEIGHTS[kind](path)
    model, side = ("vit_b_16", 224) if "transformer" in kind else ("resnet18", 32)
    with pytest.raises(imagenet.BadInput) as error:
        imagenet.build_model(settled(imagenet, weights=str(path), model=model, image_size=side), 10)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)
    assert "code of the file ran" not in capfd.readouterr().out


def test_a_missing_file_and_an_unknown_model_are_refused(imagenet, tmp_path):
    with pytest.raises(imagenet.BadInput, match=r"gone\.pt"):
        imagenet.build_model(settled(imagenet, weights=str(tmp_path / "gone.pt")), 10)
    with pytest.raises(imagenet.BadInput, match="resnet50"):
        imagenet.build_model(settled(imagenet, model="resnet5O"), 10)


# --- models ---

FAMILIES = {
    "alexnet": 64, "convnext_tiny": 32, "densenet121": 32, "efficientnet_b0": 32, "googlenet": 32,
    "inception_v3": 96, "mnasnet0_5": 32, "mobilenet_v3_small": 32, "regnet_y_400mf": 32, "resnet18": 32,
    "shufflenet_v2_x0_5": 32, "squeezenet1_1": 32, "swin_t": 32, "vgg11_bn": 32,
}  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_trains_a_step_with_its_head_replaced(imagenet, name):
    torch.manual_seed(0)
    side = FAMILIES[name]
    settings = settled(imagenet, model=name, image_size=side)
    model = imagenet.build_model(settings, 7)
    optimizer, criterion = imagenet.recipe(settings, model)
    counted = sum(p.numel() for group in optimizer.param_groups for p in group["params"])
    assert counted == sum(p.numel() for p in model.parameters()), "every weight is in one group"
    images, labels = torch.randn(4, 3, side, side), torch.arange(4)
    losses = criterion(model(images), labels)
    assert losses.shape == (4,)
    losses.mean().backward()
    _, head = imagenet.head_of(model)
    assert head.weight.shape[0] == 7
    assert head.weight.grad.abs().sum() > 0


def test_a_new_head_on_pretrained_weights_learns_faster_than_the_rest(imagenet, published):
    def rates(weights, classes):
        settings = settled(imagenet, weights=weights)
        model = imagenet.build_model(settings, classes)
        optimizer, _ = imagenet.recipe(settings, model)
        head = set(map(id, model.fc.parameters()))
        groups = optimizer.param_groups
        assert sum(len(g["params"]) for g in groups) == len(list(model.parameters()))
        ours = {g["lr"] for g in groups if id(g["params"][0]) in head}
        (others,) = {g["lr"] for g in groups if id(g["params"][0]) not in head}
        return ours.pop() / others

    assert rates(str(published), 7) == pytest.approx(10)
    assert rates(str(published), 1000) == pytest.approx(1), "a head that fits has learned already"
    assert rates("none", 7) == pytest.approx(1)


def test_models_without_batch_norm_get_adamw(imagenet):
    def kind(name):
        settings = settled(imagenet, model=name)
        return type(imagenet.recipe(settings, imagenet.build_model(settings, 5))[0])

    assert kind("resnet18") is torch.optim.SGD
    assert kind("convnext_tiny") is torch.optim.AdamW


@pytest.mark.parametrize("name", ["resnet18", "convnext_tiny", "mobilenet_v3_small"])
def test_grad_checkpoint_changes_memory_and_no_result(imagenet, name):
    def step(grad_checkpoint):
        torch.manual_seed(0)
        settings = settled(imagenet, model=name, grad_checkpoint=grad_checkpoint)
        model = imagenet.build_model(settings, 5)
        for module in model.modules():  # what is dropped at random is drawn in another order
            if isinstance(module, nn.Dropout):
                module.p = 0.0
            if type(module).__name__ == "StochasticDepth":
                module.p = 0.0
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
            loss = (
                model(torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(1))).square().mean()
            )
        loss.backward()
        return model, sum(kept)

    plain, all_kept = step(False)
    frugal, few_kept = step(True)
    assert few_kept < 0.7 * all_kept
    for ours, theirs in zip(frugal.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(ours.grad, theirs.grad, atol=1e-5)
    for ours, theirs in zip(frugal.buffers(), plain.buffers(), strict=True):
        if ours.is_floating_point():
            assert torch.allclose(ours, theirs, atol=1e-6), "batch norm counts the batch once"
    assert list(frugal.state_dict()) == list(plain.state_dict())


@pytest.mark.parametrize("name, side", [("inception_v3", 96), ("alexnet", 64)])
def test_grad_checkpoint_is_refused_where_there_are_no_blocks(imagenet, name, side):
    settings = settled(imagenet, model=name, image_size=side, grad_checkpoint=True)
    if name == "alexnet":  # one sequence of layers is as good as blocks
        assert imagenet.build_model(settings, 5)
        return
    with pytest.raises(imagenet.BadInput, match=r"--grad-checkpoint: expected a network of sequences"):
        imagenet.build_model(settings, 5)


def test_grad_checkpoint_and_compile_exclude_each_other(imagenet):
    with pytest.raises(imagenet.BadInput, match=r"--compile.*--grad-checkpoint"):
        imagenet.build_model(settled(imagenet, grad_checkpoint=True, compile=True), 5)


def test_a_copy_of_a_recomputing_model_is_its_own(imagenet):
    model = imagenet.build_model(settled(imagenet, grad_checkpoint=True), 5)
    twin = copy.deepcopy(model)
    twin(torch.randn(4, 3, 32, 32)).sum().backward()
    assert all(p.grad is None for p in model.parameters())
    assert all(p.grad is not None for p in twin.parameters())


def test_head_epochs_freeze_all_but_the_head(imagenet):
    settings = settled(imagenet, head_epochs=2)
    model = imagenet.build_model(settings, 5)
    optimizer, _ = imagenet.recipe(settings, model)
    early = [id(p) for g in optimizer.param_groups if not g.get("first_epoch") for p in g["params"]]
    assert sorted(early) == sorted(map(id, model.fc.parameters()))
    assert {g["first_epoch"] for g in optimizer.param_groups if "first_epoch" in g} == {2}


def test_compile_is_refused_without_a_compiler(imagenet, monkeypatch):
    monkeypatch.setattr(imagenet.shutil, "which", lambda name: None)
    with pytest.raises(imagenet.BadInput, match=r"--compile.*compiler"):
        imagenet.build_model(settled(imagenet, compile=True), 5)


@pytest.mark.parametrize("name, side", [("alexnet", 24), ("inception_v3", 32), ("vit_b_16", 33)])
def test_a_size_that_a_model_cannot_take_is_refused_at_start(imagenet, name, side):
    with pytest.raises(imagenet.BadInput, match=f"--image-size {side}: expected a size that {name} takes"):
        imagenet.build_model(settled(imagenet, model=name, image_size=side), 5)


def test_a_vision_transformers_positions_follow_the_size_of_the_images(imagenet, tmp_path, monkeypatch):
    def small(**options):
        sizes = {"patch_size": 16, "num_layers": 1, "num_heads": 2, "hidden_dim": 16, "mlp_dim": 32}
        return torchvision.models.VisionTransformer(**{"image_size": 64, **sizes, **options})

    torch.save(small(num_classes=5).state_dict(), tmp_path / "vit.pt")
    monkeypatch.setattr(torchvision.models, "get_model", lambda name, **options: small(**options))
    settings = settled(imagenet, model="vit_b_16", image_size=96, weights=str(tmp_path / "vit.pt"))
    model = imagenet.build_model(settings, 5)
    assert model.encoder.pos_embedding.shape == (1, 6 * 6 + 1, 16)
    assert model.encoder.pos_embedding.abs().sum() > 0
    assert model(torch.randn(2, 3, 96, 96)).shape == (2, 5)


# --- views ---


@pytest.fixture
def pictures():
    return torch.randint(
        0, 256, (64, 24, 24, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(2)
    )


def test_without_jitter_and_erasing_a_view_is_the_picture_or_its_mirror(imagenet, pictures, generator):
    views = imagenet.augment(pictures, generator, jitter=0.0, erase=0.0)
    plain = imagenet.plain_view(pictures, generator)
    same = [torch.equal(a, b) for a, b in zip(views, plain, strict=True)]
    mirrored = [torch.equal(a, b.flip(2)) for a, b in zip(views, plain, strict=True)]
    assert all(a or b for a, b in zip(same, mirrored, strict=True))
    assert 10 < sum(same) < 54
    assert views.is_contiguous(memory_format=torch.channels_last)


def test_jitter_changes_each_picture_in_its_own_way_within_bounds(imagenet, pictures, generator):
    grey = torch.full((64, 8, 8, 3), 100, dtype=torch.uint8)
    views = imagenet.augment(grey, generator, jitter=0.2, erase=0.0)
    mean, std = imagenet.pixel_statistics(torch.device("cpu"))
    values = (views.permute(0, 2, 3, 1) * std + mean)[:, 0, 0, 0]
    assert 79.9 <= values.min() < values.max() <= 120.1, "brightness by a fifth at most"
    assert len(values.unique()) > 60


def test_erasing_hits_its_share_with_rectangles_of_2_to_33_percent(imagenet, generator):
    white = torch.full((2000, 32, 32, 3), 255, dtype=torch.uint8)
    views = imagenet.augment(white, generator, jitter=0.0, erase=0.3)
    erased = (views == 0).all(1)
    hit = erased.flatten(1).any(1)
    assert 0.24 < hit.float().mean() < 0.36
    shares = erased[hit].flatten(1).float().mean(1)
    assert shares.min() > 0.005
    assert shares.max() < 0.4
    rows, columns = erased[hit].any(2).sum(1), erased[hit].any(1).sum(1)
    assert torch.equal(rows * columns, erased[hit].flatten(1).sum(1)), "rectangles"
    assert views.is_contiguous(memory_format=torch.channels_last)
    assert not (imagenet.augment(white[:50], generator, jitter=0.0, erase=0.0) == 0).any()


def test_views_repeat_from_their_generator(imagenet, pictures):
    def once():
        return imagenet.augment(pictures, torch.Generator().manual_seed(3), jitter=0.2, erase=0.5)

    assert torch.equal(once(), once())


# --- profiles and settings ---


def test_a_profile_sets_what_nobody_else_did(imagenet):
    settings, given = imagenet.resolve(imagenet.Settings(), ["--profile", "efficiency"], {})
    assert settings.target_activation == 0.15
    assert given["target_activation"] == "--profile efficiency"
    arguments = ["--profile", "efficiency", "--target-activation", "0.3"]
    assert imagenet.resolve(imagenet.Settings(), arguments, {})[0].target_activation == 0.3
    variables = {"AST_TARGET_ACTIVATION": "0.25", "AST_PROFILE": "efficiency"}
    assert imagenet.resolve(imagenet.Settings(), [], variables)[0].target_activation == 0.25
    cell = imagenet.Settings(profile="efficiency", target_activation=0.5)
    assert imagenet.resolve(cell, [], {})[0].target_activation == 0.5
    assert imagenet.resolve(imagenet.Settings(), [], {})[0].target_activation == 0.4
    with pytest.raises(imagenet.BadInput, match="accuracy, efficiency"):
        imagenet.resolve(imagenet.Settings(), ["--profile", "fast"], {})


@pytest.mark.parametrize(
    "flags",
    [["--image-size", "4"], ["--workers", "0"], ["--val-fraction", "1"], ["--jitter", "1.5"],
     ["--erase", "-1"], ["--head-epochs", "-1"], ["--ema", "1"], ["--clip-norm", "-2"],
     ["--compare", "shorter"]],
)  # fmt: skip
def test_bad_values_are_refused_in_one_sentence(imagenet, flags):
    with pytest.raises(imagenet.BadInput) as error:
        imagenet.resolve(imagenet.Settings(), flags, {})
    assert flags[0] in str(error.value)
    assert "expected" in str(error.value)


# --- references ---


def never():
    """Nobody asks to stop."""
    return False


def photographs(program, n=40, classes=4, seed=0):
    """Four classes that differ by colour, easy enough for random features."""
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % classes
    base = np.array([[200, 40, 40], [40, 200, 40], [40, 40, 200], [180, 180, 40]])[labels]
    images = np.clip(base[:, None, None] + rng.normal(0, 25, (n, 32, 32, 3)), 0, 255).astype(np.uint8)
    names = ["red", "green", "blue", "yellow"]
    return program.ImageData("colours", False, names, images, labels, images, labels, "drawn")


def test_untrained_weights_are_measured_on_the_classes_they_know(imagenet, tmp_path):
    """A model of 1,000 outputs that answers "goldfish" to all: right on exactly the goldfish."""
    model = torchvision.models.resnet18()
    nn.init.zeros_(model.fc.weight)
    nn.init.zeros_(model.fc.bias)
    with torch.no_grad():
        model.fc.bias[1] = 9.0  # ImageNet's goldfish
        model.fc.bias[500] = 99.0  # a class that the data do not have must not be an answer
    torch.save(model.state_dict(), tmp_path / "resnet18.pth")
    data = replace(photographs(imagenet), classes=["goldfish", "tench", "no such animal", "tabby"])
    settings = settled(imagenet, weights=str(tmp_path / "resnet18.pth"))
    found = imagenet.untrained(settings, data, print, never)
    assert found["classes"] == 3
    assert found["accuracy"] == pytest.approx(100 / 3)
    assert "3 of 4 classes" in found["words"]


def test_weights_of_other_classes_are_called_so(imagenet, tmp_path, published):
    found = imagenet.untrained(settled(imagenet, weights=str(published)), photographs(imagenet), print, never)
    assert found["accuracy"] is None
    assert "other names" in found["words"]


def test_a_linear_probe_learns_on_frozen_weights(imagenet, published):
    settings = settled(imagenet, weights=str(published))
    found = imagenet.linear_probe(settings, photographs(imagenet), print, never)
    assert found["accuracy"] > 90
    assert found["seconds"] > 0
    again = imagenet.linear_probe(settings, photographs(imagenet), print, never)
    assert again["accuracy"] == found["accuracy"]


def test_a_stop_ends_a_probe_between_batches(imagenet, published):
    asked = itertools.count()
    settings = settled(imagenet, weights=str(published))
    stopped = imagenet.linear_probe(settings, photographs(imagenet), print, lambda: next(asked) >= 2)
    assert stopped == {}
    assert next(asked) < 6


@pytest.mark.parametrize("off", [{"weights": "none"}, {"probe": False}])
def test_references_are_left_out_where_nothing_is_pretrained_or_asked(imagenet, published, off):
    settings = settled(imagenet, **{"weights": str(published), **off})
    for reference in (imagenet.untrained, imagenet.linear_probe):
        found = reference(settings, photographs(imagenet), print, never)
        assert found == {"accuracy": None, "words": ""}


# --- whole runs ---


@pytest.fixture(scope="module")
def colours(imagenet, tmp_path_factory):
    """A folder of four classes of small photographs."""
    folder = tmp_path_factory.mktemp("colours") / "images"
    data = photographs(imagenet, n=160)
    for index, (picture, label) in enumerate(zip(data.train_images, data.train_labels, strict=True)):
        path = folder / data.classes[label] / f"{index:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(path)
    return folder


@pytest.fixture(scope="module")
def finished(imagenet, colours, tmp_path_factory):
    """A small run of every policy from `published` weights on coloured squares, one of them unreadable."""
    folder = tmp_path_factory.mktemp("run")
    shutil.copytree(colours, folder / "images")
    (folder / "images" / "red" / "000.png").write_bytes(b"")
    torch.manual_seed(5)
    torch.save(torchvision.models.resnet18().state_dict(), folder / "resnet18.pth")
    lines = []
    settings = imagenet.Settings(
        data=str(folder / "images"), weights=str(folder / "resnet18.pth"), model="resnet18", image_size=32,
        epochs=8, batch_size=16, out=str(folder / "out"), target_activation=0.3, head_epochs=1, ema=0.5,
        data_dir=str(folder), device="cpu",
    )  # fmt: skip
    summary = imagenet.run(settings, say=lines.append)
    return summary, lines, folder


def test_a_run_measures_all_that_a_skeptic_asks(finished):
    summary, lines, _ = finished
    assert summary["complete"]
    assert list(summary["policies"]) == ["ast", "full", "random", "short"]
    assert set(summary["references"]) == {"untrained", "linear probe"}
    assert summary["references"]["linear probe"]["accuracy"] > 80
    assert summary["measured"]["accuracy_minus_short"] == pytest.approx(
        summary["policies"]["ast"]["final_accuracy"] - summary["policies"]["short"]["final_accuracy"]
    )
    text = "\n".join(lines)
    for words in ("linear probe: ", "untrained: ", "plain training of as few epochs", "--profile accuracy"):
        assert words in text or words == "--profile accuracy"


def test_short_costs_what_ast_cost_to_within_half_an_epoch(finished):
    policies = finished[0]["policies"]
    n = policies["full"]["candidates"] / 8
    assert abs(policies["short"]["activated"] - policies["ast"]["activated"]) <= n / 2 + 2
    assert policies["short"]["activation_rate"] > 0.99, "all but the unreadable image"


def test_an_unreadable_image_is_skipped_counted_and_listed(finished):
    summary, lines, folder = finished
    listed = (folder / "out" / "skipped_images.txt").read_text().splitlines()
    assert len(listed) == 1 == summary["skipped_images"]
    assert "000.png" in listed[0]
    assert any("skipped_images.txt" in line for line in lines)


def test_a_resumed_run_computes_a_lost_reference_again(finished, imagenet, tmp_path):
    _, _, folder = finished
    shutil.copytree(folder / "out", tmp_path / "out")
    checkpoints = sorted((tmp_path / "out" / "checkpoints").glob("*.ckpt"))
    checkpoints[-1].unlink()  # the newest holds both references, the one before it one
    whole = json.loads((tmp_path / "out" / "summary.json").read_text())
    (tmp_path / "out" / "summary.json").write_text(json.dumps(whole | {"complete": False}))
    settings = imagenet.Settings(out=str(tmp_path / "out"), resume=True, data_dir=str(folder))
    again = imagenet.run(settings, say=lambda line: None)
    assert again["complete"]
    assert again["references"]["linear probe"]["accuracy"] == whole["references"]["linear probe"]["accuracy"]
    assert again["policies"]["ast"]["accuracy_per_seed"] == whole["policies"]["ast"]["accuracy_per_seed"]


@pytest.mark.parametrize("gate", ["remembered", "live"])
def test_stopped_in_mid_epoch_and_resumed_ends_with_the_same_bits(imagenet, colours, tmp_path, gate):
    """Crops come from threads that work ahead; what was decoded and not trained on must come again."""

    def run(out, controls=None, listeners=(), **values):
        settings = imagenet.Settings(
            data=str(colours), weights="none", model="squeezenet1_1", image_size=32, epochs=5, batch_size=8,
            compare="none", out=str(tmp_path / out), gate=gate, ema=0.9, device="cpu", data_dir=str(tmp_path),
            **values,
        )  # fmt: skip
        return imagenet.run(settings, listeners=listeners, controls=controls, say=lambda line: None)

    whole = run("whole")
    controls, chunks = imagenet.Controls(), itertools.count()

    def stop(event, data):
        if event == "chunk" and next(chunks) == 25:
            controls.ask_stop("a test")

    assert not run("stopped", controls, [stop])["complete"]
    resumed = run("stopped", resume=True, workers=1)
    assert resumed["complete"]
    ours, theirs = (
        torch.load(tmp_path / out / "model.pt", weights_only=True) for out in ("stopped", "whole")
    )
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    assert resumed["policies"]["ast"]["accuracy_per_seed"] == whole["policies"]["ast"]["accuracy_per_seed"]


@pytest.fixture
def alone(tmp_path):
    """Runs the program as a user would: copied alone into an empty folder, isolated from all else."""
    (tmp_path / "imagenet100_ast.py").write_bytes((ROOT / "standalone" / "imagenet100_ast.py").read_bytes())

    def call(*flags):
        command = [sys.executable, "-I", "imagenet100_ast.py", *map(str, flags)]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)

    return call


def test_without_data_it_names_every_place_and_both_ways_and_exits_with_2(alone, tmp_path):
    done = alone()
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    for words in ("data", "/kaggle/input", "ambityga/imagenet100", "data_setup imagenet100 make"):
        assert words in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["imagenet100_ast.py"], "and leaves nothing behind"


@pytest.mark.slow
def test_it_runs_alone_on_kaggles_layout(alone, tmp_path):
    if not REAL_IMAGENET.exists():
        pytest.skip(f"no small ImageNet-100 at {REAL_IMAGENET}")
    small = {
        "--train-size": 400,
        "--image-size": 64,
        "--epochs": 2,
        "--batch-size": 32,
        "--model": "resnet18",
    }
    flags = [text for pair in small.items() for text in pair]
    done = alone("--data", REAL_IMAGENET, "--weights", "none", "--compare", "none", *flags)
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "runs" / "imagenet100_ast" / "summary.json").read_text())
    assert summary["complete"]
    assert not summary["synthetic"]
    assert (summary["n_train"], summary["n_val"], summary["skipped_images"]) == (400, 5000, 0)
    assert "of 100 classes" in done.stdout
    rows = (tmp_path / "runs" / "imagenet100_ast" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["activated"] for row in rows] == [400, 160]
    assert all(0 <= json.loads(row)["data_wait_percent"] <= 100 for row in rows)


# --- a network from another library ---


def test_a_network_from_another_library_trains(imagenet):
    import timm

    torch.manual_seed(0)
    model = timm.create_model("test_vit", num_classes=4, img_size=32)
    data = photographs(imagenet, n=160)
    settings = settled(imagenet, batch_size=16)
    trainer = imagenet.AdaptiveSparseTrainer(
        model,
        *imagenet.sources(settings, data, torch.device("cpu")),
        {"target_activation": 0.4, "amp": "off", "batch_size": 16, "device": "cpu"},
        torch.optim.AdamW(model.parameters(), lr=2e-3),
        listeners=[],
    )
    results = trainer.train(epochs=12)
    assert results["final_accuracy"] > 80
    assert results["activation_rate"] < 0.8
