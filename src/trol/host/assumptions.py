"""The table of what trol assumes of other libraries: `python -m trol.host.assumptions` prints it.

`tests/host/test_assumptions.py` looks up every row, before all other tests, and `trol info` shows
every row; `trol.attach` looks up those that cost next to nothing, once in a process.
"""

import functools
from importlib.metadata import version

import torch

from trol.errors import HostError
from trol.host.assumptions_of_libraries import LIBRARIES
from trol.host.assumptions_of_models import MODELS
from trol.host.trial import Assumption

ASSUMPTIONS: tuple[Assumption, ...] = (*MODELS, *LIBRARIES)
"""All rows, in the order in which they are looked up."""


def failure(row: Assumption, finding: str) -> str:
    """The message for an assumption that does not hold."""
    return (
        f"trol assumes of transformers: {row.name!r}; with transformers {version('transformers')} "
        f"it found: {finding}. Used by {row.used_by}."
    )


@functools.cache
def check_at_attach() -> None:
    """Looks up, once in a process, the rows that cost next to nothing.

    Raises:
        HostError: an assumption does not hold; the message names it and what is the case instead.
    """
    for row in ASSUMPTIONS:
        with torch.device("cpu"):  # whatever device a model is being made on
            finding = row.finding() if row.at_attach else None
        if finding is not None:
            raise HostError(f"{failure(row, finding)} `trol info` looks all assumptions up.")


def page() -> str:
    """The table as a page of Markdown."""
    rows = [
        f"| {row.name} | {row.used_by} | {'attach, ' * row.at_attach}tests, `trol info` |"
        for row in ASSUMPTIONS
    ]
    head = (
        "# What trol assumes of transformers, torch, PEFT, accelerate and bitsandbytes",
        "",
        "Written by `python -m trol.host.assumptions`. Each row is looked up on the libraries that "
        "are installed; one that does not hold is named with what was found instead.",
        "",
        "| assumption | used by | looked up by |",
        "|---|---|---|",
    )
    return "\n".join([*head, *rows]) + "\n"


if __name__ == "__main__":
    print(page(), end="")
