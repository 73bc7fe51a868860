"""Calling a harness with an opened model; what it says comes back in the form of `trol eval`."""
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

import logging
import sys
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trol.data.mixture import cache_folder
from trol.errors import HostError, UsageError
from trol.files import folder
from trol.harness.local_tasks import LOCAL, write_tasks
from trol.harness.packages import check_harness, check_place
from trol.host.chat_templates import own_template


def run(
    harness: str,
    model: Any,
    processor: Any,
    tasks: Sequence[str],
    *,
    questions: int | None = 2000,
    seed: int = 0,
    files: Path | None = None,
    out: Path | None = None,
) -> dict[str, Any] | None:
    """Measures a model on tasks of a harness; the policy in force is the one that answers.

    Where `torchrun` started several processes, all of them call this, and only the first gets the
    result.

    Args:
        harness: lm-eval or lmms-eval.
        model: the model, attached or not.
        processor: its processor; of a text decoder, its tokenizer.
        tasks: names, trol's own (boards, docstrings) or the harness's.
        questions: of each task at most so many; all of the harness's own by default.
        seed: which of trol's own.
        files: a folder of task files, which are all that is needed; without, the harness reads
            all of its own, which takes a while.
        out: where files go that a task of the harness writes.

    Returns:
        `{"tasks": {name: {"metrics", "n"}}, "depth_columns"}`; None in other processes.

    Raises:
        UsageError: no such harness or task.
        HostError: the harness is not installed, or not as it is tested.
    """
    check_place(list(tasks))
    check_harness(harness)
    if files is None and set(tasks) & set(LOCAL):
        places = [write_tasks(harness, questions=questions or 2000, seed=seed)]
    else:
        places = [] if files is None else [files]
    paths = [str(place) for place in places]
    enough = files is not None or set(tasks) <= set(LOCAL)
    if harness == "lm-eval":
        return _lm_eval(
            model, processor, list(tasks), paths=paths, enough=enough, questions=questions
        )
    return _lmms_eval(
        model, processor, list(tasks), paths=paths, enough=enough, questions=questions, out=out
    )


def _lm_eval(
    model: Any,
    processor: Any,
    tasks: list[str],
    *,
    paths: list[str],
    enough: bool,
    questions: int | None,
) -> dict[str, Any] | None:
    import lm_eval  # noqa: PLC0415 - heavy, and an extra
    from lm_eval.tasks import TaskManager  # noqa: PLC0415

    from trol.harness.lm_eval import wrapped  # noqa: PLC0415

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager = TaskManager(include_path=paths or None, include_defaults=not enough)
    _check_known(tasks, manager, "lm-eval")
    asked = wrapped(model, processor)
    results = lm_eval.simple_evaluate(
        model=asked,
        tasks=tasks,
        task_manager=manager,
        limit=questions,
        apply_chat_template=own_template(processor) is not None,
        bootstrap_iters=0,
        log_samples=False,
    )
    return None if results is None else _result(results, asked.columns.json())


def _lmms_eval(
    model: Any,
    processor: Any,
    tasks: list[str],
    *,
    paths: list[str],
    enough: bool,
    questions: int | None,
    out: Path | None,
) -> dict[str, Any] | None:
    from loguru import logger  # noqa: PLC0415 - comes with lmms-eval

    logger.remove()
    logger.add(sys.stderr, level="ERROR")
    from lmms_eval.evaluator import simple_evaluate  # noqa: PLC0415 - heavy, and an extra
    from lmms_eval.tasks import TaskManager  # noqa: PLC0415

    from trol.harness.lmms_eval import TrolChat  # noqa: PLC0415

    manager = TaskManager(
        "ERROR", include_path=paths, include_defaults=not enough, model_name="trol"
    )
    _check_known(tasks, manager, "lmms-eval")
    asked = TrolChat(model, processor)
    results = simple_evaluate(
        model=asked,
        tasks=tasks,
        task_manager=manager,
        limit=questions,
        bootstrap_iters=0,
        log_samples=False,
        cli_args=Namespace(
            output_path=str(folder(out or cache_folder() / "harness" / "out")),
            process_with_media=False,
        ),
    )
    return None if results is None else _result(results, asked.columns.json())


def _check_known(tasks: Sequence[str], manager: Any, harness: str) -> None:
    absent = [task for task in tasks if not manager.match_tasks([task])]
    if absent:
        raise UsageError(
            f"{harness} has no task {', '.join(absent)}; of trol's own it can ask "
            f"{', '.join(LOCAL)}."
        )


def _result(results: Mapping[str, Any], columns: dict[str, Any]) -> dict[str, Any]:
    """The harness's numbers: `"exact,none": 0.9` as `exact`, other filters with their name."""
    tasks = {}
    for task, values in results["results"].items():
        metrics = {
            key.removesuffix(",none"): value
            for key, value in values.items()
            if isinstance(value, int | float) and "," in key and "_stderr" not in key
        }
        counted = results.get("n-samples", {}).get(task, {})
        tasks[task] = {"metrics": metrics, "n": counted.get("effective")}
    if not tasks:
        raise HostError("the harness measured nothing; see what it said above.")
    return {"tasks": tasks, "depth_columns": columns}
