"""One seed of the demo: train the stages that both arms share, then each arm, then measure."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trol.cli.terminal import no_library_bars

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
    from trol.depth.host import depth
    from trol.evaluation.gates import gate_spread, sparse_curve
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
    from trol.analysis.files import folder, write_whole
    from trol.analysis.maps import draw
    from trol.analysis.pages import beside
    from trol.cli.conversation import Conversation
    from trol.cli.map import trace_question
    from trol.evaluation import sample_questions

    made: list[dict[str, str]] = []
    for number, sample in enumerate(sample_questions(9)[::4][:MAPS]):
        conversation = Conversation(model, processor, max_new_tokens=8)
        assert sample.picture is not None  # boards are pictures
        conversation.pictures.append(sample.picture)
        depth_map, found = trace_question(conversation, sample.question)
        name = f"map-{number}.png"
        caption = f"Asked: {sample.question} Answered: {found['answer']}. Right: {sample.answer}."
        with beside(out / "results.json"):
            write_whole(folder(out) / name, draw(depth_map))
            made.append({"file": name, "caption": caption})
    return made
