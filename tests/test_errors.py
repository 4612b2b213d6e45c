"""What a person can mend is told in one sentence, with exit status 2, and touches nothing."""

import ctypes
import errno
import math
import os
import signal
import sys
from dataclasses import asdict, fields, replace
from pathlib import Path

import pytest
from conftest import Script, files, write_images
from hypothesis import given, settings
from hypothesis import strategies as st

import cifar10_ast as ast

SMALL = "--data shapes --train-size 40 --batch-size 16 --epochs 2 --compare none --device cpu".split()


@pytest.fixture
def refused(tmp_path, monkeypatch, capfd, small_nets):
    """The one line that a refused call of the script leaves, run in a folder with an earlier run in it."""
    (tmp_path / "out" / "checkpoints").mkdir(parents=True)
    (tmp_path / "out" / "config.json").write_text('{"program": "cifar10_ast", "settings": {}}')
    (tmp_path / "out" / "model.pt").write_text("precious")
    monkeypatch.chdir(tmp_path)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}

    def call(*flags, touches=False, **env):
        for name, value in env.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(sys, "argv", ["cifar10_ast.py", *map(str, flags)])
        before = files(tmp_path)
        capfd.readouterr()
        code = ast.main()
        err = capfd.readouterr().err
        assert code == 2
        assert err.endswith("\n")
        assert len(err.splitlines()) == 1, err
        assert touches or files(tmp_path) == before
        return err

    call.folder = tmp_path
    yield call
    for number, handler in handlers.items():
        signal.signal(number, handler)


# --- settings ---


@pytest.mark.parametrize(
    "arguments,told",
    [
        (
            "--target-activation 1.4",
            "--target-activation 1.4: expected a number in (0, 1]: a*, fraction of the",
        ),
        ("--target-activation 0", "--target-activation 0"),
        ("--target-activation nan", "--target-activation nan: expected a number in (0, 1]"),
        ("--lr x", "--lr x: expected a number in (0, inf): peak learning rate; the model decides"),
        ("--lr inf", "--lr inf: expected a number"),
        ("--epochs 0", "--epochs 0: expected a whole number in [1, 100000]"),
        ("--epochs 1.5", "--epochs 1.5: expected a whole number"),
        ("--epochs 1e23", "--epochs 1e23: expected a whole number"),
        (f"--epochs {10**23}", f"--epochs {10**23}: expected a whole number in [1, 100000]"),
        (f"--warmup-epochs {10**23}", f"warm-up {10**23}, ramp 0, anneal 0: expected at most 2 epochs"),
        (f"--batch-size {10**23}", f"--batch-size {10**23}: expected a whole number in [1, 100000]"),
        ("--epochs", "--epochs: expected one argument; --help lists the flags"),
        ("--batch-size 0", "--batch-size 0"),
        ("--train-size -5", "--train-size -5"),
        ("--gate proxi", "--gate proxi: expected one of remembered, live, random, full"),
        ("--significance margin", "--significance margin: expected one of loss, loss+entropy"),
        ("--model vgg", "--model vgg: expected one of simple_cnn, resnet"),
        ("--compare full,ast", "--compare full,ast: expected"),
        ("--seeds 0,,1", "--seeds 0,,1: expected"),
        ("--seeds -1", "--seeds -1"),
        ("--amp fp8", "--amp fp8: expected one of auto, off, fp16, bf16"),
        ("--amp fp16 --device cpu", "--amp fp16: expected bf16, off or auto on a CPU"),
        ("--device tpu", "--device tpu: expected"),
        ("--device cuda:77", "--device cuda:77: expected a GPU"),
        ("--time-limit -1", "--time-limit -1.0: expected a number in [0, inf)"),
        ("--resume=yes", "--resume"),
        ("--epoch 3", "unrecognized arguments: --epoch 3; --help lists the flags"),
        ("--ema 0.99", "unrecognized arguments: --ema 0.99"),
        ("stray", "unrecognized arguments: stray"),
        ("--data no/such/place", "--data no/such/place: no whole cifar-10-batches-py"),
        ("--data shapes --train-size 3", "--train-size 3: expected 0 (6,000), or 10 to 200,000"),
        ("--train-size 99999999999", "--train-size 99999999999: expected 0 (6,000), or 10 to 200,000"),
        (
            "--epochs 2 --warmup-epochs 5 --data shapes",
            "warm-up 5, ramp 0, anneal 0: expected at most 2 epochs",
        ),
    ],
)
def test_a_bad_flag_is_one_line_with_the_value_and_what_was_expected(refused, arguments, told):
    assert told in refused(*SMALL, "--out", "out", *arguments.split())


@pytest.mark.parametrize(
    "variable,text,told",
    [
        ("AST_TARGET_ACTIVATIO", "0.3", "AST_TARGET_ACTIVATIO=0.3: expected AST_ and the name of a setting"),
        ("AST_", "3", "AST_=3: expected"),
        ("AST_EPOCHS", "ten", "AST_EPOCHS= ten: expected a whole number in [1, 100000]"),
        ("AST_RESUME", "maybe", "AST_RESUME= maybe: expected 1 or 0"),
    ],
)
def test_a_bad_variable_is_one_line(refused, variable, text, told):
    assert told in refused("--out", "out", **{variable: text})


def test_a_flag_beats_a_variable_beats_the_cell_beats_the_default():
    cell = replace(ast.Settings(), epochs=7, batch_size=16, lr=0.5)
    environment = {"AST_EPOCHS": "8", "AST_BATCH_SIZE": "32", "PATH": "x", "NOT_AST_EPOCHS": "5"}
    found = ast.parse(cell, ["--epochs", "9"], environment)
    assert (found.epochs, found.batch_size, found.lr, found.target_activation) == (9, 32, 0.5, 0.4)
    assert (cell.epochs, cell.batch_size) == (7, 16)


READ = {"target_activation": "0.25", "epochs": "12", "data": "some/path", "compare": "none", "seeds": "0,1,2"}
READ |= {"lr": "1e-3", "out": "there", "time_limit": "30", "device": "cuda:1"}
VALUES = {"target_activation": 0.25, "epochs": 12, "lr": 0.001, "time_limit": 30.0}


@pytest.mark.parametrize(
    "name,text,value",
    [(name, text, VALUES.get(name, text)) for name, text in READ.items()]
    + [("epochs", text, None) for text in ("auto", "none", "")],
)  # fmt: skip
def test_flags_and_variables_are_read_alike(name, text, value):
    by_flag = ast.parse(ast.Settings(), [f"{ast.flag(name)}={text}"], {})
    by_variable = ast.parse(ast.Settings(), [], {"AST_" + name.upper(): text})
    assert getattr(by_flag, name) == value
    assert by_flag == by_variable == replace(ast.Settings(), **{name: value})


def test_switches_have_a_no():
    assert not ast.parse(ast.Settings(), ["--no-feedforward"], {}).feedforward
    assert ast.parse(ast.Settings(), ["--resume"], {}).resume
    assert not ast.parse(ast.Settings(), ["--no-resume"], {"AST_RESUME": "1"}).resume
    for text, value in [("1", True), ("true", True), ("TRUE", True), ("0", False), ("False", False)]:
        assert ast.parse(ast.Settings(), [], {"AST_RESUME": text}).resume is value


NAMES = st.sampled_from([item.name for item in fields(ast.Settings)])
TEXTS = st.one_of(
    st.text(max_size=30),
    st.integers().map(str),
    st.floats().map(str),
    st.from_regex(r"-?-?[a-z0-9,.=-]{0,8}", fullmatch=True),
).filter(lambda text: text not in ("-h", "--help", "--h"))


@given(name=NAMES, text=TEXTS, how=st.sampled_from(["a flag", "a flag with =", "a variable"]))
@settings(deadline=None, max_examples=300)
def test_any_text_for_any_setting_is_read_or_refused_in_one_line(name, text, how):
    flags = {"a flag": [ast.flag(name), text], "a flag with =": [f"{ast.flag(name)}={text}"]}.get(how, [])
    variables = {} if flags else {f"AST_{name.upper()}": text}
    try:
        found = ast.parse(ast.Settings(), flags, variables)
    except ast.BadInput as refusal:
        assert len(str(refusal).splitlines()) == 1
    else:
        defaults = asdict(ast.Settings())
        others = {n: v for n, v in asdict(found).items() if v != defaults[n] and n != name}
        assert not others or others.keys() == {"resume"}
        value = getattr(found, name)
        assert not isinstance(value, float) or math.isfinite(value)


# --- data ---


def unreadable_images(folder):
    (write_images(folder / "data") / "train" / "ant" / "0.png").write_bytes(b"no image")
    (folder / "data" / "train" / "ant" / "1.png").write_bytes(b"no image")
    return "data", "2 of 150 images are unreadable, expected at most 1 %"


def an_empty_class(folder):
    for path in (write_images(folder / "data") / "train" / "bee").iterdir():
        path.unlink()
    return "data", "only in train or only in val: bee; expected"


@pytest.mark.parametrize("prepare", [unreadable_images, an_empty_class])
def test_bad_data_is_one_line(refused, prepare):
    data, told = prepare(refused.folder)
    assert told in refused("--data", data, "--out", "out", "--epochs", 1)


# --- folders and disks ---


@pytest.mark.parametrize("out", ["file", "file/under", "file/under/more", "out/model.pt/x"])
def test_a_folder_that_cannot_be_made_is_one_line(refused, out):
    (refused.folder / "file").write_text("mine")
    assert refused(*SMALL, "--out", out).startswith(f"--out {out}: expected a folder that can be written")


def bound_by_permissions():
    """Takes from root what lets it write anywhere; others are bound already, and cannot drop it."""
    drop_from_bounding_set, dac_override = 24, 1
    ctypes.CDLL(None).prctl(drop_from_bounding_set, dac_override, 0, 0, 0)


@pytest.mark.skipif(sys.platform != "linux", reason="drops root's powers the way Linux does")
def test_a_run_in_a_read_only_folder_is_neither_renamed_nor_touched(tmp_path):
    locked, script = tmp_path / "locked", Script(tmp_path)
    (locked / "out").mkdir(parents=True)
    (locked / "out" / "config.json").write_text('{"program": "cifar10_ast"}')
    before = files(locked)
    locked.chmod(0o555)
    try:
        done = script(*SMALL, "--out", "locked/out", check=2, preexec_fn=bound_by_permissions)
    finally:
        locked.chmod(0o755)
    [line] = done.stderr.splitlines()
    assert "policy" not in done.stdout, "refused before anything is trained"
    assert line.startswith("--out locked/out: expected a folder that can be written")
    assert files(locked) == before


@pytest.mark.parametrize(
    "name",
    "config.json 000000.ckpt metrics.jsonl events.jsonl model.pt samples.npz summary.json curves.png".split(),
)
def test_a_disk_that_is_full_is_one_line_that_names_the_file_and_leaves_no_half_of_it(
    refused, monkeypatch, name
):
    replace_file = os.replace

    def full(draft, path):
        if Path(path).name == name:
            raise OSError(errno.ENOSPC, "No space left on device")
        replace_file(draft, path)

    monkeypatch.setattr(os, "replace", full)
    err = refused(*SMALL, "--out", "new", touches=True)
    assert f"{name}: expected a folder with room to write in (No space left on device)" in err
    assert "--out" in err
    assert not list(refused.folder.rglob("*.part"))
    assert not list(refused.folder.rglob(f"new/**/{name}"))


# --- from Python ---


def test_from_python_it_is_an_exception_of_one_line_and_never_an_exit(tmp_path):
    bad = replace(ast.Settings(), data=str(tmp_path / "nowhere"), out=str(tmp_path / "out"), device="cpu")
    for call in (ast.run, ast.prepare):
        with pytest.raises(ast.BadInput, match=r"^--data [^\n]+$"):
            call(bad)
    with pytest.raises(ast.BadInput, match=r"^epochs = 0: expected a whole number[^\n]+$"):
        ast.run(replace(bad, epochs=0))
    assert str(ast.BadInput("two\nlines")) == "two lines"
    assert issubclass(ast.BadInput, ValueError)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [FileExistsError, PermissionError])
def test_a_mount_that_renames_over_nothing_gets_the_new_file(tmp_path, monkeypatch, error):
    def replace(draft, path):
        if path.exists():
            raise error("no rename over an existing file")
        os.rename(draft, path)

    monkeypatch.setattr(ast.os, "replace", replace)
    for content in (b"first", b"second"):
        ast.write_whole(tmp_path / "file", content)
        assert files(tmp_path) == {"file": content}
