"""`trol demo`: train decoders of one layer, and trol-tiny with its twin, and write the report.

One seed of the demo: trol-tiny, the stages that both arms share, then each arm, and what they
answer; and decoders that learn look-ups: one visit, two mixed, the second alone, two layers.
"""

import os
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import active_children, get_context
from pathlib import Path
from typing import Annotated, Any

from trol.cli import terminal
from trol.cli.terminal import option, run_record

EXAMPLES = (
    "trol demo",
    "trol demo --seeds 4 --out runs/demo-4",
    "trol demo stages.reason.steps=200 stages.step2.steps=100",
)
SEEDS_HELP = "Runs of each; the spread is theirs."
LOOK_UPS_HELP = "Optimiser steps of the decoders that learn look-ups. Default: 2000."

ARMS = {"on": [], "twin": ["policy.passes=1"]}
"""Arm -> what differs in the recipe. The twin has the same gates, and never a second visit."""

MAPS = 3
QUESTIONS = 1800
SPARSE_QUESTIONS = 540


def demo(
    overrides: terminal.Overrides = None,
    *,
    out: terminal.Out = Path("runs/demo"),
    seeds: Annotated[int, option("--seeds", "N", SEEDS_HELP, min=1)] = 2,
    recipe: Annotated[str, option("--recipe", "RECIPE", "What to run.")] = "demo",
    look_ups: Annotated[int | None, option("--look-ups", "STEPS", LOOK_UPS_HELP, min=1)] = None,
    as_json: terminal.AsJson = False,
) -> None:
    """Train small models here and report what second visits did."""
    from trol import training
    from trol.reports.training import differences_table, look_ups_table, write_demo

    started = time.perf_counter()
    training.resolve(recipe, overrides or [])  # refuses a wrong key before anything starts
    terminal.note(
        f"== {seeds} seed{'s' * (seeds > 1)}, each: eyes, reason, step 1 and step 2 with second "
        "visits and without; then look-ups"
    )
    with terminal.quiet_libraries():
        results = _gather(_run_seeds(recipe, overrides or [], look_ups, seeds, out))
        results["run"] = run_record(0) | {"seconds": round(time.perf_counter() - started, 1)}
        page = write_demo(results, out)
    lines = []
    for table in (look_ups_table(results), differences_table(results)):
        lines += [terminal.table([table.heading, *table.rows]), *table.notes, ""]
    lines += [f"Report: {page}", f"Ask it: trol chat {out / 'on-0'} --image docs/board.png"]
    terminal.report(results, as_json=as_json, text=lambda: "\n".join(lines))


def _run_seeds(
    recipe: str, overrides: Sequence[str], look_ups: int | None, seeds: int, out: Path
) -> list[dict[str, Any]]:
    """All seeds, as many side by side as there are cores."""
    workers = min(seeds, os.cpu_count() or 1)
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        given = recipe, overrides, look_ups
        futures = [pool.submit(run_seed, *given, seed, out) for seed in range(seeds)]
        try:
            return [future.result() for future in futures]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in active_children():
                process.terminate()
            raise


def run_seed(
    recipe: str, overrides: Sequence[str], look_ups: int | None, seed: int, out: Path
) -> dict[str, Any]:
    """Trains and measures everything with one seed.

    Returns:
        `{"look_ups": {decoder: {type: share, "visits"}}, "losses": {stage: {arm: curve}},
        "accuracy": {arm: {type: share}}, "chance", "counts", "cost", "gates", "sparse", "maps",
        "parameters", "steps", "seconds"}`, arms on, off, twin.
    """
    import torch

    torch.set_num_threads(1)  # seeds run side by side, one core each
    with terminal.quiet_libraries():
        runs = _train_arms(recipe, [*overrides, f"seed={seed}"], seed, out)
        learnt = learn_look_ups(look_ups, seed, out / "look-ups")
        result: dict[str, Any] = {"look_ups": learnt, "losses": _losses(runs)}
        result |= {"accuracy": {}, "cost": {}}
        result["parameters"] = {arm: runs[arm]["parameters"] for arm in ARMS}
        result["steps"] = {arm: runs["shared"]["steps"] + runs[arm]["steps"] for arm in ARMS}
        result["seconds"] = {name: run["seconds"] for name, run in runs.items()}
        for arm in ARMS:
            _measure(result, arm, runs[arm]["model"], seed, out)
    return result


def learn_look_ups(steps: int | None, seed: int, out: Path) -> dict[str, dict[str, float]]:
    """Share of right letters by number of look-ups, and layer visits of a token, by decoder."""
    from trol.studies.hop_learners import (
        ONE_VISIT,
        SECOND_ALONE,
        TINY,
        TWICE_THE_LAYERS,
        TWO_VISITS,
        asked,
    )
    from trol.studies.subject import Subject

    amounts = {**TINY, "steps": steps or TINY["steps"]}
    subject = Subject("", amounts, 1, out / "study")
    measured = {}
    for learner in (ONE_VISIT, TWO_VISITS, SECOND_ALONE, TWICE_THE_LAYERS):
        value = asked(subject, learner, seed)
        shares = {kind: statistics.fmean(each) for kind, each in value["right"].items()}
        measured[learner.name] = {**shares, "visits": value["visits"]}
    return measured


def _train_arms(recipe: str, settings: list[str], seed: int, out: Path) -> dict[str, Any]:
    """The summaries of the runs: `shared`, and each arm."""
    from trol import training

    whole = training.resolve(recipe, settings)
    shared = [name for name, stage in whole.stages.items() if not stage.traverse]
    own = [name for name in whole.stages if name not in shared]
    first = out / f"shared-{seed}"
    runs = {"shared": training.run(whole, first, only=shared, label=f"[seed {seed}] ")}
    for arm, differs in ARMS.items():
        resolved = training.resolve(recipe, [*settings, *differs])
        label = f"[seed {seed}, {arm}] "
        runs[arm] = training.run(
            resolved, out / f"{arm}-{seed}", start=first, only=own, label=label
        )
    return runs


def _losses(runs: dict[str, Any]) -> dict[str, dict[str, Any]]:
    losses = {stage: {"both": curve} for stage, curve in runs["shared"]["losses"].items()}
    for arm in ARMS:
        for stage, curve in runs[arm]["losses"].items():
            losses.setdefault(stage, {})[arm] = curve
    return losses


def _measure(result: dict[str, Any], arm: str, folder: str, seed: int, out: Path) -> None:
    """Accuracy of one trained model; for the one with traversal also off, gates, sparse, maps."""
    from trol.depth.attachment import depth
    from trol.evaluation.gates import TRACED, gate_spread, sparse_curve
    from trol.evaluation.items import board_items
    from trol.family.loading import load_model

    model, processor = load_model(folder)
    _measure_accuracy(result, arm, model, processor, seed)
    if arm == "twin":
        return
    with depth(model, "plain"):
        _measure_accuracy(result, "off", model, processor, seed)
    result["gates"] = gate_spread(model, processor, board_items(TRACED, seed))
    result["sparse"] = sparse_curve(model, processor, questions=SPARSE_QUESTIONS, seed=seed)
    result["maps"] = _maps(model, processor, out) if seed == 0 else []


def _measure_accuracy(
    result: dict[str, Any], arm: str, model: Any, processor: Any, seed: int
) -> None:
    from trol import evaluation

    scores = evaluation.evaluate(model, processor, ["boards"], questions=QUESTIONS, seed=seed)
    task = scores["tasks"]["boards"]
    result["accuracy"][arm] = {**task["by_type"], "all": task["accuracy"]}
    result["cost"][arm] = task["depth_columns"]
    result["chance"], result["counts"] = task["chance_by_type"], task["n_by_type"]


def _maps(model: Any, processor: Any, out: Path) -> list[dict[str, str]]:
    """Maps of the first test questions, as files beside the report."""
    from trol.cli.conversation import Conversation
    from trol.cli.map import trace_question
    from trol.evaluation import sample_questions
    from trol.files import folder, write_whole
    from trol.reports.maps import draw
    from trol.reports.pages import warning_if_it_fails

    maps: list[dict[str, str]] = []
    for number, sample in enumerate(sample_questions(9)[::4][:MAPS]):
        conversation = Conversation(model, processor, max_new_tokens=8)
        assert sample.picture is not None  # boards are pictures
        conversation.show(sample.picture)
        depth_map, values = trace_question(conversation, sample.question)
        name = f"map-{number}.png"
        caption = f"Asked: {sample.question} Answered: {values['answer']}. Right: {sample.answer}."
        with warning_if_it_fails(out / "results.json"):
            write_whole(folder(out) / name, draw(depth_map))
            maps.append({"file": name, "caption": caption})
    return maps


def _gather(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The results of seeds 0, 1, ... in the form that the report reads."""
    first = results[0]
    losses = {
        stage: {arm: [one["losses"][stage][arm] for one in results] for arm in curves}
        for stage, curves in first["losses"].items()
    }
    accuracy = {arm: [one["accuracy"][arm] for one in results] for arm in ("on", "off", "twin")}
    return {
        "model": "trol-tiny",
        "seeds": list(range(len(results))),
        "look_ups": {
            name: [one["look_ups"][name] for one in results] for name in first["look_ups"]
        },
        "losses": losses,
        "accuracy": accuracy,
        "gates": [one["gates"] for one in results],
        "sparse": [{"points": one["sparse"]} for one in results],
        **{key: first[key] for key in ("cost", "maps", "parameters", "steps", "chance", "counts")},
        "seconds": [one["seconds"] for one in results],
        "questions": sum(first["counts"].values()),
    }
