"""`python -m tests.golden DIR`: exit 0 where all agrees, 1 on any miss, 2 on no golden set."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers.utils import logging

from .models import check_model
from .sets import NotGolden, is_units
from .units import check_units


def main(arguments: Sequence[str]) -> int:
    """Checks one set, prints the table, returns the exit code."""
    torch.set_num_threads(1)
    if len(arguments) != 1:
        print(
            f"got {len(arguments)} arguments; give one folder: python -m tests.golden DIR",
            file=sys.stderr,
        )
        return 2
    folder = Path(arguments[0])
    try:
        report = check_units(folder) if is_units(folder) else check_model(folder)
    except NotGolden as error:
        print(error, file=sys.stderr)
        return 2
    print(*report.lines(), sep="\n")
    return 1 if report.missed else 0


if __name__ == "__main__":
    logging.disable_progress_bar()
    sys.exit(main(sys.argv[1:]))
