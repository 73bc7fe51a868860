"""`trol oracle`: how few layers would do, were each sequence's level chosen by its reference.

`trol oracle --router`: a router trained on the rows of the oracle, saved as an adapter.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from trol.cli import models, terminal
from trol.cli.terminal import SCOPES, option, run_record
from trol.errors import UsageError, unknown

if TYPE_CHECKING:
    from trol.evaluation.oracle import Choose, Menu, Questions
    from trol.evaluation.plan_search import ChosenPlan
    from trol.evaluation.store import Store

EXAMPLES = (
    "trol oracle runs/decoder --menu influence:8 --questions 500 --out runs/oracle",
    "trol oracle --task boards --menu 'all,0,1' --questions 100 --out runs/oracle-boards",
    "trol oracle runs/decoder --split train --router runs/router --out runs/oracle-train",
)
MENU_HELP = "Plans with commas between; influence:8 is eight levels of that method of `trol plan`."
SAMPLES_HELP = "Answers drawn at full depth as a control. Default: levels - 1."

ROUTER_RESULT = "router.json"
FEW = 30
"""Held-out questions below which a router's figures say little."""


def oracle(
    model: terminal.Model = terminal.DEFAULT_MODEL,
    *,
    task: terminal.Task = None,
    metric: Annotated[str | None, option("--metric", "NAME", "Default: the task's first.")] = None,
    menu: Annotated[str, option("--menu", "PLANS", MENU_HELP)] = "influence:8",
    questions: Annotated[int, option("--questions", "N", "Sequences of the set.")] = 500,
    split: Annotated[
        str, option("--split", "NAME", "Of the task: train, validation, test.")
    ] = "test",
    scope: Annotated[
        str, option("--scope", "ROLES", "Tokens that skip: answer (as the paper), all.")
    ] = "answer",
    samples: Annotated[int | None, option("--samples", "N", SAMPLES_HELP, min=0)] = None,
    router: Annotated[
        Path | None, option("--router", "FOLDER", "Train a router on the oracle's rows.")
    ] = None,
    after: Annotated[int, option("--after", "K", "Layers before the router chooses.", min=0)] = 1,
    shard: terminal.Shard = None,
    seed: terminal.Seed = 0,
    chat_template: terminal.ChatTemplate = None,
    out: terminal.Out = Path("runs/oracle"),
    as_json: terminal.AsJson = False,
) -> None:
    """Find the fewest layers that do, if chosen by the references.

    Answers that DIR has are not asked again, so the command may be interrupted at any time.
    """
    from trol.checkpoints.adapter import check_writable
    from trol.evaluation.hidden_states import layers_of
    from trol.evaluation.oracle import answer_all, parsed, read_menu
    from trol.evaluation.shards import shard_of
    from trol.evaluation.store import Store
    from trol.evaluation.tasks import default_task
    from trol.policies.router import Router
    from trol.reports.oracle import write

    part, read = shard_of(shard), partial(_read, scope=scope)
    parsed(menu, read)
    check_writable(out)
    _check(task, metric, questions, split, scope)
    if router is not None:
        _check_router(router, scope, out)
    with terminal.quiet_libraries():
        opened, processor = models.open_model(model, chat_template=chat_template)
        task = task or default_task(processor)
        metric = _metric(task, metric)
        choose = _chooser(opened, processor, task, split=split, scope=scope, seed=seed)
        levels = read_menu(menu, layers_of(opened), seed=seed, read=read, choose=choose)
        if router is not None:
            Router([level.plan for level in levels.levels], after=after).check(levels.layers)
        asked = _questions(opened, processor, task, questions, split=split, scope=scope, seed=seed)
        asked = asked.drawing(len(levels.levels) - 1 if samples is None else samples)
        header = asked.header(opened, levels, task=task, split=split, layers=levels.layers)
        store = Store(out, header, part)
        hint = f"Stopped. {out} keeps what is finished; the same command goes on from there."
        with terminal.on_interrupt(lambda: hint), terminal.progress("oracle", "answer") as bar:
            answer_all(opened, processor, asked, levels, store, shard=part, done=bar)
        result: dict[str, Any] = {"model": model, "task": task, "split": split, "scope": scope}
        result["out"] = str(out)
        result |= _result(asked, levels, store, metric, part)
        if result["complete"]:
            result["run"] = run_record(seed)
            write(result, out)
            if router is not None:
                result["router"] = _train_router(
                    opened, processor, out, router, metric=metric, after=after, seed=seed
                )
    terminal.report(result, as_json=as_json, text=lambda: _text(result))


def _read(text: str, *, scope: str) -> ChosenPlan:
    """A plan of the menu; the first tokens that a file's plan leaves alone are those of prompts."""
    from trol.evaluation.plan_search import ChosenPlan

    given = models.given_plan(text)
    return ChosenPlan(given.plan, given.keep_first if scope == "all" else 0)


def _chooser(model: Any, processor: Any, task: str, *, split: str, scope: Any, seed: int) -> Choose:
    """Chooses plans for a menu, on other questions than those of the split that is asked."""
    from trol.evaluation.plan_search import CHOOSING, chosen_plan, items_to_choose_by
    from trol.evaluation.store import Measurements

    measured = Measurements()  # levels have many of them in common
    items: list[Any] = []

    def choose(method: str, share: float) -> ChosenPlan:
        if not items:
            chosen_by = items_to_choose_by(
                model, processor, task, seed=seed, judged=split, part=CHOOSING
            )
            items.extend(chosen_by)
        return chosen_plan(
            method, model, processor, items, share, scope=scope, seed=seed, measured=measured
        )

    return choose


def _check(task: str | None, metric: str | None, questions: int, split: str, scope: str) -> None:
    """Raises `UsageError` before a model is opened for what no model can do."""
    from trol.data.own_files import SPLITS
    from trol.evaluation.answers import METRICS

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


def _metric(task: str, metric: str | None) -> str:
    """The metric that the oracle chooses by; raises `UsageError` where the task lacks it."""
    from trol.evaluation.tasks import check_metric, task_of

    metric = metric or task_of(task).metrics[0]
    check_metric(task, metric)
    return metric


def _questions(
    model: Any, processor: Any, task: str, count: int, *, split: str, scope: Any, seed: int
) -> Questions:
    from trol.evaluation.oracle import Questions
    from trol.evaluation.plan_search import JUDGING
    from trol.evaluation.tasks import questions_of, task_of

    # Of a file of the user's, none that plans may have been chosen by.
    items = questions_of(model, processor, task, count, seed=seed, split=split, part=JUDGING)
    if len(items) < 2:
        raise UsageError(
            f"the {split} split of {task} has {len(items)} questions, and an oracle compares 2 or "
            "more; name another split or task."
        )
    kind = task_of(task)
    return Questions(items, kind.metrics, kind.new_tokens, scope=scope, seed=seed)


def _result(
    questions: Questions, menu: Menu, store: Store, metric: str, part: tuple[int, int]
) -> dict[str, Any]:
    """The report where all shards are finished, else which are missing."""
    from trol.evaluation.oracle_report import report
    from trol.evaluation.store import unique

    store.look_again()
    missing = questions.missing(menu, store, part[1])
    if missing:
        return {"complete": False, "missing": missing, "n": len(questions.items)}
    rows = unique(store.rows())
    return {
        "complete": True,
        **report(rows, menu, metric, questions.metrics, seed=questions.seed),
    }


def _text(result: dict[str, Any]) -> str:
    from trol.evaluation.shards import missing_text
    from trol.reports.oracle import tables_of

    if not result["complete"]:
        return missing_text(result["missing"])
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
        lines += ["", _router_text(result["router"])]
    return "\n".join(lines)


def _check_router(folder: Path, scope: str, rows: Path) -> None:
    """Raises `UsageError` where no router can be trained on `rows`, or saved."""
    from trol.checkpoints.adapter import check_adapter_folder

    if scope != "answer":
        raise UsageError(
            f"--scope is {scope}, but a router chooses the layers of answers; leave --scope out."
        )
    if folder.resolve() == rows.resolve():
        raise UsageError(f"--router and --out are both {folder}; give the router its own folder.")
    check_adapter_folder(folder, beside=(ROUTER_RESULT,))


def _train_router(
    model: Any, processor: Any, rows: Path, folder: Path, *, metric: str, after: int, seed: int
) -> dict[str, Any]:
    """Trains a router on the rows of a finished oracle, and saves it with its report.

    Returns:
        `{"folder", "metric", "task", "split", ...}` and what `trol.training.routing.router_report`
        says of the questions that were held out.
    """
    import trol
    from trol.checkpoints.export import plain_host
    from trol.evaluation.items import Item, fitted, prompts
    from trol.evaluation.store import read_header, read_rows
    from trol.files import write_json
    from trol.training.routing import RouterTrainingArgs, train_router

    def inputs(rows: Any) -> Any:
        items = [Item(None, row.question, row.reference, row.type) for row in rows]
        return prompts(processor, [fitted(model, processor, item, 1) for item in items])

    training = train_router(
        plain_host(model),
        processor,
        read_rows(rows),
        metric=metric,
        after=after,
        args=RouterTrainingArgs(seed=seed),
        prompts=inputs,
    )
    trol.save(model, folder)
    source = {name: read_header(rows)[name] for name in ("task", "split")}
    result = {"folder": str(folder), "metric": metric, **source, **training.report}
    write_json(folder / ROUTER_RESULT, result)
    return result


def _router_text(router: dict[str, Any]) -> str:
    """What the router does on questions that it did not learn from."""
    rows = [["dial", "layers", f"mean {router['metric']}", "at random"]]
    for at in router["dials"]:
        scores = at["score"], at["random"]["score"]
        rows.append([f"{at['dial']:.1f}", f"{at['cost']:.2f}", *(f"{one:.4f}" for one in scores)])
    lines = [
        f"The router, on {router['questions']} questions that it did not learn from:",
        terminal.table(rows),
    ]
    if router["questions"] < FEW:
        lines.append(
            f"Fewer than {FEW} questions: these figures say little; ask more with --questions."
        )
    return "\n".join(
        [
            *lines,
            f"Learnt from the {router['split']} split of {router['task']}: measure it on another.",
            f"{router['folder']}: trol.load(model, {router['folder']!r})",
        ]
    )
