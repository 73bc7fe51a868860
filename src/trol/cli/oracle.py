"""`trol oracle`: how few layers would do, were each sequence's level chosen by its reference.

`trol oracle --router`: a router trained on what the oracle saw, saved as an adapter.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from trol.cli import terminal
from trol.cli.models import read_plan
from trol.cli.terminal import run_record
from trol.errors import UsageError, unknown

if TYPE_CHECKING:
    from trol.evaluation.oracle import Questions
    from trol.evaluation.oracle_store import Menu, Store


EXAMPLES = (
    "trol oracle runs/decoder --menu uniform:8 --questions 500 --out runs/oracle",
    "trol oracle --task boards --menu 'all,0,1' --questions 100 --out runs/oracle-boards",
    "trol oracle runs/decoder --split train --router runs/router --out runs/oracle-train",
)

SCOPES = ("answer", "all")


def oracle(
    model: terminal.Model = terminal.DEFAULT_MODEL,
    *,
    task: Annotated[
        str | None,
        typer.Option(
            "--task",
            metavar="NAME",
            help="The questions: text:FILE, chat:FILE, alpaca:FILE, ... Default: boards for a "
            "model that sees, else docstrings.",
        ),
    ] = None,
    metric: Annotated[
        str | None, typer.Option("--metric", metavar="NAME", help="Default: the task's first.")
    ] = None,
    menu: Annotated[
        str,
        typer.Option(
            "--menu", metavar="PLANS", help="Plans with commas between; uniform:8 is eight levels."
        ),
    ] = "uniform:8",
    questions: Annotated[
        int, typer.Option("--questions", metavar="N", help="Sequences of the set.")
    ] = 500,
    split: Annotated[
        str, typer.Option("--split", metavar="NAME", help="Of the task: train, validation, test.")
    ] = "test",
    scope: Annotated[
        str,
        typer.Option("--scope", metavar="ROLES", help="Who skips: answer (as the paper), all."),
    ] = "answer",
    samples: Annotated[
        int | None,
        typer.Option(
            "--samples",
            metavar="N",
            min=0,
            help="Answers drawn at full depth as a control. Default: levels - 1.",
        ),
    ] = None,
    router: Annotated[
        Path | None,
        typer.Option("--router", metavar="FOLDER", help="Train a router on what was found."),
    ] = None,
    after: Annotated[
        int, typer.Option("--after", metavar="K", min=0, help="Layers before the router chooses.")
    ] = 1,
    shard: Annotated[
        str, typer.Option("--shard", metavar="I/N", help="Do part I, from 0, of N parts.")
    ] = "0/1",
    seed: terminal.Seed = 0,
    chat_template: terminal.ChatTemplate = None,
    out: terminal.Out = Path("runs/oracle"),
    as_json: terminal.AsJson = False,
) -> None:
    """Find the fewest layers that do, if chosen by the references.

    Whatever is finished in DIR is not done again, and may be interrupted at any time.
    """
    from trol.checkpoints.adapter import check_writable
    from trol.cli.models import open_model
    from trol.data.conversations import read_template
    from trol.evaluation.oracle import check_shard, layers_of
    from trol.evaluation.oracle_store import Store, parsed, read_menu
    from trol.evaluation.tasks import default_task

    part = check_shard(shard)
    parsed(menu, read_plan)
    check_writable(out)
    _check(task, metric, questions, split, scope)
    template = None if chat_template is None else read_template(chat_template)
    if router is not None:
        check(router, scope, out)
    terminal.no_library_bars()
    with terminal.noise_to_stderr():
        opened, processor = open_model(model, chat_template=template)
        task = task or default_task(processor)
        metric = _metric(task, metric)
        levels = read_menu(menu, layers_of(opened), seed=seed, read=read_plan)
        if router is not None:
            check_menu(levels, after)
        asked = _questions(opened, processor, task, questions, split=split, scope=scope, seed=seed)
        asked = asked.drawing(len(levels.levels) - 1 if samples is None else samples)
        header = asked.header(opened, levels, task=task, split=split, layers=levels.layers)
        store = Store(out, header, part)
        _answer(opened, processor, asked, levels, store=store, part=part)
        result: dict[str, Any] = {
            "model": model,
            "task": task,
            "split": split,
            "scope": scope,
            "out": str(out),
        }
        result |= _solved(asked, levels, store, metric, part)
        if result["complete"]:
            result["run"] = run_record(seed)
            _write(out, result)
            if router is not None:
                result["router"] = train(
                    opened, processor, out, router, metric=metric, after=after, seed=seed
                )
    terminal.report(result, as_json=as_json, text=lambda: _told(result))


def _metric(task: str, metric: str | None) -> str:
    """The metric that the oracle chooses by; raises `UsageError` where the task has none such."""
    from trol.evaluation.metrics import check_metric
    from trol.evaluation.tasks import task_of

    metric = metric or task_of(task).metrics[0]
    check_metric(task, metric)
    return metric


def _check(task: str | None, metric: str | None, questions: int, split: str, scope: str) -> None:
    """Raises `UsageError` before a model is opened for what no model can do."""
    from trol.data.pairs import SPLITS
    from trol.evaluation.metrics import METRICS

    if task is not None:
        _metric(task, metric)
    elif metric is not None and metric not in METRICS:
        raise unknown("metric", metric, METRICS)
    if split not in SPLITS:
        raise unknown("split", split, SPLITS)
    if scope not in SCOPES:
        raise unknown("scope of an oracle", scope, SCOPES)
    if questions < 2:
        raise UsageError(f"--questions is {questions}; an oracle compares 2 or more sequences.")


def _questions(
    model: Any, processor: Any, task: str, count: int, *, split: str, scope: Any, seed: int
) -> Questions:
    from trol.evaluation.oracle import Questions
    from trol.evaluation.tasks import questions_of, task_of

    found = task_of(task)
    items = questions_of(model, processor, task, count, seed=seed, split=split)
    if len(items) < 2:
        raise UsageError(
            f"the {split} split of {task} has {len(items)} questions, and an oracle compares 2 or "
            "more; name another split or task."
        )
    return Questions(items, found.metrics, found.new_tokens, scope=scope, seed=seed)


def _answer(
    model: Any,
    processor: Any,
    asked: Questions,
    levels: Menu,
    *,
    store: Store,
    part: tuple[int, int],
) -> None:
    from trol.evaluation.oracle import answer_all

    try:
        with terminal.progress("oracle", "answer") as done:
            answer_all(model, processor, asked, levels, store, shard=part, done=done)
    except KeyboardInterrupt:
        terminal.note(
            f"Stopped. {store.folder} keeps what is finished; the same command goes on from there."
        )
        raise


def _solved(
    asked: Questions, levels: Menu, store: Store, metric: str, part: tuple[int, int]
) -> dict[str, Any]:
    """The report where all shards are finished, else which are missing."""
    from trol.evaluation.oracle_report import report
    from trol.evaluation.oracle_store import unique

    store.look_again()
    missing = asked.missing(levels, store, part[1])
    if missing:
        return {"complete": False, "missing": missing, "n": len(asked.items)}
    found = report(unique(store.rows()), levels, metric, asked.metrics, seed=asked.seed)
    return {"complete": True, **found}


def _write(out: Path, result: dict[str, Any]) -> None:
    from trol.reports import oracle

    oracle.write(result, out)


def _told(result: dict[str, Any]) -> str:
    from trol.reports.oracle import tables_of

    if not result["complete"]:
        lacking = ", ".join(f"--shard {one}" for one in result["missing"])
        return f"This part is finished. Missing: {lacking}; run them with the same settings."
    rows = [["level", "layers", f"mean {result['metric']}"]]
    rows += [
        [level["plan"], str(level["cost"]), f"{level['mean'][result['metric']]:.4f}"]
        for level in result["menu"]
    ]
    lines = [terminal.table(rows), ""]
    for table in tables_of(result):
        lines += [terminal.table([table.heading, *table.rows]), *table.notes, ""]
    lines.append(f"{result['out']}/oracle.html")
    if "router" in result:
        lines += ["", told(result["router"], result["metric"])]
    return "\n".join(lines)


REPORT = "router.json"

FEW = 30
"""Held-out questions below which a router's figures say little."""


def check(folder: Path, scope: str, rows: Path) -> None:
    """Raises `UsageError` where no router can be trained on `rows`, or saved."""
    from trol.checkpoints.adapter import check_adapter_folder

    if scope != "answer":
        raise UsageError(
            f"--scope is {scope}, but a router chooses the layers of answers; leave --scope out."
        )
    if folder.resolve() == rows.resolve():
        raise UsageError(f"--router and --out are both {folder}; give the router its own folder.")
    check_adapter_folder(folder, beside=(REPORT,))


def check_menu(menu: Menu, after: int) -> None:
    """Raises `UsageError` where a router that chooses after `after` layers has no such menu."""
    from trol.policies.router import Router

    Router([level.plan for level in menu.levels], after=after).check(menu.layers)


def train(
    model: Any, processor: Any, rows: Path, folder: Path, *, metric: str, after: int, seed: int
) -> dict[str, Any]:
    """Trains a router on the rows of a finished oracle, and saves it with its report.

    Returns:
        `{"folder", "metric", "task", "split", ...}` and what `trol.training.routing.report`
        says of the questions that were held out.
    """
    import trol
    from trol.checkpoints.export import plain_host
    from trol.evaluation.oracle_store import read_header, read_rows
    from trol.evaluation.tasks import Item, fitted, prompts
    from trol.files import write_json
    from trol.training.routing import Lessons, train_router

    def inputs(some: Any) -> Any:
        items = [Item(None, row.question, row.reference, row.type) for row in some]
        return prompts(processor, [fitted(model, processor, item, 1) for item in items])

    trained = train_router(
        plain_host(model),
        processor,
        read_rows(rows),
        metric=metric,
        after=after,
        lessons=Lessons(seed=seed),
        prompts=inputs,
    )
    trol.save(model, folder)
    about = {name: read_header(rows)[name] for name in ("task", "split")}
    found = {"folder": str(folder), "metric": metric, **about, **trained.report}
    write_json(folder / REPORT, found)
    return found


def told(found: dict[str, Any], metric: str) -> str:
    """What the router does on questions that it did not learn from."""
    rows = [["dial", "layers", f"mean {metric}", "at random"]]
    for at in found["dials"]:
        scores = at["score"], at["random"]["score"]
        rows.append([f"{at['dial']:.1f}", f"{at['cost']:.2f}", *(f"{one:.4f}" for one in scores)])
    few = f"Fewer than {FEW} questions: these figures say little; ask more with --questions."
    return "\n".join(
        [
            f"The router, on {found['questions']} questions that it did not learn from:",
            terminal.table(rows),
            *([few] if found["questions"] < FEW else []),
            f"Learnt from the {found['split']} split of {found['task']}: measure it on another.",
            f"{found['folder']}: trol.load(model, {found['folder']!r})",
        ]
    )
