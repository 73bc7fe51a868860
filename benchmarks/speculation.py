"""Lossless speed on trained decoders: the best draft found, and whether every token is the same.

    python benchmarks/speculation.py runs/full runs/layerskip > benchmarks/results/speculation.json

For each folder the draft is chosen on validation questions, and measured on 200 test questions,
one at a time and eight at once. `ceiling` is what the loop gains where the draft is always right:
a Llama of hidden size 512 and 12 layers, of which those from the fourth on do next to nothing.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import torch

from trol.bench.setting import Setting, idle_host, working_layers
from trol.cli.models import open_model
from trol.cli.terminal import run_record
from trol.evaluation.draft_search import draft_plan
from trol.evaluation.tasks import task_of
from trol.evaluation.timing import interleaved, measured_speed, ratio_and_spread
from trol.speculation import speculate

TASK = "docstrings"
CALIBRATION, QUESTIONS = 32, 200
BATCHES = (1, 8)
ROUNDS = 3

DRAFTED, NEW_TOKENS = (2, 4, 6), 64
"""Of the ceiling: tokens drafted a round, tokens of an answer."""


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


@torch.no_grad()
def ceiling() -> list[dict[str, Any]]:
    """What drafts of a quarter of the layers gain where they are right."""
    model = idle_host(Setting())
    ids = torch.randint(3, model.config.vocab_size, (1, 32))
    return [gained(model, ids, tokens) for tokens in DRAFTED]


def gained(model: Any, ids: Any, tokens: int) -> dict[str, Any]:
    """What drafting `tokens` tokens a round gains on one prompt."""
    given: dict[str, Any] = {}
    lengths = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS}

    def timed(name: str) -> float:
        began = time.perf_counter()
        given[name] = model.generate(ids, pad_token_id=0, do_sample=False, **lengths)
        return time.perf_counter() - began

    def drafted() -> float:
        with speculate(model, f"exit@{working_layers(Setting())}", tokens=tokens) as given[
            "figures"
        ]:
            return timed("drafted")

    times = interleaved({"plain": lambda: timed("plain"), "drafted": drafted}, rounds=5)
    ratio, spread = ratio_and_spread(times["drafted"], times["plain"])
    return {
        "tokens": tokens,
        "ratio": ratio,
        "spread": spread,
        "identical": torch.equal(given["plain"], given["drafted"]),
        "acceptance": given["figures"].acceptance,
    }


def main() -> None:
    """Prints one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", nargs="*", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    found = {"ceiling": ceiling(), "rows": [measured(folder) for folder in given.folders]}
    record = {**run_record(), "command": shlex.join(["python", *sys.argv])}
    print(json.dumps({**found, "run": record}, indent=2))


if __name__ == "__main__":
    main()
