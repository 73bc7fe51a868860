"""The table of what trol assumes of other libraries: `python -m trol.host.assumptions` prints it.

`tests/host/test_assumptions.py` looks all of it up, first of all tests; `trol.attach` what costs
next to nothing, once in a process; `trol info` shows it.
"""

from __future__ import annotations

import functools
from importlib.metadata import version

import torch

from trol.errors import HostError
from trol.host.assumptions.caches import CACHES
from trol.host.assumptions.libraries import LIBRARIES
from trol.host.assumptions.models import MODELS
from trol.host.assumptions.table import Assumption

ASSUMPTIONS: tuple[Assumption, ...] = (*MODELS.rows, *CACHES.rows, *LIBRARIES.rows)
"""All that is assumed, in the order in which it is looked up."""


def told(one: Assumption, found: str) -> str:
    """What is said of an assumption that fails."""
    return (
        f"trol assumes of transformers: {one.name!r}; with transformers {version('transformers')} "
        f"it found: {found}. Used by {one.used_by}."
    )


@functools.cache
def check_at_attach() -> None:
    """Looks up, once in a process, what costs next to nothing.

    Raises:
        HostError: something is not as assumed; the message names it and what was found.
    """
    for one in ASSUMPTIONS:
        with torch.device("cpu"):  # whatever device a model is being made on
            found = one.found() if one.at_attach else None
        if found is not None:
            raise HostError(f"{told(one, found)} `trol info` looks all assumptions up.")


def rendered() -> str:
    """The table as a page."""
    rows = [
        f"| {one.name} | {one.used_by} | {'attach, ' * one.at_attach}tests, `trol info` |"
        for one in ASSUMPTIONS
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
