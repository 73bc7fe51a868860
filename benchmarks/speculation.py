"""Lossless speed on trained decoders: the best draft found, and whether every token is the same.

    python benchmarks/speculation.py runs/full runs/layerskip > benchmarks/results/speculation.json

For each folder the draft is chosen on validation questions, and measured on 200 test questions,
one at a time and eight at once.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path
from typing import Any

import torch

from trol.cli.models import open_model
from trol.cli.provenance import run_record
from trol.evaluation.draft_plans import draft_plan, measured_speed
from trol.evaluation.tasks import task_of

TASK = "docstrings"
CALIBRATION, QUESTIONS = 32, 200
BATCHES = (1, 8)
ROUNDS = 3


def measured(folder: Path) -> dict[str, Any]:
    """The draft that was chosen for the model in `folder`, and what it gained."""
    model, tokenizer = open_model(folder)
    task = task_of(TASK)
    choice = draft_plan(model, tokenizer, task.items(CALIBRATION, 0, "validation"))
    found: dict[str, Any] = {
        "model": folder.name,
        "plan": str(choice.plan),
        "tokens": choice.tokens,
        "agreement": choice.agreement,
        "predicted": choice.predicted_speedup,
    }
    items = task.items(QUESTIONS, 0)
    for batch in BATCHES:
        plan, tokens = choice.plan, choice.tokens
        found[f"batch {batch}"] = measured_speed(
            model, tokenizer, items, plan, tokens, rounds=ROUNDS, batch=batch
        )
    return found


def main() -> None:
    """Prints one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", nargs="+", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    rows = [measured(folder) for folder in given.folders]
    record = {**run_record(), "command": shlex.join(["python", *sys.argv])}
    print(json.dumps({"rows": rows, "run": record}, indent=2))


if __name__ == "__main__":
    main()
