"""Tasks: sets of questions by name, and what a model scores on them."""

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal, get_args

from transformers import ProcessorMixin

from trol.data.boards import chance_by_type
from trol.data.hops import ANSWER
from trol.data.own_files import read_chats, read_text
from trol.data.pairs import BUILT_IN, NAMES, check_set, is_pairs
from trol.errors import DataError, HostError, UsageError, unknown
from trol.evaluation import sharing
from trol.evaluation.answers import METRICS, Around, answers, losses, mean_loss, scores
from trol.evaluation.depth_columns import DepthColumns
from trol.evaluation.items import (
    WHOLE,
    Item,
    Part,
    board_items,
    chat_items,
    fitted_prompts,
    pair_items,
    positions_of,
    text_items,
    tokenizer_of,
    topic_items,
)
from trol.evaluation.store import items_digest
from trol.host.chat_templates import own_template

SkipScope = Literal["answer", "all"]
"""Whose tokens skip layers in curves and oracles: those of answers alone, or the prompts' too."""

SCOPES: tuple[str, ...] = get_args(SkipScope)

WINDOW = 1024
"""Tokens of a window of plain text, or as many as the model has positions if these are fewer."""

TEXT_METRICS = ("rougeL", "rouge1", "rouge2", "exact", "contains", "loss")
"""Metrics of answers in sentences, the one they are judged by first."""

PAPERS_NEW_TOKENS = 300
"""Longest answer to Alpaca in Glavas et al. (arXiv 2410.20022)."""

GUESSES, GUESSED = 24, 100
"""Training answers that a blind guesser tries, on so many validation questions of each type."""

COSTED = 64
"""Tokens of plain text that depth columns are of: few, because nothing else is measured by it."""

LARGEST_EXPONENT = 700.0
"""Nats per token whose perplexity still fits a float."""


TaskProgress = Callable[[str, float, int], None]
"""Takes what is measured, items measured, items to measure."""


@cache
def blind_docstrings() -> dict[str, float]:
    """Type -> rougeL of giving one answer to all questions: the best of some training answers."""
    guesses = pair_items("docstrings", 5000, 0, "train")
    by_kind: dict[str, list[Item]] = defaultdict(list)
    for item in pair_items("docstrings", 5000, 0, "validation"):
        by_kind[item.type].append(item)
    best: dict[str, float] = {}
    for kind, all_items in by_kind.items():
        items = all_items[:GUESSED]
        tried = [item.answer for item in guesses if item.type == kind][:GUESSES]
        best[kind] = max(
            sum(scores("rougeL", [guess] * len(items), items)) / len(items) for guess in tried
        )
    return best


@dataclass(frozen=True)
class Task:
    """A set of items, what blind guessing scores, and what answers to them are measured by."""

    items: Callable[..., list[Item]]
    """(count, seed, split="test") -> items, fewer where there are no more; the same on every
    call. `questions_of` calls it."""
    chance: Callable[[], dict[str, float]] = field(default=dict)
    """Type -> score of a guess without looking; empty where it was never measured."""
    metrics: tuple[str, ...] = TEXT_METRICS
    """Metrics that the task has references for, the one it is judged by first."""
    new_tokens: int = 64
    """Longest answer. Unit: tokens."""
    windows: bool = False
    """Whether items are windows of plain text: `items` then wants `tokenizer` and `window` too."""
    splits: bool = True
    """Whether splits have other items; else all are the whole file, and `items` takes a `part`."""


TASKS: dict[str, Task] = {
    # Two words, a full stop and the end.
    "boards": Task(board_items, chance_by_type, ("exact", "loss"), new_tokens=4),
    "docstrings": Task(partial(pair_items, "docstrings"), lambda: dict(blind_docstrings())),
    # The letters and the end.
    **{
        name: Task(partial(pair_items, name), metrics=("exact", "loss"), new_tokens=ANSWER + 1)
        for name in ("hops", "hops4")
    },
    "pydoc": Task(topic_items, metrics=("loss",), windows=True),
}
"""The built-in tasks by name."""

OWN = {"text": read_text, "chat": read_chats}
"""How a file of the user's is named (`text:FILE`) -> its reader, which refuses other files."""

FORMS = (*TASKS, *(f"{form}:FILE" for form in OWN), *NAMES[len(BUILT_IN) :])
"""All that a task can be called."""


def task_of(name: str) -> Task:
    """A built-in task, or the one of a file: `text:FILE`, `chat:FILE`, or pairs (`alpaca:FILE`).

    Raises:
        UsageError: there is no such task.
        DataError: its file is missing, or is not what the name says.
    """
    if name in TASKS:
        return TASKS[name]
    if is_pairs(name):
        check_set(name)
        return Task(partial(pair_items, name), new_tokens=PAPERS_NEW_TOKENS)
    form, colon, file = name.partition(":")
    if form not in OWN or not colon:
        raise _unknown(name)
    if not file:
        raise UsageError(f"{name!r} names no file; write {form}:FILE.")
    OWN[form](Path(file))
    if form == "chat":
        return Task(partial(chat_items, Path(file)), splits=False)
    return Task(partial(text_items, Path(file)), metrics=("loss",), windows=True, splits=False)


def _unknown(name: str) -> UsageError:
    if not Path(name).is_file():
        return unknown("task", name, FORMS)
    return UsageError(
        f"unknown task {name!r}. Did you mean text:{name} (plain text) or chat:{name} (JSON Lines "
        f"of messages, or of prompt and reference)? Known: {', '.join(sorted(FORMS))}."
    )


def check_tasks(names: Sequence[str]) -> None:
    """Raises `UsageError` where a task is unknown or none is named."""
    if not names:
        raise UsageError(f"no task named; choose among {', '.join(FORMS)}.")
    for name in names:
        task_of(name)


def check_metric(task: str, metric: str) -> None:
    """Raises `UsageError` where the metric is unknown, or the task has no references for it."""
    if metric not in METRICS:
        raise unknown("metric", metric, METRICS)
    known = task_of(task).metrics
    if metric not in known:
        raise UsageError(
            f"the task {task} has no references for {metric}; measure it by {', '.join(known)}."
        )


def default_task(processor: Any) -> str:
    """The built-in task for a model: boards if it sees, docstrings if it reads text alone."""
    return "boards" if isinstance(processor, ProcessorMixin) else "docstrings"


def questions_of(
    model: Any,
    processor: Any,
    name: str,
    count: int,
    *,
    seed: int,
    split: str = "test",
    window: int | None = None,
    part: Part = WHOLE,
) -> list[Item]:
    """At most `count` items of a task, for this model; windows have `window` tokens.

    `part`: of a file that is the same in every split, from and to as shares of it.

    Raises:
        HostError: the task shows pictures, and this model cannot be shown any.
        UsageError: the model has fewer positions than a window has tokens.
    """
    task = task_of(name)
    of: dict[str, Any] = {} if task.splits else {"part": part}
    if not task.windows:
        items = task.items(count, seed, split, **of)
        check_reads(processor, name, items)
        return items
    most = positions_of(model)
    if window is not None and most is not None and window > most:
        raise UsageError(f"a window of {window} tokens, but the model has {most} positions.")
    window = window or min(WINDOW, most or WINDOW)
    return task.items(count, seed, split, tokenizer=tokenizer_of(processor), window=window, **of)


def check_reads(processor: Any, name: str, items: Sequence[Item]) -> None:
    """Raises `HostError` where items have pictures and the model cannot be shown any."""
    if not any(item.shows for item in items):
        return
    if not isinstance(processor, ProcessorMixin):
        raise HostError(
            f"the task {name} shows pictures, but this model reads text alone; name a model that "
            "sees, or a task of text such as docstrings."
        )
    if own_template(processor) is None:
        raise HostError(
            f"the task {name} shows pictures, but {type(processor).__name__} has no chat template "
            "that says where they stand; give one with --chat-template."
        )


def evaluate(
    model: Any,
    processor: Any,
    tasks: Sequence[str],
    *,
    questions: int = 1800,
    seed: int = 0,
    metrics: Sequence[str] = (),
    new_tokens: int | None = None,
    window: int | None = None,
    shared: bool = False,
    progress: TaskProgress = lambda what, done, of: None,
) -> dict[str, Any]:
    """Scores per question type of each task, and what one answer costs.

    Args:
        model: a model, attached or not.
        processor: its processor; of a text decoder, its tokenizer.
        tasks: names, as `task_of` takes them.
        questions: at most so many of each task; of plain text, windows.
        seed: which of them.
        metrics: what is measured; by default all that the task has references for.
        new_tokens: the longest answer; by default the task's.
        window: tokens of a window of plain text, by default as many as `questions_of` takes.
        shared: whether the processes that `torchrun` connected share the batches; then all of them
            call this, and get the same scores.
        progress: called as answers grow and references are read.

    Returns:
        `{"tasks": {name: ...}}`; of boards `{"accuracy", "n", "by_type", "n_by_type",
        "chance_by_type"}`, of text `{"metrics": {name: mean}, "metric", "n", "by_type",
        "n_by_type", "chance_by_type"}`, where types are scored by `metric`, the first one. Each
        task has its `depth_columns` (`DepthColumns.json`), of plain text those of reading
        `COSTED` tokens. Plain text has `perplexity`, `bits_per_byte`, `tokens` and `set`, a digest
        of what was read, as well, and its loss is per token.

    Raises:
        UsageError: a task is unknown, or has no references for a metric.
        HostError: a task shows pictures to a model that cannot be shown any.
    """
    check_tasks(tasks)
    for name in tasks:
        for metric in metrics:
            check_metric(name, metric)
    measured: dict[str, Any] = {}
    for name in tasks:
        task = task_of(name)
        task = task if new_tokens is None else replace(task, new_tokens=new_tokens)
        items = questions_of(model, processor, name, questions, seed=seed, window=window)
        columns = DepthColumns(model)
        measured[name] = measure_task(
            model,
            processor,
            task,
            items,
            name=name,
            metrics=metrics,
            # A trace takes time, and reading a window is no more than the model's own pass.
            around=nullcontext if task.windows else columns.batch,
            progress=progress,
            shared=shared,
        )
        if task.windows:
            with columns.batch(1):
                losses(model, processor, [replace(items[0], ids=items[0].ids[:COSTED])])
        else:
            columns.time(fitted_prompts(model, processor, items[:1], task.new_tokens))
        measured[name]["depth_columns"] = columns.json()
    return {"tasks": measured}


def validate(
    model: Any, processor: Any, *, questions: int = 540, task: str = "boards"
) -> dict[str, Any]:
    """The scores of `evaluate` for one task on its validation split, to watch training by."""
    items = questions_of(model, processor, task, questions, seed=0, split="validation")
    return measure_task(model, processor, task_of(task), items, name=task)


def measure_task(
    model: Any,
    processor: Any,
    task: Task,
    items: Sequence[Item],
    *,
    name: str,
    metrics: Sequence[str] = (),
    around: Around = nullcontext,
    progress: TaskProgress = lambda what, done, of: None,
    shared: bool = False,
) -> dict[str, Any]:
    """The scores of `evaluate` for one task.

    Args:
        model: a model, attached or not.
        processor: its processor; of a text decoder, its tokenizer.
        task: what is measured.
        items: its questions.
        name: for progress and errors.
        metrics: what is measured; by default all that the task has references for.
        around: what is open while a batch is answered or read.
        progress: called as answers grow and references are read.
        shared: whether connected processes share the questions; then all of them call this.
    """
    if not items:
        raise DataError(f"the task {name} has no question; ask for one at least.")
    measure = partial(_values, model, processor, task, around=around, shared=shared)
    if task.metrics[0] == "exact" and not metrics:
        report = partial(progress, "answers")
        values = measure(items, ["exact"], report=report)
        return {**_by_type(items, values["exact"]), "chance_by_type": task.chance()}
    wanted = list(metrics) or list(task.metrics)
    values = measure(items, wanted, report=partial(progress, name))
    if task.windows:
        read = {**_window_scores(items, values["loss"]), "set": items_digest(items)}
        return {**read, "metric": "loss", "chance_by_type": {}}
    by_type = _by_type(items, values[wanted[0]])
    del by_type["accuracy"]
    means = {metric: sum(each) / len(each) for metric, each in values.items()}
    chance = task.chance() if wanted[0] == task.metrics[0] else {}
    return {"metrics": means, "metric": wanted[0], **by_type, "chance_by_type": chance}


def _values(
    model: Any,
    processor: Any,
    task: Task,
    items: Sequence[Item],
    wanted: Sequence[str],
    *,
    around: Around,
    report: Callable[[float, int], None],
    shared: bool,
) -> dict[str, list[float]]:
    """Metric -> the score of each item; answers are generated if one of the metrics reads them."""
    mine = sharing.dealt(items) if shared else items
    texts: list[str] = []
    generates = list(wanted) != ["loss"]
    of, before = len(mine) * (generates + ("loss" in wanted)), len(mine) * generates
    if generates:
        texts = answers(
            model,
            processor,
            mine,
            new_tokens=task.new_tokens,
            around=around,
            progress=lambda done: report(done, of),
        )
        around = nullcontext  # what an answer costs is seen once
    values: dict[str, list[float]] = {}
    for metric in wanted:
        if metric == "loss":
            values[metric] = losses(
                model,
                processor,
                mine,
                around=around,
                progress=lambda done: report(before + done, of),
            )
        else:
            values[metric] = scores(metric, texts, mine)
        if shared:
            values[metric] = sharing.gathered(values[metric], len(items))
    return values


def _window_scores(items: Sequence[Item], values: Sequence[float]) -> dict[str, Any]:
    """Loss per token, perplexity and bits per byte of the predicted tokens of all windows."""
    loss, tokens = mean_loss(items, values), sum(item.weight for item in items)
    size = sum(len(item.answer.encode()) for item in items)
    return {
        "metrics": {
            "loss": loss,
            "perplexity": math.exp(min(loss, LARGEST_EXPONENT)),
            "bits_per_byte": loss * tokens / math.log(2) / size,
        },
        "n": len(items),
        "tokens": tokens,
        "by_type": {"text": loss},
        "n_by_type": {"text": len(items)},
    }


def _by_type(items: Sequence[Item], values: Sequence[float]) -> dict[str, Any]:
    """Mean score in all and by type, with the number of questions."""
    by_type: dict[str, list[float]] = defaultdict(list)
    for item, value in sorted(zip(items, values, strict=True), key=lambda one: one[0].type):
        by_type[item.type].append(value)
    return {
        "accuracy": sum(values) / len(items),
        "n": len(items),
        "by_type": {kind: sum(some) / len(some) for kind, some in by_type.items()},
        "n_by_type": {kind: len(some) for kind, some in by_type.items()},
    }
