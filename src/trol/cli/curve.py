"""`trol curve`: what each way to choose layers keeps of a model's quality, at what cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

from trol.cli import models, terminal
from trol.cli.terminal import SCOPES, listed, option, run_record
from trol.errors import UsageError, unknown

if TYPE_CHECKING:
    from trol.depth import Scope
    from trol.evaluation.curve_methods import Request
    from trol.evaluation.store import SharedMeasurements

EXAMPLES = (
    "trol curve --tasks boards --methods skip,exit --keep 0.5:1:0.5 --questions 36",
    "trol curve --tasks boards --methods exit,greedy --keep 0.5 --seeds 2 --questions 18 --json",
    "trol curve --tasks boards --methods skip --keep 0.5 --scope all --questions 36 --seeds 1",
)
TASKS_HELP = (
    "Of docstrings, boards, text:FILE, chat:FILE, alpaca:FILE, cnn_dailymail:FILE, samsum:FILE. "
    "Default: boards for a model that sees, else docstrings."
)
METHODS_HELP = (
    "Of skip (evenly spaced), exit, random, middle, influence, greedy, early_exit, controller, "
    "router, oracle."
)
QUESTIONS_HELP = "Questions of each seed. Default: 200; of text:FILE, 4 windows of 512 tokens."
ADAPTERS_HELP = "Trained controllers, routers and exits, with commas between."


def curve(
    model: terminal.Model = terminal.DEFAULT_MODEL,
    *,
    tasks: Annotated[str | None, option("--tasks", "NAMES", TASKS_HELP)] = None,
    methods: Annotated[
        str, option("--methods", "NAMES", METHODS_HELP)
    ] = "skip,exit,middle,influence,greedy",
    keep: Annotated[
        str, option("--keep", "RANGE", "Shares of the layers: first:last[:step].")
    ] = "0.5:1.0",
    questions: Annotated[int | None, option("--questions", "N", QUESTIONS_HELP, min=1)] = None,
    seeds: Annotated[int, option("--seeds", "N", "Samples of questions, random plans.", min=1)] = 3,
    scope: Annotated[str, option("--scope", "ROLES", "Whose tokens skip: answer, all.")] = "answer",
    adapters: Annotated[str, option("--adapters", "DIRS", ADAPTERS_HELP)] = "",
    oracle: Annotated[Path | None, option("--oracle", "DIR", "What `trol oracle` left.")] = None,
    chat_template: terminal.ChatTemplate = None,
    shard: terminal.Shard = None,
    out: terminal.Out = Path("runs/curve"),
    as_json: terminal.AsJson = False,
) -> None:
    """Draw MODEL's quality against layer visits, FLOPs and time.

    Points are kept in DIR: the same command goes on where it was stopped. Of several parts the last
    one draws.
    """
    from trol.checkpoints.adapter import check_writable
    from trol.evaluation import curve_methods
    from trol.evaluation.curve import curve as measure_curve
    from trol.evaluation.shards import missing_text, shard_of
    from trol.evaluation.tasks import default_task
    from trol.reports.curve import write

    part = shard_of(shard)
    names = None if tasks is None else listed(tasks)
    request = curve_methods.Request(
        methods=tuple(listed(methods)),
        keeps=tuple(curve_methods.shares_of(keep)),
        questions=questions,
        seeds=seeds,
        scope=cast("Scope", scope),
        oracle=oracle,
    )
    folders = listed(adapters)
    _check(request, names, folders)
    check_writable(out)
    with terminal.quiet_libraries():
        opened, processor = models.open_model(model, chat_template=chat_template)
        request = replace(request, adapters=_adapters(opened, folders))
        names = names or [default_task(processor)]
        kept = _kept(opened, names, request, out, part)
        hint = f"Stopped. {out} keeps every point that was measured; the same command goes on."
        with terminal.on_interrupt(lambda: hint), terminal.progress("curve", "point") as bar:
            curves = measure_curve(
                opened,
                processor,
                names,
                request,
                kept=kept,
                shard=part,
                progress=lambda what, done, of: bar(done, of, what),
            )
        result = {"model": model, **curves, "run": run_record()}
        whole = "missing" not in result
        page = write(result, out) if whole else out
        if part[1] == 1:
            kept.finish()
    terminal.report(
        result,
        as_json=as_json,
        text=lambda: _text(result, page) if whole else missing_text(result["missing"]),
    )


def _check(request: Request, names: Sequence[str] | None, folders: Sequence[str]) -> None:
    """Raises before a model is opened for what no model can do."""
    from trol.evaluation.curve_methods import check_adapters, check_methods
    from trol.evaluation.tasks import check_tasks

    if request.scope not in SCOPES:
        raise unknown("scope", request.scope, SCOPES)
    if names is not None:
        check_tasks(names)
    check_methods(request.methods, request.oracle)
    if not folders:
        check_adapters(request)


def _kept(
    model: Any, tasks: Sequence[str], request: Request, out: Path, part: tuple[int, int]
) -> SharedMeasurements:
    """The points that all parts of this very curve have measured."""
    from trol.checkpoints.adapter import weights_digest
    from trol.evaluation.curve import described
    from trol.evaluation.store import SharedMeasurements

    names = {"tasks": list(tasks), "methods": list(request.methods)}
    weights = {name: weights_digest(one) for name, one in (request.adapters or {}).items()}
    header = {**names, **described(model, request), "weights": weights_digest(model)}
    return SharedMeasurements(out, {**header, "adapters": weights}, part)


def _adapters(model: Any, folders: Sequence[str]) -> dict[str, Any]:
    """Each folder's policy on its host: `model` itself, or one that learnt with the policy."""
    from trol.checkpoints.adapter import CONFIG_NAME, is_trained
    from trol.depth import is_attached
    from trol.evaluation.curve_methods import with_adapter

    adapters: dict[str, Any] = {}
    for folder in folders:
        if (Path(folder) / CONFIG_NAME).is_file() and not is_trained(Path(folder)):
            adapters[folder] = with_adapter(model, folder)
            continue
        adapters[folder], _ = models.open_model(folder)
        if not is_attached(adapters[folder]):
            raise UsageError(
                f"{folder} of --adapters holds a model without a policy; give a folder that "
                "trol.save or `trol train` wrote of a controller, a router or an exit."
            )
    return adapters


def _text(result: dict[str, Any], page: Path) -> str:
    """The tables of every task, with the judging metric alone, and where the page is."""
    from trol.reports.curve import tables_of

    parts: list[str] = []
    for name, task in result["tasks"].items():
        parts.append(f"{name}:")
        for table in tables_of(task, [next(iter(task["metrics"]))]):
            parts += [terminal.table([table.heading, *table.rows]), *table.notes]
    return "\n".join([*parts, str(page)])
