"""The program makes the choices, and computes the numbers, that golden.json records; see golden.py."""

import golden
import pytest

pytestmark = pytest.mark.filterwarnings("ignore:The image decoding and encoding capabilities")


def test_every_case_is_recorded():
    assert list(golden.load()["cases"]) == list(golden.NAMES)


@pytest.mark.parametrize("name", [*golden.CASES, pytest.param(golden.RUN, marks=pytest.mark.slow)])
def test_trains_as_recorded(cifar, name):
    # On another processor or torch, losses differ in their last digits, and after enough steps so may a
    # choice: there choices are compared up to the end of the first epoch with a gate, floats within 1e-3.
    record = golden.load()
    exact = record["machine"] == golden.machine()
    found = golden.play(cifar, name)
    assert golden.differences(record["cases"][name], found, exact) == []
