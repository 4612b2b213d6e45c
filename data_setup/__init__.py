"""Fetch, make, check and pack the data sets that the programs in standalone/ train on.

`python -m data_setup --help` shows the commands. `imagenet100 make` needs no torch; the others list, decode
and download with the programs' own cells, so that training sees the very same index and pixels.
"""

VERSION = "1.0"


class BadInput(ValueError):
    """Something a person can mend, in one sentence; the programs' own class of this name means the same."""

    def __init__(self, sentence: str):
        super().__init__(" ".join(str(sentence).splitlines()))
