"""The papers' sets: what is published, what stands beside it, and what is never counted."""

from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from trol.errors import HostError, UsageError
from trol.family.loading import load_model
from trol.harness import suite
from trol.harness.suite import PublishedSet, compared, published, run_suite, suite_rows

NAMES = [
    *("Q-Bench", "SQA-IMG", "AI2D", "ChartQA", "SEED-IMG", "POPE", "HallusionBench", "MME"),
    *("MathVista", "MMB", "MMB-CN", "MM-Vet", "LLaVA-W", "MMStar", "MathVerse", "VisualWebBench"),
]
JUDGED = {"MathVista", "MMB", "MMB-CN", "MM-Vet", "LLaVA-W", "MathVerse"}


@pytest.fixture(scope="module")
def opened() -> tuple[Any, Any]:
    return load_model("trol-tiny")


@pytest.fixture(autouse=True)
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def bring(hub: Path, name: str) -> PublishedSet:
    one = next(one for one in published().sets if one.name == name)
    folder = hub / f"datasets--{one.data.replace('/', '--')}" / "snapshots" / "abc" / "data"
    folder.mkdir(parents=True)
    (folder / "test.parquet").touch()
    return one


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Sets that were measured; each task's metric is 0.5."""
    seen: list[str] = []

    def measure(one: PublishedSet, *_: Any) -> dict[str, Any]:
        seen.append(one.name)
        metrics: dict[str, dict[str, float]] = {}
        for part in one.parts:
            metrics.setdefault(part.task, {})[part.metric] = 0.5
        return {"value": one.value(metrics), "depth_columns": {}}

    monkeypatch.setattr(suite, "_measured", measure)
    monkeypatch.setattr(suite, "check_harness", lambda name: None)
    return seen


def test_all_sixteen_sets_have_what_it_takes_to_ask_them() -> None:
    assert [one.name for one in published().sets] == NAMES
    for one in published().sets:
        assert one.parts
        assert one.data.count("/") == 1
        assert one.combined in ("mean", "sum")
        assert one.tokens in (5, 512, 1024)
        for size in ("TroL-1.8B", "TroL-3.8B", "TroL-7B"):
            assert one.published[size] > 0
        assert all(part.scale in (1, 100) for part in one.parts)
    assert {one.name for one in published().sets if one.decided_by} == JUDGED
    assert "2406.12246" in published().source
    disputed = {one.name for one in published().sets if one.contradiction}
    assert {"MMB", "MM-Vet", "LLaVA-W", "SQA-IMG"} <= disputed


def test_what_is_not_there_is_named_and_never_zero(opened: tuple[Any, Any]) -> None:
    result = run_suite(*opened, name="trol-tiny")
    assert [row["name"] for row in result["sets"]] == NAMES
    assert all("value" not in row and "difference" not in row for row in result["sets"])
    states = {row["name"]: row["state"] for row in result["sets"]}
    assert {name for name, state in states.items() if state == "judged"} == JUDGED
    assert {state for name, state in states.items() if name not in JUDGED} == {"missing"}
    rows, lines = suite_rows(result)
    assert len(rows) == 1  # the heading
    for one in published().sets:
        (line,) = [line for line in lines if line.startswith(f"{one.name}:")]
        assert (one.decided_by or f"hf download --repo-type dataset {one.data}") in line


def test_judged_sets_are_left_out_though_their_files_are_there(
    opened: tuple[Any, Any], hub: Path, measured: list[str]
) -> None:
    for name in ("MM-Vet", "LLaVA-W", "MMStar"):
        bring(hub, name)
    rows, lines = suite_rows(run_suite(*opened, name="trol-tiny"))
    assert measured == ["MMStar"]
    assert [row[0] for row in rows[1:]] == ["MMStar*"]
    assert sum(line.startswith(("MM-Vet: left out", "LLaVA-W: left out")) for line in lines) == 2


def test_a_set_stands_beside_its_published_figure(
    opened: tuple[Any, Any], hub: Path, measured: list[str]
) -> None:
    for name in ("MME", "VisualWebBench", "POPE"):
        bring(hub, name)
    result = run_suite(*opened, name="runs/my-trol-3.8b")
    assert result["published"] == "TroL-3.8B"
    found = {row["name"]: row for row in result["sets"] if row["state"] == "measured"}
    assert list(found) == measured == ["POPE", "MME", "VisualWebBench"]
    assert [row["value"] for row in found.values()] == [50.0, 1.0, 50.0]
    assert found["POPE"]["difference"] == pytest.approx(50 - 86.5)
    rows, _ = suite_rows(result)
    assert ["POPE", "86.5", "50.0", "-36.5"] in rows
    named = run_suite(*opened, name="x", beside="LLaVA-NeXT-7B")
    mme = next(row for row in named["sets"] if row["name"] == "MME")
    assert mme["difference"] == 1.0 - 1851


def test_a_model_without_a_figure_has_no_difference(
    opened: tuple[Any, Any], hub: Path, measured: list[str]
) -> None:
    bring(hub, "AI2D")
    rows, _ = suite_rows(run_suite(*opened, name="x", beside="LLaVA1.5-7B"))
    assert rows[1:] == [["AI2D", "", "50.0", ""]]


def test_a_run_goes_on_and_answers_of_another_are_refused(
    opened: tuple[Any, Any], hub: Path, measured: list[str], tmp_path: Path
) -> None:
    bring(hub, "POPE")
    out = tmp_path / "out"
    first = run_suite(*opened, name="a", out=out)
    bring(hub, "AI2D")
    second = run_suite(*opened, name="a", out=out)
    assert measured == ["POPE", "AI2D"]
    pope = [next(row for row in each["sets"] if row["name"] == "POPE") for each in (first, second)]
    assert pope[0] == pope[1]
    for other in ({"name": "b"}, {"depth": "0-1"}, {"questions": 3}):
        with pytest.raises(UsageError, match=next(iter(other)).replace("name", "model")):
            run_suite(*opened, **{"name": "a", "out": out, **other})
    model = load_model("trol-tiny")[0]
    next(model.parameters()).data.mul_(2)
    with pytest.raises(UsageError, match="weights"):
        run_suite(model, opened[1], name="a", out=out)
    assert measured == ["POPE", "AI2D"]


def test_a_set_that_fails_is_named_and_the_others_are_measured(
    opened: tuple[Any, Any], hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bring(hub, "POPE")

    def fails(*_: Any, **__: Any) -> None:
        raise KeyError("image")

    monkeypatch.setattr(suite, "run", fails)
    monkeypatch.setattr(suite, "task_files", lambda one: hub)
    monkeypatch.setattr(suite, "check_harness", lambda name: None)
    rows, lines = suite_rows(run_suite(*opened, name="trol-tiny"))
    assert len(rows) == 1
    assert any(line.startswith("POPE: failed; the harness said: KeyError") for line in lines)


def test_files_on_disk_need_the_harness(
    opened: tuple[Any, Any], hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bring(hub, "POPE")

    def absent(name: str) -> None:
        raise HostError(f"{name} is not installed")

    monkeypatch.setattr(suite, "check_harness", absent)
    with pytest.raises(HostError, match="lmms-eval is not installed"):
        run_suite(*opened, name="trol-tiny")


@pytest.mark.parametrize(
    ("name", "beside"),
    [("BK-Lee/TroL-7B", "TroL-7B"), ("x/trol-1.8b-mine", "TroL-1.8B"), ("trol-tiny", "TroL-1.8B")],
)
def test_the_published_model_is_the_one_of_its_name(name: str, beside: str) -> None:
    assert compared(name) == beside
    assert compared(name, "LLaVA1.5-7B") == "LLaVA1.5-7B"
