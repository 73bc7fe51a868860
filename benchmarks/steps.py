"""One step against two, and who learns in the first: short tiny runs, several seeds.

    python benchmarks/steps.py --seeds 0 1 2 > benchmarks/results/steps.json

All arms of a seed start from one model (stages vision and reason of recipes/demo.yaml), make the
same number of optimiser steps, and are asked the same questions about validation boards.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from trol.cli.terminal import run_record
from trol.evaluation.gates import gate_spread
from trol.evaluation.tasks import validate
from trol.family.loading import load_model
from trol.training import resolve, run
from trol.training.recipe import Recipe

SHARED = ("vision", "reason")
QUESTIONS = 1800


def arms(recipe: Recipe) -> dict[str, Recipe]:
    """Name -> the recipe with its own first step, or with none."""
    one, two = recipe.stages["step1"], recipe.stages["step2"]

    def first(*parts: str) -> Recipe:
        return replace(recipe, stages={"step1": replace(one, train=parts), "step2": two})

    return {
        "two steps, as published": first("projector", "mixers"),
        "one step": replace(recipe, stages={"step2": replace(two, steps=one.steps + two.steps)}),
        "projector first": first("projector"),
        "mixers first": first("mixers"),
    }


def measured(seed: int, folder: Path) -> dict[str, dict[str, Any]]:
    """Arm -> accuracy and gates, all from one shared start."""
    recipe = resolve("demo", [f"seed={seed}"])
    run(recipe, folder / "shared", only=SHARED, label=f"seed {seed}, ")
    found = {}
    for name, made in arms(recipe).items():
        out = folder / name
        run(made, out, start=folder / "shared", label=f"seed {seed}, {name}, ")
        model, processor = load_model(out)
        scores = validate(model, processor, questions=QUESTIONS)
        found[name] = {"accuracy": scores["accuracy"], "by_type": scores["by_type"]}
        found[name]["gates"] = gate_spread(model, processor)["mean"]
    return found


def main() -> None:
    """Prints one JSON object: every seed's figures, and mean and spread of each arm."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        seeds = {seed: measured(seed, Path(folder) / str(seed)) for seed in given.seeds}
    summary = {}
    for name in next(iter(seeds.values())):
        scores = [found[name]["accuracy"] for found in seeds.values()]
        spread = statistics.stdev(scores) if len(scores) > 1 else None
        summary[name] = {"mean": statistics.mean(scores), "sd": spread, "seeds": scores}
    command = shlex.join(["python", *sys.argv])
    print(
        json.dumps(
            {"summary": summary, "seeds": seeds, "run": {**run_record(), "command": command}},
            indent=2,
        )
    )


if __name__ == "__main__":
    main()
