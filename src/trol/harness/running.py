"""Calling a harness with an opened model; what it says comes back in the form of `trol eval`."""
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

import logging
import sys
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trol.data.mixture import cache_folder
from trol.errors import DataError, UsageError
from trol.files import folder
from trol.harness.local_tasks import LOCAL, write_tasks
from trol.harness.packages import check_harness, check_place
from trol.host.chat_templates import own_template


@dataclass(frozen=True)
class _Evaluator:
    """A harness with its model and tasks, ready to be called."""

    model: Any
    manager: Any
    call: Callable[..., Any]
    settings: dict[str, Any]


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
        `{"tasks": {name: {"metrics", "n"}}, "left_out": {name: why}, "depth_columns"}`, where a
        task is left out whose data are not there; None in other processes.

    Raises:
        UsageError: no such harness or task.
        HostError: the harness is not installed, or not as it is tested.
        DataError: there are data of no task.
    """
    check_place(list(tasks))
    check_harness(harness)
    if files is None and set(tasks) & set(LOCAL):
        places = [write_tasks(harness, questions=questions or 2000, seed=seed)]
    else:
        places = [] if files is None else [files]
    begin = {"lm-eval": _lm_eval, "lmms-eval": _lmms_eval}[harness]
    enough = files is not None or set(tasks) <= set(LOCAL)
    evaluator = begin(model, processor, [str(place) for place in places], enough=enough, out=out)
    _check_known(tasks, evaluator.manager, harness)
    measured, left_out = _measured(evaluator, tasks, questions)
    if len(left_out) == len(tasks):
        raise DataError(f"there are no data for {', '.join(tasks)}: {left_out[tasks[0]]}")
    if not measured:
        return None
    columns = evaluator.model.columns.json()
    return {"tasks": measured, "left_out": left_out, "depth_columns": columns}


def _measured(
    evaluator: _Evaluator, tasks: Sequence[str], questions: int | None
) -> tuple[dict[str, Any], dict[str, str]]:
    """The figures of each task, and why some are left out."""
    measured: dict[str, Any] = {}
    left_out: dict[str, str] = {}
    for task in tasks:
        try:
            results = evaluator.call(
                model=evaluator.model,
                tasks=[task],
                task_manager=evaluator.manager,
                limit=questions,
                bootstrap_iters=0,
                log_samples=False,
                **evaluator.settings,
            )
        except OSError as error:  # what the data sets' library raises where it finds nothing
            left_out[task] = " ".join(str(error).split())
            continue
        measured |= {} if results is None else _figures(results)
    return measured, left_out


def _lm_eval(
    model: Any, processor: Any, paths: list[str], *, enough: bool, out: Path | None
) -> _Evaluator:
    import lm_eval  # noqa: PLC0415 - heavy, and an extra
    from lm_eval.tasks import TaskManager  # noqa: PLC0415

    from trol.harness.lm_eval import wrapped  # noqa: PLC0415

    del out  # its tasks write nothing
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager = TaskManager(include_path=paths or None, include_defaults=not enough)
    chats = own_template(processor) is not None
    return _Evaluator(
        wrapped(model, processor),
        manager,
        lm_eval.simple_evaluate,
        {"apply_chat_template": chats},
    )


def _lmms_eval(
    model: Any, processor: Any, paths: list[str], *, enough: bool, out: Path | None
) -> _Evaluator:
    from loguru import logger  # noqa: PLC0415 - comes with lmms-eval

    logger.remove()
    logger.add(sys.stderr, level="ERROR")
    from lmms_eval.evaluator import simple_evaluate  # noqa: PLC0415 - heavy, and an extra
    from lmms_eval.tasks import TaskManager  # noqa: PLC0415

    from trol.harness.lmms_eval import TrolChat  # noqa: PLC0415

    manager = TaskManager(
        "ERROR", include_path=paths, include_defaults=not enough, model_name="trol"
    )
    arguments = Namespace(
        output_path=str(folder(out or cache_folder() / "harness" / "out")),
        process_with_media=False,
    )
    return _Evaluator(TrolChat(model, processor), manager, simple_evaluate, {"cli_args": arguments})


def _check_known(tasks: Sequence[str], manager: Any, harness: str) -> None:
    absent = [task for task in tasks if not manager.match_tasks([task])]
    if absent:
        raise UsageError(
            f"{harness} has no task {', '.join(absent)}; of trol's own it can ask "
            f"{', '.join(LOCAL)}."
        )


def _figures(results: Mapping[str, Any]) -> dict[str, Any]:
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
    return tasks
