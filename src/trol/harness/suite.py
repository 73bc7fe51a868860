"""The papers' sets: what is on disk is measured through lmms-eval, beside what was published."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import constants

from trol.checkpoints.adapter import text_digest, weights_digest
from trol.data.mixture import cache_folder
from trol.errors import DataError, HostError, UsageError, unknown
from trol.evaluation.store import Measurements
from trol.files import folder, write_whole
from trol.harness.packages import check_harness
from trol.harness.running import run

SUITES = ("trol",)
"""Names of suites."""

HARNESS = "lmms-eval"


@dataclass(frozen=True)
class Part:
    """One task of a set, and the metric that counts."""

    task: str
    metric: str
    scale: float
    """What 1 of the metric counts."""
    aggregations: Mapping[str, str] = field(default_factory=dict)
    """Metric -> the function that is taken in place of the harness's own."""


@dataclass(frozen=True)
class PublishedSet:
    """One set, how it is asked, and what was published; the fields of `published.yaml`."""

    name: str
    data: str
    folder: str
    parts: tuple[Part, ...]
    metric: str
    prompt: str
    tokens: int
    published: Mapping[str, float]
    combined: str = "mean"
    decided_by: str = ""
    contradiction: str = ""
    note: str = ""

    @property
    def place(self) -> Path | None:
        """The folder of its files on disk, the newest of several; None where there is none."""
        kept = Path(constants.HF_HUB_CACHE) / f"datasets--{self.data.replace('/', '--')}"
        snapshots = [one for one in kept.glob("snapshots/*") if any(one.rglob("*.parquet"))]
        return max(snapshots, key=lambda one: one.stat().st_mtime, default=None)

    @property
    def had_by(self) -> str:
        """The command that brings its files."""
        return f"hf download --repo-type dataset {self.data}"

    def value(self, metrics: Mapping[str, Mapping[str, float]]) -> float:
        """The set's figure, of task -> metric -> value."""
        values = [part.scale * metrics[part.task][part.metric] for part in self.parts]
        return sum(values) if self.combined == "sum" else sum(values) / len(values)


@dataclass(frozen=True)
class Published:
    """The file `published.yaml`."""

    source: str
    beams: int
    sets: tuple[PublishedSet, ...]

    @property
    def models(self) -> list[str]:
        """All models that have a figure."""
        return list(dict.fromkeys(name for one in self.sets for name in one.published))


@cache
def published() -> Published:
    """The sets with their settings and figures, as the package has them."""
    content = yaml.safe_load(resources.files("trol.harness").joinpath("published.yaml").read_text())
    sets = []
    for given in content.pop("sets"):
        parts = tuple(Part(**part) for part in given.pop("parts"))
        sets.append(PublishedSet(parts=parts, **given))
    return Published(sets=tuple(sets), **content)


def compared(model: str, name: str | None = None) -> str:
    """The published model whose figures stand beside a run's: the one that is named, or its size.

    Raises:
        UsageError: nothing was published of a model of that name.
    """
    models = published().models
    if name is not None:
        if name not in models:
            raise unknown("published model", name, models)
        return name
    own = [one for one in models if one.lower() in str(model).lower()]
    return own[0] if own else models[0]


def run_suite(
    model: Any,
    processor: Any,
    *,
    name: str,
    beside: str | None = None,
    depth: str | None = None,
    questions: int | None = None,
    out: Path | None = None,
) -> dict[str, Any]:
    """Measures a model on all sets that are on disk.

    Args:
        model: the model, attached or not.
        processor: its processor.
        name: what it is called.
        beside: the published model whose figures stand beside this run's.
        depth: what is in force, for the file of answers.
        questions: of each task at most so many; all of them by default.
        out: a folder that keeps each set's figures, so that a run that was stopped goes on.

    Returns:
        `{"source", "published", "sets": [{"name", "state", "value", "published", "difference",
        ...}]}`, where state is measured, missing, judged or failed.

    Raises:
        UsageError: nothing was published of `beside`; or `out` holds answers of another run.
        HostError: a set is on disk, but the harness that asks it is not installed.
    """
    beside = compared(name, beside)
    chosen = [one for one in published().sets if one.place and not one.decided_by]
    if chosen:
        check_harness(HARNESS)
    header = {
        "model": name,
        "weights": weights_digest(model),
        "depth": depth,
        "questions": questions,
        "sets": text_digest(repr(published())),
    }
    kept = Measurements(None if out is None else folder(out) / "answers.jsonl", header)
    results: dict[str, Any] = {}
    for one in chosen:
        try:
            results[one.name] = kept.value(
                one.name, lambda one=one: _measured(one, model, processor, questions, out)
            )
        except (HostError, UsageError):
            raise
        except Exception as error:  # a set in another form than the harness expects; it is not kept
            why = " ".join(str(error).split())
            results[one.name] = {"failed": f"{type(error).__name__}: {why}"}
    rows = [_row(one, results.get(one.name), beside) for one in published().sets]
    return {"source": published().source, "published": beside, "sets": rows}


def _measured(
    one: PublishedSet, model: Any, processor: Any, questions: int | None, out: Path | None
) -> dict[str, Any]:
    tasks = list(dict.fromkeys(part.task for part in one.parts))
    files = task_files(one)
    result = run(HARNESS, model, processor, tasks, questions=questions, files=files, out=out)
    assert result is not None  # the suite runs in one process
    for task, why in result["left_out"].items():
        raise DataError(f"no data for {task}: {why}")
    metrics = {task: values["metrics"] for task, values in result["tasks"].items()}
    return {"value": one.value(metrics), "depth_columns": result["depth_columns"]}


def task_files(one: PublishedSet) -> Path:
    """A folder of task files: the harness's own with the set's place and the paper's settings."""
    theirs = Path(str(resources.files("lmms_eval") / "tasks" / one.folder))
    place = cache_folder() / "harness" / "suite" / one.folder
    for part in one.parts:
        path = _file_of(theirs, part.task)
        given = _plain_yaml(path)
        asked = dict(given.get("lmms_eval_specific_kwargs", {}).get("default", {}))
        if "post_prompt" in asked:
            asked["post_prompt"] = f"\n{one.prompt}" if one.prompt else ""
        content: dict[str, Any] = {
            "include": str(path),
            "task": part.task,
            "dataset_path": str(one.place),
            "dataset_kwargs": {},
            "generation_kwargs": {
                "max_new_tokens": one.tokens,
                "num_beams": published().beams,
                "do_sample": False,
            },
        }
        if asked:
            content["lmms_eval_specific_kwargs"] = {"default": asked}
        text = yaml.safe_dump(content, allow_unicode=True)
        if part.aggregations:
            text += "metric_list:\n" + "".join(
                f"  - {{metric: {metric}, aggregation: !function {function}, "
                "higher_is_better: true}\n"
                for metric, function in part.aggregations.items()
            )
        write_whole(place / f"{part.task}.yaml", text)
    return place


def _file_of(place: Path, task: str) -> Path:
    for path in sorted(place.glob("*.yaml")):
        if _plain_yaml(path).get("task") == task:
            return path
    raise HostError(f"{HARNESS} has no task {task} in {place}; install the release that is tested.")


class _Plain(yaml.SafeLoader):
    """Reads a task file without importing the functions that it names."""


_Plain.add_constructor("!function", lambda loader, node: None)


def _plain_yaml(path: Path) -> dict[str, Any]:
    """A task file with those that it includes; functions are None."""
    content = yaml.load(path.read_text(encoding="utf-8"), Loader=_Plain)
    if not isinstance(content, dict):
        return {}
    included = content.pop("include", [])
    included = [included] if isinstance(included, str) else included
    whole: dict[str, Any] = {}
    for name in included:
        whole |= _plain_yaml(path.parent / name)
    return whole | content


def _row(one: PublishedSet, result: Mapping[str, Any] | None, beside: str) -> dict[str, Any]:
    """One set's entry: a value only where it was measured."""
    row: dict[str, Any] = {
        "name": one.name,
        "state": "missing",
        "metric": one.metric,
        "data": one.data,
        "published": dict(one.published),
    }
    if one.contradiction:
        row["contradiction"] = one.contradiction
    if one.decided_by:
        return {**row, "state": "judged", "why": one.decided_by}
    if result is None:
        return {**row, "why": one.had_by}
    if "failed" in result:
        return {**row, "state": "failed", "why": result["failed"]}
    figure = one.published.get(beside)
    difference = None if figure is None else result["value"] - figure
    return {**row, "state": "measured", **result, "difference": difference}


def suite_rows(result: Mapping[str, Any]) -> tuple[list[list[str]], list[str]]:
    """The table's rows, heading first, and lines about what is not in it."""
    beside = result["published"]
    rows = [["set", beside, "this run", "difference"]]
    lines: list[str] = []
    states: dict[str, Sequence[str]] = {
        "missing": ("not on disk", "bring it with"),
        "judged": ("left out", "no program here marks it"),
        "failed": ("failed", "the harness said"),
    }
    for row in result["sets"]:
        mark = "*" if "contradiction" in row else ""
        if row["state"] == "measured":
            figure, difference = row["published"].get(beside), row["difference"]
            cells = [figure, row["value"], difference]
            shown = ["" if cell is None else f"{cell:.1f}" for cell in cells[:2]]
            last = "" if difference is None else f"{difference:+.1f}"
            rows.append([row["name"] + mark, *shown, last])
        else:
            state, what = states[row["state"]]
            lines.append(f"{row['name']}: {state}; {what}: {row['why']}")
        if mark:
            lines.append(f"* {row['name']}: {row['contradiction']}")
    return rows, lines
