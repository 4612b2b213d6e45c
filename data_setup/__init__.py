"""Fetch, make, check and pack the data sets that the programs train on; `python -m data_setup --help`."""


class BadInput(ValueError):
    """Something a person can mend, in one sentence."""

    def __init__(self, sentence: str):
        super().__init__(printable(" ".join(sentence.splitlines())))


def printable(text: str) -> str:
    """A name from a file, with escapes for what is no text and for what a terminal would obey."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
