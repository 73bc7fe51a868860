"""`trol demo`: train trol-tiny and its twin here, compare them, and write the report.

One seed of the demo: train the stages that both arms share, then each arm, then measure.
"""

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
from trol.cli.terminal import no_library_bars, run_record

ARMS = {"on": [], "twin": ["policy.passes=1"]}
"""Arm -> what differs in the recipe. The twin has the same gates, and never a second visit."""

MAPS = 3
QUESTIONS = 1800
SPARSE_QUESTIONS = 540


def run_seed(recipe: str, overrides: Sequence[str], seed: int, out: Path) -> dict[str, Any]:
    """Trains and measures both arms with one seed.

    Returns:
        `{"losses": {stage: {arm: curve}}, "accuracy": {arm: {type: share}}, "chance", "counts",
        "cost", "gates", "sparse", "maps", "parameters", "steps", "seconds"}`, arms on, off, twin.
    """
    import torch

    torch.set_num_threads(1)  # seeds run side by side, one core each
    no_library_bars()
    made = _train_arms(recipe, [*overrides, f"seed={seed}"], seed, out)
    found: dict[str, Any] = {"losses": _losses(made), "accuracy": {}, "cost": {}}
    found["parameters"] = {arm: made[arm]["parameters"] for arm in ARMS}
    found["steps"] = {arm: made["shared"]["steps"] + made[arm]["steps"] for arm in ARMS}
    found["seconds"] = {name: one["seconds"] for name, one in made.items()}
    for arm in ARMS:
        _measure(found, arm, made[arm]["model"], seed, out)
    return found


def _train_arms(recipe: str, settings: list[str], seed: int, out: Path) -> dict[str, Any]:
    from trol import training

    whole = training.resolve(recipe, settings)
    shared = [name for name, stage in whole.stages.items() if not stage.traverse]
    own = [name for name in whole.stages if name not in shared]
    first = out / f"shared-{seed}"
    made = {"shared": training.run(whole, first, only=shared, label=f"[seed {seed}] ")}
    for arm, differs in ARMS.items():
        resolved = training.resolve(recipe, [*settings, *differs])
        label = f"[seed {seed}, {arm}] "
        place = out / f"{arm}-{seed}"
        made[arm] = training.run(resolved, place, start=first, only=own, label=label)
    return made


def _losses(made: dict[str, Any]) -> dict[str, dict[str, Any]]:
    losses = {stage: {"both": curve} for stage, curve in made["shared"]["losses"].items()}
    for arm in ARMS:
        for stage, curve in made[arm]["losses"].items():
            losses.setdefault(stage, {})[arm] = curve
    return losses


def _measure(found: dict[str, Any], arm: str, folder: str, seed: int, out: Path) -> None:
    """Accuracy of one trained model; for the one with traversal also off, gates, sparse, maps."""
    from trol.depth.attachment import depth
    from trol.evaluation.measuring import gate_spread, sparse_curve
    from trol.family.loading import load_model

    model, processor = load_model(folder)
    _note_accuracy(found, arm, model, processor, seed)
    if arm == "twin":
        return
    with depth(model, "plain"):
        _note_accuracy(found, "off", model, processor, seed)
    found["gates"] = gate_spread(model, processor, seed=seed)
    found["sparse"] = sparse_curve(model, processor, questions=SPARSE_QUESTIONS, seed=seed)
    found["maps"] = _maps(model, processor, out) if seed == 0 else []


def _note_accuracy(found: dict[str, Any], arm: str, model: Any, processor: Any, seed: int) -> None:
    from trol import evaluation

    result = evaluation.evaluate(model, processor, ["boards"], questions=QUESTIONS, seed=seed)
    task = result["tasks"]["boards"]
    found["accuracy"][arm] = {**task["by_type"], "all": task["accuracy"]}
    found["cost"][arm] = result["cost"]
    found["chance"], found["counts"] = task["chance_by_type"], task["n_by_type"]


def _maps(model: Any, processor: Any, out: Path) -> list[dict[str, str]]:
    """Maps of the first test questions, as files beside the report."""
    from trol.cli.conversation import Conversation
    from trol.cli.map import trace_question
    from trol.evaluation import sample_questions
    from trol.files import folder, write_whole
    from trol.reports.maps import draw
    from trol.reports.pages import warning_if_it_fails

    made: list[dict[str, str]] = []
    for number, sample in enumerate(sample_questions(9)[::4][:MAPS]):
        conversation = Conversation(model, processor, max_new_tokens=8)
        assert sample.picture is not None  # boards are pictures
        conversation.pictures.append(sample.picture)
        depth_map, found = trace_question(conversation, sample.question)
        name = f"map-{number}.png"
        caption = f"Asked: {sample.question} Answered: {found['answer']}. Right: {sample.answer}."
        with warning_if_it_fails(out / "results.json"):
            write_whole(folder(out) / name, draw(depth_map))
            made.append({"file": name, "caption": caption})
    return made


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
    from trol.reports.training import write_demo

    started = time.perf_counter()
    training.resolve(recipe, overrides or [])  # a wrong key is told before anything starts
    terminal.note(f"== {seeds} seeds, each: eyes, reason, then step 1 and step 2 with and without")
    with terminal.noise_to_stderr():
        results = gather(_run_seeds(recipe, overrides or [], seeds, out), list(range(seeds)))
        results["run"] = run_record(0) | {"seconds": round(time.perf_counter() - started, 1)}
        page = write_demo(results, out)
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
    """What traversal did, and where the report is."""
    from trol.reports.training import differences_table

    table = differences_table(results)
    lines = [terminal.table([table.heading, *table.rows]), *table.notes, f"Report: {page}"]
    return "\n".join([*lines, "Ask it: trol chat --image docs/board.png"])
