"""Whatever a harness says comes back in one form; a task without data is named and left out."""

from pathlib import Path
from typing import Any

import pytest

from trol.errors import DataError, UsageError
from trol.evaluation.depth_columns import DepthColumns
from trol.harness import run, running
from trol.harness.running import _Evaluator


class Manager:
    """Knows the tasks of a harness."""

    def match_tasks(self, names: list[str]) -> list[str]:
        return [name for name in names if name in ("boards", "pope", "mmlu")]


class Model:
    """Has seen nothing."""

    columns = DepthColumns(None)


@pytest.fixture(autouse=True, params=["lm-eval", "lmms-eval"])
def harness(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """A harness that gives 0.5, has the data of boards alone, and in which the first one speaks."""

    def evaluate(**given: Any) -> dict[str, Any] | None:
        (task,) = given["tasks"]
        if task != "boards":
            raise FileNotFoundError(f"no data for\n {task}")
        values = {"exact,none": 0.5, "exact_stderr,none": 0.1, "f1,strict": 1, "alias": "boards"}
        return {"results": {task: values}, "n-samples": {task: {"effective": given["limit"]}}}

    evaluator = _Evaluator(Model(), Manager(), evaluate, {})
    monkeypatch.setattr(running, f"_{request.param.replace('-', '_')}", lambda *_, **__: evaluator)
    monkeypatch.setattr(running, "check_harness", lambda name: None)
    monkeypatch.setattr(running, "write_tasks", lambda *_, **__: tmp_path)
    return request.param


def test_figures_are_named_by_metric_and_filter(harness: str) -> None:
    result = run(harness, None, None, ["boards"], questions=7)
    assert result is not None
    assert result["tasks"] == {"boards": {"metrics": {"exact": 0.5, "f1,strict": 1}, "n": 7}}
    assert result["left_out"] == {}
    assert result["depth_columns"]["questions"] == 0


def test_a_task_without_data_is_named_and_left_out(harness: str) -> None:
    result = run(harness, None, None, ["pope", "boards", "mmlu"])
    assert result is not None
    assert list(result["tasks"]) == ["boards"]
    assert result["left_out"] == {"pope": "no data for pope", "mmlu": "no data for mmlu"}
    with pytest.raises(DataError, match="no data for pope, mmlu: no data for pope"):
        run(harness, None, None, ["pope", "mmlu"])


def test_a_task_that_the_harness_lacks_is_refused(harness: str) -> None:
    with pytest.raises(UsageError, match=f"{harness} has no task chess; of trol's own"):
        run(harness, None, None, ["boards", "chess"])
    with pytest.raises(UsageError, match="read by trol alone"):
        run(harness, None, None, ["text:notes.txt"])
