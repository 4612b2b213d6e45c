"""The model of a run in use: what `model.pt` holds, pictures and their classes, and what goes wrong."""

import csv
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import IPython.display
import numpy as np
import pytest
import torch
from conftest import ROOT, summary, write_images
from PIL import Image

PROGRAMS = ("cifar10_ast", "imagenet100_ast")
FLAGS = {"cifar10_ast": "--lr 0.02", "imagenet100_ast": "--model resnet18 --weights none --image-size 32"}
KEYS = "program model classes image_size mean std state_dict".split()


@pytest.fixture(params=PROGRAMS)
def program(request):
    return request.getfixturevalue(request.param.partition("1")[0].removesuffix("_ast"))


def settings_of(program, out, **values):
    named = {"cifar10_ast": {}, "imagenet100_ast": {"model": "resnet18", "image_size": 32, "weights": "none"}}
    values = {"device": "cpu", "amp": "off", "out": str(out), **named[program.PROGRAM], **values}
    return program.fill_defaults(program.Settings(**values))


@pytest.fixture
def trained(program, tmp_path, monkeypatch):
    """The settings of a run that has left its model, of three classes, in the folder that one stands in."""
    monkeypatch.chdir(tmp_path)
    settings = settings_of(program, tmp_path / "out")
    torch.manual_seed(0)
    model = program.build_model(settings, SimpleNamespace(classes=CLASSES))
    program.write_by(
        tmp_path / "out" / "model.pt",
        lambda file: torch.save(program.portable(settings, CLASSES, model), file),
    )
    return settings


CLASSES = ["ant", "bee, or wasp", 'c"ow']


def table(path):
    with open(path, newline="", encoding="utf-8") as file:
        head, *rows = csv.reader(file)
    assert head == ["file", "class", "probability"]
    return rows


@pytest.mark.slow
@pytest.mark.parametrize("name", PROGRAMS)
def test_a_run_leaves_a_model_that_another_process_uses_without_the_data(name, tmp_path):
    """The table is right as often as the run's last evaluation; one picture alone has the same class."""

    def call(*flags):
        own = [*FLAGS[name].split(), "--amp", "off", "--device", "cpu", "--out", "out"]
        command = [sys.executable, "-I", "-B", f"{name}.py", *map(str, flags), *own]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    shutil.copy(ROOT / "standalone" / f"{name}.py", tmp_path)
    write_images(tmp_path / "data", train=24, test=12)
    call("--data", "data", "--epochs", 2, "--compare", "none", "--batch-size", 8)
    shutil.move(tmp_path / "data" / "test", tmp_path / "pictures")
    shutil.rmtree(tmp_path / "data")
    assert "36 of 36 files: out/predictions.csv" in call("--predict", "pictures")
    rows = table(tmp_path / "out" / "predictions.csv")
    right = [file.partition("/")[0] == label for file, label, _ in rows]
    accuracy = summary(tmp_path / "out")["policies"]["ast"]["final_accuracy"]
    assert (len(right), 100 * sum(right) / 36) == (36, pytest.approx(accuracy))
    lines = call("--predict", "pictures/bee/3.png").splitlines()
    ((label, chance),) = [row[1:] for row in rows if row[0] == "bee/3.png"]
    assert [line.split(" %  ")[1] for line in lines[:1]] == [label]
    shares = [float(line.split(" %")[0]) for line in lines]
    assert shares == sorted(shares, reverse=True)
    assert (shares[0], sum(shares)) == (
        pytest.approx(100 * float(chance), abs=0.06),
        pytest.approx(100, abs=0.2),
    )


def test_the_file_tells_all_that_another_program_needs(program, trained, tmp_path):
    saved = torch.load(tmp_path / "out" / "model.pt", weights_only=True)
    assert list(saved) == KEYS
    assert saved["program"] == program.PROGRAM
    assert (saved["model"], saved["classes"], saved["image_size"]) == (trained.model, CLASSES, 32)
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    mean, std = (torch.tensor(saved[key]) for key in ("mean", "std"))
    view = ((torch.tensor(pixels) - mean) / std).permute(2, 0, 1)
    assert torch.allclose(view, program.plain_view(torch.tensor(pixels)[None], None)[0], atol=1e-5)


@pytest.mark.parametrize("name", ["resnet18", "googlenet"])
def test_a_model_comes_back_as_it_was_and_is_taken_as_weights(imagenet, tmp_path, name):
    settings, side = settings_of(imagenet, tmp_path, model=name, image_size=64), 64
    torch.manual_seed(3)
    torch.save(imagenet.bare_model(name, 1000, side).state_dict(), tmp_path / "theirs.pt")
    settings.weights = str(tmp_path / "theirs.pt")
    model = imagenet.build_model(settings, 3).eval()
    torch.save(imagenet.portable(settings, CLASSES, model), tmp_path / "model.pt")
    settings.weights = str(tmp_path / "model.pt")
    views = torch.randn(2, 3, side, side)
    for other in (imagenet.load_model(settings)[0], imagenet.build_model(settings, 3).eval()):
        assert torch.allclose(other(views), model(views), atol=1e-4)


WRONG = {  # what is made of the content of model.pt, and what is said of it
    "of the other program": (lambda saved: saved | {"program": "other_ast"}, "written by other_ast"),
    "bare": (lambda saved: saved["state_dict"], "written by another program"),
    "no dict": (lambda saved: [1, 2], "expected program, model, classes"),
    "no classes": (lambda saved: {k: v for k, v in saved.items() if k != "classes"}, "'classes'"),
    "of fewer classes": (lambda saved: saved | {"classes": CLASSES[:2]}, "Error(s) in loading state_dict"),
    "of an unknown network": (lambda saved: saved | {"model": "vgg5O"}, "vgg5O"),
    "with code": (lambda saved: saved | {"std": SimpleNamespace()}, "SimpleNamespace"),
}


@pytest.mark.parametrize("kind", [*WRONG, "absent", "cut off"])
def test_a_model_that_cannot_be_used_is_refused_in_one_sentence(program, trained, tmp_path, kind):
    path = tmp_path / "out" / "model.pt"
    change, told = WRONG.get(kind, (lambda saved: saved, ""))
    torch.save(change(torch.load(path, weights_only=True)), path)
    if kind == "absent":
        path.unlink()
    elif kind == "cut off":
        path.write_bytes(path.read_bytes()[:5000])
    Image.new("RGB", (40, 30)).save(tmp_path / "photo.jpg")
    with pytest.raises(
        program.BadInput, match=r"^[^\n]+model\.pt: [^\n]+; expected program[^\n]+ --out$"
    ) as error:
        program.predict("photo.jpg", chosen=trained)
    assert told in str(error.value)


def test_one_picture_is_shown_in_a_notebook_with_its_five_likeliest_classes(
    program, trained, tmp_path, monkeypatch, capsys
):
    shown = []
    monkeypatch.setattr(program, "settings", trained)
    monkeypatch.setattr(program, "kernel", object)
    monkeypatch.setattr(IPython.display, "display", shown.append)
    program.predict("")
    assert "no picture" in capsys.readouterr().out
    Image.new("L", (40, 30), 200).save(tmp_path / "photo.png")
    program.predict("photo.png")
    (picture,) = shown
    assert np.asarray(picture).shape == (224, 224, 3)
    assert np.abs(np.asarray(picture) - 200.0).max() < 2
    assert sorted(line.split(" %  ")[1] for line in capsys.readouterr().out.splitlines()) == sorted(CLASSES)


def pictures(folder, names):
    folder.mkdir(parents=True)
    for number, name in enumerate(names):
        Image.new("RGB", (40 + number, 30), (9 * number, 90, 255)).save(folder / name)


def test_folders_and_several_paths_give_a_table_and_what_cannot_be_read_is_said(
    program, trained, tmp_path, capsys
):
    pictures(tmp_path / "a" / "deep", ["1.png", "2.jpg"])
    pictures(tmp_path / "b", ["1.png", ".hidden.png"])
    (tmp_path / "a" / "notes.txt").write_text("no picture")
    program.predict("a", chosen=trained)
    out, err = capsys.readouterr()
    assert out == f"2 of 3 files: {tmp_path / 'out' / 'predictions.csv'}\n"
    assert err.startswith("left out: a/notes.txt: ")
    assert len(err.splitlines()) == 1
    first = table(tmp_path / "out" / "predictions.csv")
    assert [row[0] for row in first] == ["deep/1.png", "deep/2.jpg"]
    assert {row[1] for row in first} <= set(CLASSES)
    assert all(1 / 3 <= float(row[2]) <= 1 for row in first)
    program.predict("a/deep", "b", "a/deep/2.jpg", chosen=trained)
    second = table(tmp_path / "out" / "predictions.csv")
    assert [row[0] for row in second] == ["a/deep/1.png", "a/deep/2.jpg", "b/1.png", "a/deep/2.jpg"]
    assert [row[1:] for row in second[:2]] == [row[1:] for row in first]


def test_where_the_run_cannot_be_written_the_table_lies_where_one_stands(
    program, trained, tmp_path, monkeypatch
):
    pictures(tmp_path / "a", ["1.png"])
    monkeypatch.setattr(program.os, "access", lambda path, mode: str(path) != trained.out)
    program.predict("a", chosen=trained)
    assert len(table(tmp_path / "predictions.csv")) == 1
    assert not (tmp_path / "out" / "predictions.csv").exists()


@pytest.mark.parametrize(
    "named", ["absent.jpg", "text.jpg", "empty folder", "folder of text", "pictures.zip"]
)
def test_what_holds_no_picture_is_refused_in_one_sentence(program, trained, tmp_path, named):
    (tmp_path / "empty folder").mkdir()
    (tmp_path / "folder of text").mkdir()
    for name in ("text.jpg", "folder of text/1.jpg", "pictures.zip"):
        (tmp_path / name).write_text("no picture")
    with pytest.raises(program.BadInput, match=rf"^{named}[^\n]*: [^\n]+; expected a picture, or a folder"):
        program.predict(named, chosen=trained)
    assert not (tmp_path / "out" / "predictions.csv").exists()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no pipes among its files")
def test_what_files_say_is_printed_as_text_and_a_pipe_is_not_waited_for(program, trained, tmp_path, capsys):
    escaped = program.printable(odd := "\x1b[31mred\u202e\n")
    saved = torch.load(tmp_path / "out" / "model.pt", weights_only=True)
    torch.save(saved | {"classes": [odd, "b", "c"]}, tmp_path / "out" / "model.pt")
    pictures(tmp_path / "a", [f"{odd}.png"])
    os.mkfifo(tmp_path / "a" / f"{odd}.jpg")
    program.predict("a", chosen=trained)
    out, err = capsys.readouterr()
    assert out.startswith("1 of 2 files: ")
    assert err == f"left out: a/{escaped}.jpg: a pipe, a socket or a device, not a file\n"
    assert table(tmp_path / "out" / "predictions.csv")[0][0] == f"{odd}.png", "a program finds it by this"
    program.predict(f"a/{odd}.png", chosen=trained)
    assert escaped in capsys.readouterr().out
    with pytest.raises(program.BadInput, match="a pipe, a socket or a device"):
        program.predict(f"a/{odd}.jpg", chosen=trained)


def test_stopped_it_writes_what_it_has(program, trained, tmp_path, monkeypatch, capsys):
    pictures(tmp_path / "a", [f"{number}.png" for number in range(5)])
    controls, read = program.Controls(), program.read_view

    def stop(raw, side):
        controls.ask_stop("a test")
        return read(raw, side)

    monkeypatch.setattr(program, "read_view", stop)
    program.predict("a", chosen=trained, controls=controls)
    assert capsys.readouterr().out.startswith("1 of 5 files: ")
    assert len(table(tmp_path / "out" / "predictions.csv")) == 1


def test_the_images_shown_are_those_of_their_captions_where_some_cannot_be_read(
    imagenet, tmp_path, monkeypatch
):
    write_images(tmp_path / "data", train=2, test=70)
    (tmp_path / "data" / "test" / "ant" / "0.png").write_text("no picture")
    settings = settings_of(imagenet, tmp_path / "out", data=str(tmp_path / "data"), batch_size=16)
    data, shown = imagenet.load_data(settings, print), {}
    torch.manual_seed(1)
    model = imagenet.build_model(settings, data).eval()
    saved = imagenet.portable(settings, data.classes, model)
    imagenet.write_by(tmp_path / "out" / "model.pt", lambda file: torch.save(saved, file))
    monkeypatch.setattr(imagenet, "show_classes", lambda *rest: None)
    monkeypatch.setattr(imagenet, "mean_times", lambda *rest: None)
    monkeypatch.setattr(imagenet, "show_images", shown.update)
    imagenet.show_mistakes(settings, data)
    for pictures, captions, _ in shown.values():
        colours = pictures.mean((1, 2)).argmax(1)
        assert [data.classes[colour] for colour in colours] == [text.split("\n")[0] for text in captions]
    source = imagenet.sources(settings, data, torch.device("cpu"))[1]
    single = [(torch.tensor([index]), torch.ones(1)) for index in range(len(source))]
    batches = [batch for batch in source.stream(single) if len(batch)]
    with torch.no_grad():
        chances = [float(model(batch.images).softmax(1)[0, batch.labels[0]]) for batch in batches]
    hardest = int(batches[int(np.argmin(chances))].indices)
    lowest = next(iter(shown.values()))[0]
    assert (lowest[0] == data.val_images[hardest]).all()


def test_what_the_model_gets_wrong_is_counted_and_shown(program, trained, tmp_path, monkeypatch):
    shown, data = [], program.shapes(40, 60)
    settings = settings_of(program, tmp_path / "shapes", batch_size=16)
    with pytest.raises(program.BadInput, match="expected a model of the data's 10 classes"):
        program.show_mistakes(trained, data)
    torch.manual_seed(1)
    model = program.build_model(settings, data).eval()
    saved = program.portable(settings, data.classes, model)
    program.write_by(tmp_path / "shapes" / "model.pt", lambda file: torch.save(saved, file))
    monkeypatch.setattr(IPython.display, "display", shown.append)
    times, told, draw = np.arange(40) % 7, [], program.show_classes
    np.savez(tmp_path / "shapes" / "samples.npz", times_activated=times)
    monkeypatch.setattr(program, "show_classes", lambda *what: told.append(what) or draw(*what))
    program.show_mistakes(settings, data)
    assert len(shown) == 2
    source = program.sources(settings, data, torch.device("cpu"))[1]
    with torch.no_grad():
        parts = [(labels, model(views).argmax(1)) for views, labels in source.in_order()]
    labels, found = (torch.cat(part) for part in zip(*parts, strict=True))
    [(told_labels, told_found, names, told_times)] = told
    assert torch.equal(torch.tensor(told_labels), labels) and torch.equal(torch.tensor(told_found), found)
    assert names == data.classes
    assert list(told_times) == [times[data.train_labels == label].mean() for label in range(10)]


@pytest.mark.parametrize("synthetic", [False, True])
def test_a_model_of_drawn_images_is_called_so_wherever_it_predicts(
    program, trained, tmp_path, capsys, synthetic
):
    picture = tmp_path / "photo.png"
    Image.new("RGB", (40, 40)).save(picture)
    path = Path(trained.out) / "model.pt"
    before = torch.load(path, weights_only=True)
    torch.save(before | {"synthetic": synthetic}, path)
    program.predict(str(picture), chosen=trained)
    torch.save(before, path)
    assert ("SYNTHETIC" in capsys.readouterr().out) == synthetic
