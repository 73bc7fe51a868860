"""`trol eval`: scores per question type, beside chance."""

from pathlib import Path
from typing import Annotated, Any

from trol.cli import terminal
from trol.cli.terminal import listed, option, run_record
from trol.errors import UsageError, unknown

EXAMPLES = (
    "trol eval --tasks boards",
    "trol eval smollm2 --tasks text:README.md --window 512 --json",
    "trol eval trol-tiny --harness lm-eval --tasks boards --depth all --questions 300",
)
TASKS_HELP = (
    "text:FILE (plain text: loss, perplexity; any language model), chat:FILE (JSON Lines of "
    "messages, or prompt and reference), alpaca:FILE, cnn_dailymail:FILE, samsum:FILE; for models "
    "trained here boards (pictures) and docstrings (facts about Python's library). Default: boards "
    "for a model that sees, else docstrings."
)
METRICS_HELP = "Of rouge1, rouge2, rougeL, exact, contains, loss. Default: all of the task."
NEW_TOKENS_HELP = "Longest answer. Default: the task's: boards 4, alpaca and the like 300, else 64."
QUESTIONS = 2000
"""Questions, or windows, per task."""

QUESTIONS_HELP = "Questions, or windows, per task. Default: 2000; of a suite, all."
HARNESS_HELP = "lm-eval or lmms-eval: ask their tasks (or boards, docstrings) their way."
SUITE_HELP = "trol: the sixteen sets of its paper, those that are on disk, beside its figures."
BESIDE_HELP = "With --suite: the model whose published figures stand beside this run's."
OUT_HELP = "With --suite: a folder that keeps each set's figure, to go on with."
WINDOW_HELP = "Tokens of text:FILE read at once. Default: 1024, or the model's positions."


def evaluate(
    model: terminal.Model = terminal.DEFAULT_MODEL,
    *,
    tasks: Annotated[str | None, option("--tasks", "NAMES", TASKS_HELP)] = None,
    metrics: Annotated[str, option("--metrics", "NAMES", METRICS_HELP)] = "",
    questions: Annotated[int | None, option("--questions", "N", QUESTIONS_HELP, min=1)] = None,
    new_tokens: Annotated[int | None, option("--new-tokens", "N", NEW_TOKENS_HELP, min=1)] = None,
    window: Annotated[int | None, option("--window", "N", WINDOW_HELP, min=2)] = None,
    harness: Annotated[str | None, option("--harness", "NAME", HARNESS_HELP)] = None,
    suite: Annotated[str | None, option("--suite", "NAME", SUITE_HELP)] = None,
    published: Annotated[str | None, option("--published", "NAME", BESIDE_HELP)] = None,
    out: Annotated[Path | None, option("--out", "DIR", OUT_HELP)] = None,
    chat_template: terminal.ChatTemplate = None,
    depth: terminal.Depth = None,
    seed: terminal.Seed = 0,
    as_json: terminal.AsJson = False,
) -> None:
    """Measure MODEL on pictures and texts that it never saw.

    A model without a chat template is asked in plain text: question, line break, answer. Under
    torchrun the processes share the questions.
    """
    from trol.cli.conversation import open_conversation
    from trol.family.pretrained import origin
    from trol.harness.opening import on_accelerator
    from trol.host import processes

    names = None if tasks is None else listed(tasks)
    own = {"--metrics": metrics or None, "--new-tokens": new_tokens, "--window": window}
    _check_combined(names, harness, suite, own, {"--published": published, "--out": out})
    chosen = listed(metrics)
    with terminal.quiet_libraries():  # the file of a task may warn
        if suite is not None or harness is not None:
            _check_elsewhere(names, harness, suite, published)
        else:
            _check(names, chosen, window)
    processes.join()
    try:
        conversation = open_conversation(
            model, max_new_tokens=1, plan=depth, chat_template=chat_template
        )
        with terminal.quiet_libraries(), conversation.depth():
            opened = on_accelerator(conversation.model), conversation.processor
            if suite is not None:
                scores = _suite(
                    opened,
                    name=model,
                    depth=conversation.plan,
                    beside=published,
                    questions=questions,
                    out=out,
                )
            elif harness is not None:
                scores = _harness(opened, harness, names, questions, seed)
            else:
                scores = _own(
                    opened,
                    names,
                    questions=questions or QUESTIONS,
                    seed=seed,
                    metrics=chosen,
                    new_tokens=new_tokens,
                    window=window,
                )
    finally:
        processes.leave()
    if scores is None or not processes.is_first():
        return
    result = {"model": model, "weights": origin(model, conversation.model)}
    result |= {"depth": conversation.plan, **scores, "run": run_record(seed)}
    terminal.report(result, as_json=as_json, text=lambda: _text(result))


def _own(opened: tuple[Any, Any], names: list[str] | None, **settings: Any) -> dict[str, Any]:
    from trol import evaluation
    from trol.evaluation.tasks import default_task

    with terminal.progress("eval") as bar:
        return evaluation.evaluate(
            *opened,
            names or [default_task(opened[1])],
            shared=True,
            progress=lambda what, done, of: bar(int(done), of, what),
            **settings,
        )


def _harness(
    opened: tuple[Any, Any],
    harness: str,
    names: list[str] | None,
    questions: int | None,
    seed: int,
) -> dict[str, Any] | None:
    from trol.evaluation.tasks import default_task
    from trol.harness import run

    tasks = names or [default_task(opened[1])]
    scores = run(harness, *opened, tasks, questions=questions or QUESTIONS, seed=seed)
    return None if scores is None else {"harness": harness, **scores}


def _suite(opened: tuple[Any, Any], **settings: Any) -> dict[str, Any]:
    from trol.harness.suite import run_suite

    return {"suite": run_suite(*opened, **settings)}


def _check_combined(
    names: list[str] | None,
    harness: str | None,
    suite: str | None,
    own: dict[str, Any],
    of_suites: dict[str, Any],
) -> None:
    """Raises where one option is of no use beside another."""
    other = "--suite" if suite is not None else "--harness"
    useless = {"--tasks": names, "--harness": harness} if suite is not None else of_suites
    if suite is not None or harness is not None:
        useless = {**useless, **own}
    for name, value in useless.items():
        if value is not None and name in of_suites:
            raise UsageError(f"{name} goes with --suite; leave it out, or write --suite trol.")
        if value is not None:
            raise UsageError(f"{name} is of no use with {other}; leave one of them out.")


def _check_elsewhere(
    names: list[str] | None, harness: str | None, suite: str | None, published: str | None
) -> None:
    """Raises before a model is opened for what no harness and no suite can do."""
    from trol.harness import check_harness
    from trol.harness.packages import check_place
    from trol.harness.suite import SUITES, compared
    from trol.host import processes

    if suite is None:
        check_place(names or [])
        check_harness(str(harness))
        return
    if suite not in SUITES:
        raise unknown("suite", suite, SUITES)
    compared("", published)
    if processes.count() > 1:
        raise UsageError("a suite runs in one process; leave torchrun out.")


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


def _text(result: dict[str, Any]) -> str:
    """What is printed for people."""
    if "suite" in result:
        from trol.harness.suite import suite_rows

        rows, lines = suite_rows(result["suite"])
        nothing = f"{result['model']}: no set of the suite could be measured."
        table = terminal.table(rows) if len(rows) > 1 else nothing
        return "\n".join([table, *([""] if lines else []), *lines])
    if "harness" in result:
        columns = {result["harness"]: result["depth_columns"]}
        return "\n\n".join([_harness_table(result), _columns_table(columns)])
    columns = {name: task["depth_columns"] for name, task in result["tasks"].items()}
    return "\n\n".join([_table(result), _columns_table(columns)])


def _harness_table(result: dict[str, Any]) -> str:
    rows = [["task", "metric", result["harness"]]]
    for name, task in result["tasks"].items():
        for metric, value in task["metrics"].items():
            rows.append([f"{name} ({task['n']})" if task["n"] else name, metric, f"{value:.4f}"])
    lines = [f"{name}: left out; no data: {why}" for name, why in result["left_out"].items()]
    return "\n".join([terminal.table(rows), *lines])


COLUMNS = {
    "layer_visits_per_token": ("layer visits per token", 1),
    "flops_per_question": ("MFLOPs per question", 1e-6),
    "prefill_ms": ("prefill ms", 1),
    "decode_ms": ("decode ms", 1),
}
"""Depth column -> its heading, and what it is multiplied by."""


def _columns_table(measured: dict[str, dict[str, Any]]) -> str:
    """The depth columns of each task; `-` where one is not known."""
    rows = [["depth", *(heading for heading, _ in COLUMNS.values())]]
    for name, columns in measured.items():
        values = [(columns[key], factor) for key, (_, factor) in COLUMNS.items()]
        cells = ["-" if value is None else f"{value * factor:.2f}" for value, factor in values]
        rows.append([name, *cells])
    return terminal.table(rows)


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
