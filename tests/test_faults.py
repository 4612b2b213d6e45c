"""The faults that tests/faults.py tries one by one, which takes minutes, still apply."""

import faults
import pytest
from conftest import ROOT

ALL = faults.read()  # which fails unless their tests are there


def test_there_are_sixty_with_names_of_their_own():
    assert len({fault.name for fault in ALL}) == len(ALL) == 60


@pytest.mark.parametrize("program", ["cifar10_ast.py", "imagenet100_ast.py"])
def test_every_fault_applies_to_its_program_and_compiles(program):
    whole = (ROOT / "standalone" / program).read_text(encoding="utf-8")
    text, gone = whole, []
    for fault in (fault for fault in ALL if fault.program == program):
        assert fault.new not in (fault.old, "")
        try:
            fault.into(whole)
            text = fault.into(text)
        except ValueError as error:
            gone.append(f"{fault.name}: {error}")
    assert not gone, "\n".join(gone)
    compile(text, program, "exec")
