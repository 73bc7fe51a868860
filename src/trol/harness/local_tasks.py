"""trol's own tasks for other harnesses: questions as parquet, beside the harness's task file.

The functions below are named by the task files in `tasks/`.
"""

from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from trol.data.mixture import cache_folder
from trol.evaluation.answers import scores
from trol.evaluation.items import Item
from trol.evaluation.tasks import TASKS
from trol.files import whole_file, write_whole

LOCAL = ("boards", "docstrings")
"""Tasks that have a file for each harness."""

DATA = "DATA"
"""What stands in a task file where the name of its questions' file goes."""


def write_tasks(harness: str, *, questions: int = 2000, seed: int = 0) -> Path:
    """A folder of the harness's task files with their questions, made on first use.

    Args:
        harness: its name.
        questions: of each task at most so many.
        seed: which of them.
    """
    folder = cache_folder() / "harness" / harness / f"{questions}-{seed}"
    for name in LOCAL:
        data = folder / f"{name}.parquet"
        if not data.exists():
            _write_questions(name, questions, seed, data)
        template = (files("trol.harness") / "tasks" / harness / f"{name}.yaml").read_text()
        write_whole(folder / f"{name}.yaml", template.replace(DATA, str(data)))
    return folder


def _write_questions(name: str, questions: int, seed: int, path: Path) -> None:
    import datasets  # noqa: PLC0415 - heavy, and only harnesses need it

    items = TASKS[name].items(questions, seed)
    rows = [{"question": i.question, "answer": i.answer, "type": i.type} for i in items]
    columns: dict[str, Any] = {key: datasets.Value("string") for key in rows[0]}
    if any(item.picture for item in items):
        columns["image"] = datasets.Image()
        rows = [{**row, "image": item.picture} for row, item in zip(rows, items, strict=True)]
    table = datasets.Dataset.from_list(rows, features=datasets.Features(columns))
    with whole_file(path) as draft:
        table.to_parquet(str(draft))


def exact(doc: Mapping[str, Any], results: Sequence[str], **_: Any) -> dict[str, float]:
    """Whether the answer has the reference's words."""
    return {"exact": _score("exact", doc, results)}


def rouge(doc: Mapping[str, Any], results: Sequence[str], **_: Any) -> dict[str, float]:
    """The answer's rougeL."""
    return {"rougeL": _score("rougeL", doc, results)}


def _score(metric: str, doc: Mapping[str, Any], results: Sequence[str]) -> float:
    item = Item(None, doc["question"], doc["answer"], doc["type"])
    return scores(metric, [results[0]], [item])[0]


def pictures(doc: Mapping[str, Any], **_: Any) -> list[Any]:
    """The picture that the question is about, or none."""
    return [doc["image"].convert("RGB")] if "image" in doc else []


def question(doc: Mapping[str, Any], **_: Any) -> str:
    """The question's text."""
    return doc["question"]
