"""What the documents say is what the program does and what was measured."""

import contextlib
import importlib
import re
import sys

import pytest
import torch
from conftest import ROOT

sys.path.insert(0, str(ROOT / "docs"))
import make_docs

README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("path", make_docs.derived(), ids=lambda path: path.name)
def test_derived_text_is_up_to_date(path):
    stale = f"{path.name} is stale: run python docs/make_docs.py, then python build_notebooks.py"
    assert path.read_text(encoding="utf-8") == make_docs.derived()[path], stale


def test_every_public_name_has_a_docstring(cifar, imagenet):
    for program, chapters in ((cifar, make_docs.CHAPTERS), (imagenet, make_docs.ON_IMAGES)):
        for name in [name for names in chapters.values() for name in names]:
            assert getattr(program, name).__doc__, name


@pytest.mark.parametrize("name", ["simple_cnn", "resnet"])
def test_a_model_states_its_size_as_it_is_counted(cifar, name):
    model, images = getattr(cifar, name)(10), torch.zeros(2, 3, 32, 32)
    stated = getattr(cifar, name).__doc__
    assert f"{sum(p.numel() for p in model.parameters()):,} parameters" in stated
    for training in (False, True):
        flops, _ = cifar.flops_per_sample(model, images, training, contextlib.nullcontext)
        assert f"{flops / 1e6:.1f}" in stated


@pytest.mark.parametrize("program", ["cifar10_ast", "imagenet100_ast"])
def test_every_setting_has_a_comment_and_a_row_in_the_readme(program):
    program = importlib.import_module(program)
    comments = program.field_comments()
    for field in program.fields(program.Settings):
        assert comments[field.name]
        assert f"| `{program.flag(field.name)}` |" in README


@pytest.mark.parametrize(
    "name", ["README.md", "docs/configuration.md", "docs/api.md", "docs/search.md", "docs/evidence.md"]
)
def test_links_and_pictures_inside_the_repository_resolve(name):
    path = ROOT / name
    for target in re.findall(r"\]\(([^)#:]+)\)", path.read_text(encoding="utf-8")):
        assert (path.parent / target).exists(), target


def test_the_readme_names_no_flag_that_is_not_there(cifar, imagenet):
    settings = [*cifar.fields(cifar.Settings), *imagenet.fields(imagenet.Settings)]
    known = {cifar.flag(field.name) for field in settings}
    known |= {"--no-feedforward", "--no-guard", "--no-probe", "--help", "--sync", "--check", "--kaggle"}
    known |= {"--to", "--side", "--from", "--classes", "--json", "--force"}  # of python -m data_setup
    used = set(re.findall(r"`[^`]*?(--[a-z][a-z-]+)", README))
    assert used <= known, used - known
