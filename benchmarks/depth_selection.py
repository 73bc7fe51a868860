"""The findings of Glavas et al. (arXiv 2410.20022) at tiny scale: several seeds, as found.

    python benchmarks/depth_selection.py runs/glavas --seeds 0 1 2 \
        > benchmarks/results/depth_selection.json

For each seed: a decoder of 12 layers learns the docstring set (recipes/glavas-tiny-full.yaml).
Skipping is compared with early exit at equal cost, before and after each was fine-tuned; the
controllers that read hidden states with those that read nothing; and the oracle with its controls
(`trol oracle`, one folder per seed). What lies finished in the folder is not done again.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shlex
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from trol.cli.models import open_model
from trol.cli.oracle import oracle
from trol.cli.terminal import run_record
from trol.depth import AbstractPolicy, attached, depth
from trol.depth.attachment import gates_of
from trol.depth.policy import Plain
from trol.evaluation.answers import losses, scores
from trol.evaluation.curve import Sample, answers_and_visits
from trol.evaluation.hidden_states import state_cosines
from trol.evaluation.tasks import task_of
from trol.files import write_json
from trol.policies.planned import Planned, static_plan
from trol.training import resolve, run

TASK = "docstrings"
QUESTIONS = 500
COMPARED = 64
LAYERS = 12
KEPT = (10, 8, 6, 4)
"""Layers that answers keep, before any fine-tuning."""

TUNED = {"skip": "uniform", "exit": "exit"}
CONTROLLED = ("hidden", "fixed")
MENU = 8


def trained(name: str, seed: int, folder: Path, start: Path | None = None) -> Path:
    """The folder of a carried recipe's run, which is made unless it is there."""
    out = folder / f"{name}-{seed}"
    if not (out / "training.json").is_file():
        recipe = resolve(f"glavas-tiny-{name}", [f"seed={seed}"])
        run(recipe, out, start=start, label=f"seed {seed}, {name}, ")
    return out


def measured(model: Any, tokenizer: Any, policy: AbstractPolicy) -> dict[str, float | None]:
    """ROUGE-L, loss, and layers visited per answer token under a policy."""
    task = task_of(TASK)
    sample = Sample(model, tokenizer, task, task.items(QUESTIONS, 0))
    with depth(model, policy):
        given, visits = answers_and_visits(sample, model)
        return {
            "rougeL": statistics.fmean(scores("rougeL", given, sample.items)),
            "loss": statistics.fmean(losses(model, tokenizer, sample.items)),
            "visits": visits,
        }


def skip_against_exit(seed: int, folder: Path) -> dict[str, Any]:
    """Experiment 1: quality and hidden states at equal cost, before and after fine-tuning."""
    full = folder / f"full-{seed}"
    model, tokenizer = open_model(full)
    found: dict[str, Any] = {"full": measured(model, tokenizer, Plain())}
    items = task_of(TASK).items(COMPARED, 0)
    for name, method in TUNED.items():
        for kept in KEPT:
            policy = Planned(static_plan(method, LAYERS, kept / LAYERS), scope="answer")
            point = measured(model, tokenizer, policy)
            cosines = state_cosines(model, tokenizer, items, policy)
            found[f"{name} {kept}"] = {**point, "cosines": cosines}
        tuned, _ = open_model(trained(name, seed, folder, full))
        policy = attached(tuned)[1].depth_policy
        found[f"{name} 6 tuned"] = measured(tuned, tokenizer, policy)
    return found


def controllers(seed: int, folder: Path) -> dict[str, Any]:
    """Experiment 2: what controllers per token reach, reading hidden states or nothing.

    Each is measured taking the likelier choice, and drawing it as in training, which is what the
    authors' code does and where both arms cost what they were trained to.
    """
    found = {}
    for name in CONTROLLED:
        model, tokenizer = open_model(trained(name, seed, folder, folder / f"full-{seed}"))
        stack = attached(model)[1]
        found[name] = measured(model, tokenizer, stack.depth_policy)
        for decider in gates_of(stack):
            if decider is not None:
                decider.train()
        torch.manual_seed(seed)
        found[f"{name} drawn"] = measured(model, tokenizer, stack.depth_policy)
    return found


def oracle_of(seed: int, folder: Path) -> dict[str, Any]:
    """Experiment 3: the oracle's report, by the command."""
    out = folder / f"oracle-{seed}"
    with contextlib.redirect_stdout(sys.stderr):
        oracle(
            str(folder / f"full-{seed}"),
            task=TASK,
            menu=f"uniform:{MENU}",
            questions=QUESTIONS,
            out=out,
        )
    found = json.loads((out / "oracle.json").read_text(encoding="utf-8"))
    return {key: value for key, value in found.items() if key != "curve"}


def of_seed(seed: int, folder: Path) -> dict[str, Any]:
    """All of one seed, as it was found before where it was."""
    kept = folder / f"found-{seed}.json"
    if not kept.is_file():
        trained("full", seed, folder)
        found = {
            "skip_against_exit": skip_against_exit(seed, folder),
            "controllers": controllers(seed, folder),
            "oracle": oracle_of(seed, folder),
        }
        write_json(kept, found)
    return json.loads(kept.read_text(encoding="utf-8"))


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Mean and sample standard deviation over seeds of each figure."""
    made: dict[str, Any] = {}
    for arm in rows[0]:
        for figure, value in rows[0][arm].items():
            if not isinstance(value, float | int):
                continue
            values = [row[arm][figure] for row in rows]
            spread = statistics.stdev(values) if len(values) > 1 else None
            made.setdefault(arm, {})[figure] = {"mean": statistics.fmean(values), "sd": spread}
    return made


def main() -> None:
    """Prints one JSON object: every seed's figures, and mean and spread of each arm."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    given = parser.parse_args()
    torch.set_num_threads(1)
    seeds = {seed: of_seed(seed, given.folder) for seed in given.seeds}
    means = {
        part: summary([found[part] for found in seeds.values()])
        for part in ("skip_against_exit", "controllers")
    }
    record = {**run_record(), "command": shlex.join(["python", *sys.argv])}
    print(json.dumps({"summary": means, "seeds": seeds, "run": record}, indent=2))


if __name__ == "__main__":
    main()
