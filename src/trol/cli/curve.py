"""`trol curve`: what each way to choose layers keeps of a model's quality, at what cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from trol.cli import terminal
from trol.cli.terminal import run_record
from trol.errors import UsageError, unknown

if TYPE_CHECKING:
    from trol.depth import Scope

EXAMPLES = (
    "trol curve --tasks boards --methods skip,exit --keep 0.5:1:0.5 --questions 36",
    "trol curve --tasks boards --methods exit,greedy --keep 0.5 --seeds 2 --questions 18 --json",
    "trol curve --tasks boards --methods skip --keep 0.5 --scope all --questions 36 --seeds 1",
)
SCOPES = ("answer", "all")


def curve(
    model: terminal.Model = terminal.DEFAULT_MODEL,
    *,
    tasks: Annotated[
        str | None,
        typer.Option(
            "--tasks",
            metavar="NAMES",
            help="Of docstrings, boards, text:FILE, chat:FILE, alpaca:FILE, cnn_dailymail:FILE, "
            "samsum:FILE. Default: boards for a model that sees, else docstrings.",
        ),
    ] = None,
    methods: Annotated[
        str,
        typer.Option(
            "--methods",
            metavar="NAMES",
            help="Of skip, exit, random, middle, influence, greedy, early_exit, controller, "
            "router, oracle.",
        ),
    ] = "skip,exit,random,middle,influence",
    keep: Annotated[
        str,
        typer.Option("--keep", metavar="RANGE", help="Shares of the layers: first:last[:step]."),
    ] = "0.1:1.0",
    questions: Annotated[
        int, typer.Option("--questions", metavar="N", min=1, help="Questions of each seed.")
    ] = 200,
    seeds: Annotated[
        int,
        typer.Option("--seeds", metavar="N", min=1, help="Samples of questions, random plans."),
    ] = 3,
    scope: Annotated[
        str, typer.Option("--scope", metavar="ROLES", help="Whose tokens skip: answer, all.")
    ] = "answer",
    adapters: Annotated[
        str,
        typer.Option(
            "--adapters",
            metavar="DIRS",
            help="Trained controllers, routers and exits, with commas between.",
        ),
    ] = "",
    oracle: Annotated[
        Path | None, typer.Option("--oracle", metavar="DIR", help="What `trol oracle` left.")
    ] = None,
    out: terminal.Out = Path("runs/curve"),
    as_json: terminal.AsJson = False,
) -> None:
    """Draw MODEL's quality against layer visits, FLOPs and time."""
    from trol.checkpoints.adapter import check_writable
    from trol.cli.models import open_model
    from trol.evaluation.curve import curve as measured
    from trol.evaluation.curve_methods import (
        Request,
        check_adapters,
        check_methods,
        read_oracle,
        shares_of,
    )
    from trol.evaluation.tasks import check_tasks, default_task

    names = None if tasks is None else _listed(tasks)
    wanted, folders = _listed(methods), _listed(adapters)
    shares = shares_of(keep)
    if scope not in SCOPES:
        raise unknown("scope", scope, SCOPES)
    if names is not None:
        check_tasks(names)
    check_methods(wanted, oracle)
    if oracle is not None:
        read_oracle(oracle)
    request = Request(
        methods=tuple(wanted),
        keeps=tuple(shares),
        questions=questions,
        seeds=seeds,
        scope=cast("Scope", scope),
        oracle=oracle,
    )
    if not folders:
        check_adapters(request)
    check_writable(out)
    terminal.no_library_bars()
    with terminal.noise_to_stderr():
        opened, processor = open_model(model)
        names = names or [default_task(processor)]
        request = replace(request, adapters=_opened(opened, folders))
        with terminal.progress("curve", "point") as shown:
            found = measured(
                opened,
                processor,
                names,
                request,
                progress=lambda what, done, of: shown(done, of, what),
            )
        result = {"model": model, **found, "run": run_record()}
        page = _write(result, out)
    terminal.report(result, as_json=as_json, text=lambda: _told(result, page))


def _listed(text: str) -> list[str]:
    """Names with commas between, each once."""
    return list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))


def _opened(model: Any, folders: Sequence[str]) -> dict[str, Any]:
    """Each folder's policy on its host: `model` itself, or one that learnt along with it."""
    from trol.checkpoints.adapter import CONFIG_NAME, is_trained
    from trol.cli.models import open_model
    from trol.depth import is_attached
    from trol.evaluation.curve_methods import with_adapter

    found: dict[str, Any] = {}
    for folder in folders:
        if (Path(folder) / CONFIG_NAME).is_file() and not is_trained(Path(folder)):
            found[folder] = with_adapter(model, folder)
            continue
        other, _ = open_model(folder)
        if not is_attached(other):
            raise UsageError(
                f"{folder} of --adapters holds a model without a policy; give a folder that "
                "trol.save or `trol train` wrote of a controller, a router or an exit."
            )
        found[folder] = other
    return found


def _write(result: dict[str, Any], out: Path) -> Path:
    from trol.reports import curve

    return curve.write(result, out)


def _told(result: dict[str, Any], page: Path) -> str:
    """The tables of every task, with the judging metric alone, and where the page is."""
    from trol.reports.curve import tables_of

    parts: list[str] = []
    for name, task in result["tasks"].items():
        parts.append(f"{name}:")
        for table in tables_of(task, [next(iter(task["metrics"]))]):
            parts += [terminal.table([table.heading, *table.rows]), *table.notes]
    return "\n".join([*parts, str(page)])
