"""`trol eval`: scores per question type, beside chance."""

from typing import Annotated, Any

from trol.cli import terminal
from trol.cli.chat import open_conversation
from trol.cli.terminal import listed, option, run_record
from trol.errors import UsageError, unknown

EXAMPLES = (
    "trol eval --tasks boards",
    "trol eval trol-tiny --tasks boards --depth all --questions 300",
    "trol eval smollm2 --tasks text:README.md --window 512 --json",
)
TASKS_HELP = (
    "text:FILE (plain text: loss, perplexity; any language model), chat:FILE (JSON Lines of "
    "messages, or prompt and reference), alpaca:FILE, cnn_dailymail:FILE, samsum:FILE; for models "
    "trained here boards (pictures) and docstrings (facts about Python's library). Default: boards "
    "for a model that sees, else docstrings."
)
METRICS_HELP = "Of rouge1, rouge2, rougeL, exact, contains, loss. Default: all of the task."
NEW_TOKENS_HELP = "Longest answer. Default: the task's: boards 4, alpaca and the like 300, else 64."
WINDOW_HELP = "Tokens of text:FILE read at once. Default: 1024, or the model's positions."


def evaluate(
    model: terminal.Model = terminal.DEFAULT_MODEL,
    *,
    tasks: Annotated[str | None, option("--tasks", "NAMES", TASKS_HELP)] = None,
    metrics: Annotated[str, option("--metrics", "NAMES", METRICS_HELP)] = "",
    questions: Annotated[
        int, option("--questions", "N", "Questions, or windows, per task.", min=1)
    ] = 2000,
    new_tokens: Annotated[int | None, option("--new-tokens", "N", NEW_TOKENS_HELP, min=1)] = None,
    window: Annotated[int | None, option("--window", "N", WINDOW_HELP, min=2)] = None,
    chat_template: terminal.ChatTemplate = None,
    depth: terminal.Depth = None,
    seed: terminal.Seed = 0,
    as_json: terminal.AsJson = False,
) -> None:
    """Measure MODEL on pictures and texts that it never saw.

    A model without a chat template is asked in plain text: question, line break, answer.
    """
    from trol import evaluation
    from trol.evaluation.tasks import default_task

    names = None if tasks is None else listed(tasks)
    chosen = listed(metrics)
    with terminal.quiet_libraries():  # the file of a task may warn
        _check(names, chosen, window)
    conversation = open_conversation(
        model, max_new_tokens=1, plan=depth, chat_template=chat_template
    )
    with terminal.quiet_libraries(), conversation.depth(), terminal.progress("eval") as bar:
        scores = evaluation.evaluate(
            conversation.model,
            conversation.processor,
            names or [default_task(conversation.processor)],
            questions=questions,
            seed=seed,
            metrics=chosen,
            new_tokens=new_tokens,
            window=window,
            progress=lambda what, done, of: bar(int(done), of, what),
        )
    result = {"model": model, "depth": conversation.plan, **scores, "run": run_record(seed)}
    terminal.report(result, as_json=as_json, text=lambda: _table(result))


def _check(names: list[str] | None, metrics: list[str], window: int | None) -> None:
    """Raises before a model is opened for what no model can do."""
    from trol.evaluation.answers import METRICS
    from trol.evaluation.tasks import check_metric, check_tasks, task_of

    if names is not None:
        check_tasks(names)
    for metric in metrics:
        if metric not in METRICS:
            raise unknown("metric", metric, METRICS)
        for name in names or ():
            check_metric(name, metric)
    if window is not None and not any(task_of(name).windows for name in names or ()):
        raise UsageError("--window is for plain text; name a task text:FILE, or leave it out.")


def _table(result: dict[str, Any]) -> str:
    """Score and chance per question type of every task, then its other metrics."""
    parts: list[str] = []
    for name, task in result["tasks"].items():
        metric = task.get("metric", "accuracy")
        chances = task["chance_by_type"]
        rows = [[name, _heading(metric), *(["chance %"] if chances else [])]]
        for kind, value in task["by_type"].items():
            row = [kind, _number(value, metric)]
            rows.append([*row, *([_number(chances.get(kind), metric)] if chances else [])])
        whole = task["metrics"][metric] if "metrics" in task else task["accuracy"]
        counted = f"{task['n']} windows, {task['tokens']} tokens" if "tokens" in task else task["n"]
        rows.append([f"all ({counted})", _number(whole, metric)])
        others = {key: value for key, value in task.get("metrics", {}).items() if key != metric}
        rows += [[_heading(key), _number(value, key)] for key, value in others.items()]
        parts.append(terminal.table(rows))
    return "\n\n".join(parts)


NO_SHARES = {"loss": "loss", "perplexity": "perplexity", "bits_per_byte": "bits per byte"}
"""Metrics that are not shares of 1, and what a table calls them."""


def _heading(metric: str) -> str:
    return NO_SHARES.get(metric, f"{metric} %")


def _number(value: float | None, metric: str) -> str:
    if value is None:
        return ""
    return f"{value:.3f}" if metric in NO_SHARES else f"{100 * value:.1f}"
