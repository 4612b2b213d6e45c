"""Fetch, make, check and pack the data sets that the programs train on; `python -m data_setup --help`."""


class BadInput(ValueError):
    """Something a person can mend, in one sentence."""

    def __init__(self, sentence: str):
        super().__init__(" ".join(sentence.splitlines()))
