"""`trol train`: run a recipe."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Generator
from pathlib import Path
from typing import Annotated, Any

import typer

from trol.cli import terminal
from trol.cli.terminal import run_record
from trol.errors import UsageError

EXAMPLES = (
    "trol train recipes/tiny.yaml",
    "trol train tiny seed=1 save_every=200 --resume --out runs/tiny-1",
    "trol train tiny --show",
)


def train(  # noqa: PLR0917 - a command's options
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A YAML file or its name.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Settings that replace the recipe's."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Default: runs/RECIPE.")
    ] = None,
    start: Annotated[
        Path | None, typer.Option("--from", metavar="DIR", help="Go on from an earlier run.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on where this run was interrupted, if it was.")
    ] = False,
    max_hours: Annotated[
        float | None, typer.Option("--max-hours", metavar="H", help="Save and stop after H hours.")
    ] = None,
    report_to: Annotated[
        list[str] | None,
        typer.Option("--report-to", metavar="NAME", help="Log to tensorboard or trackio as well."),
    ] = None,
    questions: Annotated[
        int,
        typer.Option("--questions", metavar="N", min=0, help="Validation questions; 0 for none."),
    ] = 540,
    show: Annotated[bool, typer.Option("--show", help="Print the whole recipe and leave.")] = False,
    as_json: terminal.AsJson = False,
) -> None:
    """Train a model as RECIPE says, stage by stage."""
    from trol import training
    from trol.training import processes

    resolved = training.resolve(recipe, overrides or [])
    if show:
        recipe_json = dataclasses.asdict(resolved)
        terminal.report(recipe_json, as_json=as_json, text=lambda: resolved.yaml().rstrip())
        return
    place = out or Path("runs") / Path(recipe).stem
    if (place / "training.json").is_file() and not resume:
        raise UsageError(
            f"{place} holds a finished run; name another folder with --out, or remove that one."
        )
    terminal.no_library_bars()
    with terminal.noise_to_stderr(), _interrupted(place):
        found = training.run(
            resolved,
            out=place,
            start=start,
            resume=resume,
            max_hours=max_hours,
            report_to=report_to or [],
        )
        processes.leave()
        if not processes.is_first():
            return
        result = {"run": run_record(found.get("seed")), **found}
        if "model" in found and "run" not in found:  # else it was finished and told before
            _describe(Path(found["model"]), result, questions)
    terminal.report(result, as_json=as_json, text=lambda: _told(result))


@contextlib.contextmanager
def _interrupted(place: Path) -> Generator[None]:
    """Says what Ctrl-C leaves."""
    try:
        yield
    except KeyboardInterrupt:
        kept = place.with_name(place.name + ".partial").is_dir()
        terminal.note(
            "Stopped. The same command with --resume goes on from the last checkpoint."
            if kept
            else "Stopped. Nothing was saved; save_every=N saves a checkpoint every N steps."
        )
        raise


def _describe(folder: Path, result: dict[str, Any], questions: int) -> None:
    """The page of the run and the model card, beside the model."""
    from trol.files import write_json
    from trol.reports.description import write_card
    from trol.reports.training import write_run

    result["validation"] = _validation(folder, questions)
    told = {key: value for key, value in result.items() if key != "model"}  # folders move
    write_json(folder / "training.json", told)
    write_run(folder)
    write_card(folder)


def _validation(folder: Path, questions: int) -> dict[str, Any] | None:
    """Scores per question type on a validation split; None where there is none to ask.

    A TroL model is asked about boards, a new text decoder what the last of its pairs ask.
    """
    from trol.cli.models import open_model
    from trol.data.pairs import is_pairs
    from trol.evaluation.measuring import validate
    from trol.family import TrolProcessor
    from trol.training import resolve

    if not questions:
        return None
    recipe = resolve(folder / "recipe.yaml")
    pairs = [stage.data for stage in recipe.stages.values() if is_pairs(stage.data)]
    if recipe.decoder and pairs:
        return validate(*open_model(folder), questions=questions, task=pairs[-1])
    if not (folder / "processor_config.json").is_file():
        return None
    model, processor = open_model(folder)
    asks = isinstance(processor, TrolProcessor)
    return validate(model, processor, questions=questions) if asks else None


def _told(result: dict[str, Any]) -> str:
    if "model" in result:
        return f"{result['model']}\n{result['model']}/report.html"
    stopped = result["stopped"]
    return (
        f"Stopped at step {stopped['step']} of stage {stopped['stage']}: the time is over. "
        "Give the same command with --resume to go on."
    )
