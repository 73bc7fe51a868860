"""trol's own tasks for other harnesses are its own questions, and scored by its own metrics."""

from pathlib import Path

import datasets
import pytest
import yaml

from trol.evaluation.answers import scores
from trol.evaluation.tasks import TASKS
from trol.harness import local_tasks
from trol.harness.local_tasks import LOCAL, write_tasks
from trol.harness.packages import HARNESSES
from trol.harness.suite import _plain_yaml


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("name", LOCAL)
@pytest.mark.parametrize("harness", HARNESSES)
def test_the_files_hold_the_questions_of_the_task(harness: str, name: str, cache: Path) -> None:
    folder = write_tasks(harness, questions=12, seed=3)
    assert folder.is_relative_to(cache)
    content = _plain_yaml(folder / f"{name}.yaml")
    rows = datasets.load_dataset(
        "parquet", cache_dir=str(cache / "datasets"), **content["dataset_kwargs"]
    )[content["test_split"]]
    items = TASKS[name].items(12, 3)
    assert [(row["question"], row["answer"], row["type"]) for row in rows] == [
        (item.question, item.answer, item.type) for item in items
    ]
    for row, item in zip(rows, items, strict=True):
        assert ("image" in row) == (item.picture is not None)
        if item.picture is not None:
            assert row["image"].convert("RGB").tobytes() == item.picture.tobytes()
    settings = content["generation_kwargs"]
    longest = settings.get("max_gen_toks", settings.get("max_new_tokens"))
    assert longest == TASKS[name].new_tokens
    assert not settings["do_sample"]
    assert settings["until"] == []  # without it, both harnesses cut answers at an empty line


def test_files_are_made_once_and_apart_for_each_seed() -> None:
    first = write_tasks("lm-eval", questions=5)
    before = (first / "boards.parquet").stat().st_mtime_ns
    assert write_tasks("lm-eval", questions=5) == first
    assert (first / "boards.parquet").stat().st_mtime_ns == before
    other = write_tasks("lm-eval", questions=5, seed=1)
    assert (other / "boards.parquet").read_bytes() != (first / "boards.parquet").read_bytes()


@pytest.mark.parametrize(("name", "metric"), [("boards", "exact"), ("docstrings", "rougeL")])
def test_an_answer_scores_what_it_scores_in_trol(name: str, metric: str) -> None:
    for harness in HARNESSES:
        text = (write_tasks(harness, questions=3) / f"{name}.yaml").read_text()
        function = text.partition("process_results: !function ")[2].split()[0].rpartition(".")[2]
        for item in TASKS[name].items(20, 0):
            doc = {"question": item.question, "answer": item.answer, "type": item.type}
            for said in (item.answer, item.answer.upper() + ".", "no", ""):
                scored = getattr(local_tasks, function)(doc, [said])
                assert scored == {metric: scores(metric, [said], [item])[0]}
        (listed,) = yaml.safe_load(text.partition("metric_list:")[2].partition("metadata")[0])
        assert listed["metric"] == metric
