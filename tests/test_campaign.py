"""The campaign of kills, signals and damage in short; `python tests/campaign.py` is the long one."""

import campaign
import pytest


@pytest.mark.slow
def test_nothing_is_lost_or_mixed_up():
    assert campaign.campaign(kills=2, signals=1, damages=2, programs=["cifar10_ast"]) == []
