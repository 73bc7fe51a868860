"""`trol demo`: train trol-tiny and its twin here, compare them, and write the report."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from trol.cli import terminal
from trol.cli.conversation import Conversation
from trol.cli.map import trace_question
from trol.cli.provenance import run_record

if TYPE_CHECKING:
    from collections.abc import Sequence

EXAMPLES = (
    "trol demo",
    "trol demo --seeds 3 --out runs/demo-3",
    "trol demo --json",
)
ARMS = {"on": ["policy=trol"], "twin": ["policy=plain"]}
MAPS = 3


def demo(
    out: terminal.Out = Path("runs/demo"),
    seeds: Annotated[
        int, typer.Option("--seeds", metavar="N", min=1, help="Runs of each; the spread is theirs.")
    ] = 1,
    recipe: Annotated[
        str, typer.Option("--recipe", metavar="RECIPE", help="What to run.")
    ] = "tiny",
    as_json: terminal.AsJson = False,
) -> None:
    """Train a small model here and report what traversal did to it."""
    from trol.analysis import report

    started = time.perf_counter()
    with terminal.noise_to_stderr():
        results = study(recipe, range(seeds), out)
        results["run"] = run_record(0) | {"seconds": round(time.perf_counter() - started, 1)}
        page = report.write(results, out)
    terminal.report(results, as_json=as_json, text=lambda: _summary(results, page))


def study(recipe: str, seeds: Sequence[int], out: Path) -> dict[str, Any]:
    """Train and measure each arm with each seed; everything the report needs but `run`."""
    from trol import evaluation, training

    results: dict[str, Any] = {"seeds": list(seeds), "losses": {}, "accuracy": {}, "gates": []}
    results |= {"sparse": [], "cost": {}, "maps": [], "parameters": {}, "steps": {}}
    for seed in seeds:
        for arm, settings in ARMS.items():
            terminal.note(f"== seed {seed}: {arm}")
            resolved = training.resolve(recipe, [*settings, f"seed={seed}"])
            made = training.run(resolved, out=out / f"{arm}-{seed}")
            _note_training(results, arm, made)
            _measure(results, arm, made, evaluation, seed=seed, out=out)
    results["model"] = "trol-tiny"
    return results


def _note_training(results: dict[str, Any], arm: str, made: dict[str, Any]) -> None:
    """Keep the losses, parameter count and steps of one training run."""
    for stage, curve in made["losses"].items():
        results["losses"].setdefault(stage, {}).setdefault(arm, []).append(curve)
    results["parameters"][arm] = made["parameters"]
    results["steps"][arm] = made["steps"]


def _measure(
    results: dict[str, Any],
    arm: str,
    made: dict[str, Any],
    evaluation: Any,
    *,
    seed: int,
    out: Path,
) -> None:
    """Accuracy of one trained model; for the one with traversal also off, gates, sparse, maps."""
    import trol
    from trol.depth.host import depth

    model, processor = trol.load_model(str(made["model"]))
    _note_accuracy(results, arm, evaluation.evaluate(model, processor, ["boards"], seed=seed))
    if arm == "twin":
        return
    with depth(model, "all"):
        _note_accuracy(results, "off", evaluation.evaluate(model, processor, ["boards"], seed=seed))
    results["gates"].append(evaluation.gate_spread(model, processor, seed=seed))
    results["sparse"].append({"points": evaluation.sparse_curve(model, processor, seed=seed)})
    if not results["maps"]:
        results["maps"] = _maps(model, processor, evaluation, out)


def _note_accuracy(results: dict[str, Any], arm: str, found: dict[str, Any]) -> None:
    """Keep one evaluation as one seed of `arm`."""
    task = found["tasks"]["boards"]
    scores = {**task["by_type"], "all": task["accuracy"]}
    results["accuracy"].setdefault(arm, []).append(scores)
    results["cost"].setdefault(arm, found["cost"])
    results["chance"] = task["chance_by_type"]
    results["counts"] = task["n_by_type"]


def _maps(model: Any, processor: Any, evaluation: Any, out: Path) -> list[dict[str, str]]:
    """Maps of the first test questions, as files beside the report."""
    from trol.analysis.files import folder, write_whole
    from trol.analysis.maps import draw

    made: list[dict[str, str]] = []
    for number, sample in enumerate(evaluation.sample_questions(MAPS)):
        conversation = Conversation(model, processor, max_new_tokens=8)
        conversation.pictures.append(sample.picture)
        depth_map, found = trace_question(conversation, sample.question)
        name = f"map-{number}.png"
        write_whole(folder(out) / name, draw(depth_map))
        caption = f"Asked: {sample.question} Answered: {found['answer']}. Right: {sample.answer}."
        made.append({"file": name, "caption": caption})
    return made


def _summary(results: dict[str, Any], page: Path) -> str:
    """The verdicts and where the report is."""
    from trol.analysis import report

    lines = [*report.verdicts(results), f"Report: {page}"]
    return "\n".join([*lines, "Ask it: trol chat --image docs/board.png"])
