"""`trol demo`: train trol-tiny and its twin here, compare them, and write the report."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import active_children, get_context
from pathlib import Path
from typing import Annotated, Any

import typer

from trol.cli import terminal
from trol.cli.provenance import run_record
from trol.cli.seed import ARMS, run_seed

EXAMPLES = (
    "trol demo",
    "trol demo --seeds 4 --out runs/demo-4",
    "trol demo stages.reason.steps=200 stages.step2.steps=100",
)


def demo(
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Settings that replace the recipe's."),
    ] = None,
    out: terminal.Out = Path("runs/demo"),
    seeds: Annotated[
        int, typer.Option("--seeds", metavar="N", min=1, help="Runs of each; the spread is theirs.")
    ] = 2,
    recipe: Annotated[
        str, typer.Option("--recipe", metavar="RECIPE", help="What to run.")
    ] = "demo",
    as_json: terminal.AsJson = False,
) -> None:
    """Train a small model here and report what traversal did to it."""
    from trol import training
    from trol.analysis import report

    started = time.perf_counter()
    training.resolve(recipe, overrides or [])  # a wrong key is told before anything starts
    terminal.note(f"== {seeds} seeds, each: eyes, reason, then step 1 and step 2 with and without")
    with terminal.noise_to_stderr():
        results = gather(_run_seeds(recipe, overrides or [], seeds, out), list(range(seeds)))
        results["run"] = run_record(0) | {"seconds": round(time.perf_counter() - started, 1)}
        page = report.write(results, out)
    terminal.report(results, as_json=as_json, text=lambda: _summary(results, page))


def _run_seeds(
    recipe: str, overrides: Sequence[str], seeds: int, out: Path
) -> list[dict[str, Any]]:
    """All seeds, as many side by side as there are cores."""
    workers = min(seeds, os.cpu_count() or 1)
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        waiting = [pool.submit(run_seed, recipe, overrides, seed, out) for seed in range(seeds)]
        try:
            return [one.result() for one in waiting]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in active_children():
                process.terminate()
            raise


def gather(found: Sequence[dict[str, Any]], seeds: list[int]) -> dict[str, Any]:
    """The seeds' findings in the form that the report reads."""
    first = found[0]
    losses = {
        stage: {arm: [one["losses"][stage][arm] for one in found] for arm in curves}
        for stage, curves in first["losses"].items()
    }
    return {
        "model": "trol-tiny",
        "seeds": seeds,
        "losses": losses,
        "accuracy": {arm: [one["accuracy"][arm] for one in found] for arm in ("on", "off", "twin")},
        "gates": [one["gates"] for one in found],
        "sparse": [{"points": one["sparse"]} for one in found],
        "cost": first["cost"],
        "maps": first["maps"],
        "parameters": {arm: first["parameters"][arm] for arm in ARMS},
        "steps": {arm: first["steps"][arm] for arm in ARMS},
        "chance": first["chance"],
        "counts": first["counts"],
        "seconds": [one["seconds"] for one in found],
        "questions": sum(first["counts"].values()),
    }


def _summary(results: dict[str, Any], page: Path) -> str:
    """The verdicts and where the report is."""
    from trol.analysis import report

    lines = [*report.verdicts(results), f"Report: {page}"]
    return "\n".join([*lines, "Ask it: trol chat --image docs/board.png"])
