"""Runs the `trol` command in this process."""

import pytest

from trol.cli import main


def run(*words: object) -> int:
    """The exit code of `trol WORDS...`."""
    with pytest.raises(SystemExit) as left:
        main([str(word) for word in words])
    return left.value.code
