"""The faults that tests/faults.py tries one by one, which takes minutes, still apply."""

import faults
import pytest
from conftest import ROOT

ALL = faults.read()


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


def test_the_tests_that_are_to_catch_them_are_there():
    def there(file, _, name):
        found = (ROOT / file).read_text(encoding="utf-8") if (ROOT / file).exists() else ""
        return f"\ndef {name.partition('[')[0]}(" in found

    gone = [test for fault in ALL for test in fault.tests if not there(*test.partition("::"))]
    assert all(fault.tests for fault in ALL)
    assert not gone, "\n".join(gone)
