"""`trol train`: run a recipe."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any

from trol.cli import models, terminal
from trol.cli.terminal import argument, flag, option, run_record
from trol.errors import UsageError

EXAMPLES = (
    "trol train recipes/tiny.yaml",
    "trol train tiny seed=1 save_every=200 --resume --out runs/tiny-1",
    "trol train tiny --show",
)
START_HELP = "Go on from an earlier run."
RESUME_HELP = "Go on where this run was interrupted, if it was."
HOURS_HELP = "Save and stop after H hours."
REPORT_HELP = "Log to tensorboard or trackio as well."
QUESTIONS_HELP = "Validation questions; 0 for none."


def train(  # noqa: PLR0917 - a command's options
    recipe: Annotated[str, argument("RECIPE", "A YAML file or its name.")],
    overrides: terminal.Overrides = None,
    out: Annotated[Path | None, option("--out", "DIR", "Default: runs/RECIPE.")] = None,
    start: Annotated[Path | None, option("--from", "DIR", START_HELP)] = None,
    resume: Annotated[bool, flag("--resume", RESUME_HELP)] = False,
    max_hours: Annotated[float | None, option("--max-hours", "H", HOURS_HELP)] = None,
    report_to: Annotated[list[str] | None, option("--report-to", "NAME", REPORT_HELP)] = None,
    questions: Annotated[int, option("--questions", "N", QUESTIONS_HELP, min=0)] = 540,
    show: Annotated[bool, flag("--show", "Print the whole recipe and leave.")] = False,
    as_json: terminal.AsJson = False,
) -> None:
    """Train a model as RECIPE says, stage by stage."""
    from trol import training
    from trol.host import processes

    resolved = training.resolve(recipe, overrides or [])
    if show:
        recipe_json = dataclasses.asdict(resolved)
        terminal.report(recipe_json, as_json=as_json, text=lambda: resolved.yaml().rstrip())
        return
    folder = out or Path("runs") / Path(recipe).stem
    if (folder / "training.json").is_file() and not resume:
        raise UsageError(
            f"{folder} holds a finished run; name another folder with --out, or remove that one."
        )
    with terminal.quiet_libraries(), terminal.on_interrupt(lambda: _interrupted(folder)):
        summary = training.run(
            resolved,
            out=folder,
            start=start,
            resume=resume,
            max_hours=max_hours,
            report_to=report_to or [],
        )
        processes.leave()
        if not processes.is_first():
            return
        result = {"run": run_record(summary.get("seed")), **summary}
        if "model" in summary and "run" not in summary:  # else a finished run was given again
            _describe(Path(summary["model"]), result, questions)
    terminal.report(result, as_json=as_json, text=lambda: _text(result))


def _interrupted(folder: Path) -> str:
    if folder.with_name(folder.name + ".partial").is_dir():
        return "Stopped. The same command with --resume goes on from the last checkpoint."
    return "Stopped. Nothing was saved; save_every=N saves a checkpoint every N steps."


def _describe(folder: Path, result: dict[str, Any], questions: int) -> None:
    """Writes the page of the run and the model card, beside the model."""
    from trol.files import write_json
    from trol.reports.description import write_card
    from trol.reports.training import write_run

    result["validation"] = _validation(folder, questions)
    content = {key: value for key, value in result.items() if key != "model"}  # folders move
    write_json(folder / "training.json", content)
    write_run(folder)
    write_card(folder)


def _validation(folder: Path, questions: int) -> dict[str, Any] | None:
    """Scores per question type on a validation split; None where no built-in set fits.

    A TroL model is asked about boards, a new text decoder what the last of its pairs ask, and so is
    a TroL model whose last stage learnt from pairs.
    """
    from trol.data.pairs import is_pairs
    from trol.evaluation.tasks import validate
    from trol.family import TrolProcessor
    from trol.training import resolve

    if not questions:
        return None
    recipe = resolve(folder / "recipe.yaml")
    data = [stage.data for stage in recipe.stages.values()]
    pairs = [one for one in data if is_pairs(one)]
    if (recipe.decoder and pairs) or (recipe.preset and pairs[-1:] == data[-1:]):
        return validate(*models.open_model(folder), questions=questions, task=pairs[-1])
    if not (folder / "processor_config.json").is_file():
        return None
    model, processor = models.open_model(folder)
    if not isinstance(processor, TrolProcessor):
        return None
    return validate(model, processor, questions=questions)


def _text(result: dict[str, Any]) -> str:
    if "model" in result:
        return f"{result['model']}\n{result['model']}/report.html"
    stopped = result["stopped"]
    return (
        f"Stopped at step {stopped['step']} of stage {stopped['stage']}: the time is over. "
        "Give the same command with --resume to go on."
    )
