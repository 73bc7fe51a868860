"""Every kind of damage through `trol data check`, and then through training."""

import json
from pathlib import Path
from typing import Any

import pytest

from data.samples import jpeg, lines, mixture_file, opened, said
from trol.cli import main
from trol.data.check import check
from trol.data.formats import KINDS
from trol.errors import UsageError
from trol.family import tiny_processor

CUT = jpeg()[: len(jpeg()) // 2]
DAMAGED: dict[str, Any] = {
    "broken_row": '{"messages": [',
    "wrong_format": {"text": "hi"},
    "role_order": {"messages": said("hi")["messages"][::-1]},
    "empty_question": said(" "),
    "empty_answer": said("hi", "\n"),
    "image_count": said("<image>hi", image=["a.jpg", "a.jpg"]),
    "image_missing": said("<image>hi", image="none.jpg"),
    "image_unreadable": said("<image>hi", image="cut.jpg"),
    "image_url": said("<image>hi", image="https://example.org/a.jpg"),
    "too_long": said("hi", "yes " * 4000),
}


@pytest.fixture
def damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A mixture file: a source with every kind of damage among sound rows, and a sound one."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "a.jpg").write_bytes(jpeg(size=16))
    (tmp_path / "cut.jpg").write_bytes(CUT)
    rows = [row for bad in DAMAGED.values() for row in (said("<image>hi", image="a.jpg"), bad)]
    lines(tmp_path / "bad.jsonl", rows)
    lines(tmp_path / "good.jsonl", [said("hi")] * 3)
    sources = {"bad": {"path": "bad.jsonl", "count": 10}, "good": {"path": "good.jsonl"}}
    return mixture_file(tmp_path, sources)


def test_every_kind_of_damage_has_a_row_here() -> None:
    assert list(DAMAGED) == list(KINDS)


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    with pytest.raises(SystemExit) as left:
        main(["data", "check", *words])
    return int(left.value.code or 0), capsys.readouterr().out


def test_the_command_counts_lists_and_then_accepts(
    damaged: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = ("--processor", "trol-tiny", "--workers", "1")
    code, out = run(capsys, str(damaged), "--json", *model)
    result = json.loads(out)
    bad, good = result["sources"]
    assert code == 1
    assert bad["damaged"] == dict.fromkeys(DAMAGED, 1)
    assert (bad["rows"], bad["sound"], bad["counted"], bad["too_long"]) == (20, 10, True, 1)
    assert (good["damaged"], good["sound"], good["expected"]) == ({}, 3, None)
    assert (result["damaged"], result["new"]) == (10, 10)
    listed = Path(result["quarantine"]).read_text().splitlines()[1:]
    found = [json.loads(line) for line in listed]
    assert [one["reason"] for one in found] == list(DAMAGED)
    assert [one["row"] for one in found] == list(range(1, 20, 2))

    code, out = run(capsys, str(damaged), *model)
    assert code == 0, "all damage is quarantined"
    assert "10 damaged rows are listed in" in out
    mixture = opened(damaged.parent, {"bad": {"path": "bad.jsonl"}, "good": {"path": "good.jsonl"}})
    assert mixture.skipped == {"bad": dict.fromkeys(DAMAGED, 1)}
    assert all(mixture[number] for number in range(len(mixture)))


def test_without_a_model_lengths_are_not_checked(
    damaged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    elsewhere = tmp_path / "lists" / "bad.jsonl"
    code, out = run(capsys, str(damaged), "--quarantine", str(elsewhere), "--workers", "1")
    assert code == 1
    assert out.splitlines()[1].split()[:5] == ["bad", "20", "13", "11", "10"]
    assert "bad, row 1: broken_row: broken JSON" in out
    assert "... and 4 more" in out
    assert "bad has 11 sound rows, the mixture says 10" in out
    assert "not checked: rows too long" in out
    assert elsewhere.exists()
    assert not damaged.with_suffix(".quarantine.jsonl").exists()
    code, out = run(
        capsys, str(damaged), "--quarantine", str(elsewhere), "--workers", "1", "--json"
    )
    result = json.loads(out)
    assert (code, result["new"], result["sources"][0]["too_long"]) == (1, 0, None)


def test_a_sound_mixture_leaves_no_list(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    lines(tmp_path / "good.jsonl", [said("hi")])
    path = mixture_file(tmp_path, {"good": {"path": "good.jsonl", "count": 1}})
    assert run(capsys, str(path), "--workers", "1")[0] == 0
    assert not list(tmp_path.glob("*.quarantine.jsonl"))
    assert run(capsys, str(path), "--root", str(tmp_path / "none"))[0] == 1
    assert run(capsys, "none.yaml")[0] == 2


def test_an_unknown_action(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["data", "chekc", "mixture.yaml"])
    assert left.value.code == 2
    assert "Did you mean 'check'" in capsys.readouterr().err


def test_any_number_of_workers_finds_the_same(damaged: Path) -> None:
    lines(damaged.parent / "good.jsonl", [said("hi"), said("hi", "")] * 300)
    sources = {"bad": {"path": "bad.jsonl"}, "good": {"path": "good.jsonl"}}
    mixture, told = opened(damaged.parent, sources), []
    reports = [check(mixture, workers=workers, progress=told.append) for workers in (1, 2)]
    assert reports[0] == reports[1]
    assert sum(told) == 2 * 620
    assert reports[0].sources[1].damaged == {"empty_answer": 300}


def test_what_only_the_processor_refuses_is_found(tmp_path: Path) -> None:
    lines(tmp_path / "a.jsonl", [said("what does <image> mean?"), said("hi")])
    mixture = opened(tmp_path, {"a": {"path": "a.jsonl", "placeholder": "<|image|>"}})
    assert not check(mixture).damaged
    found = check(mixture, processor=tiny_processor(["hi yes"])).damaged
    assert [(one.row, one.reason) for one in found] == [(0, "wrong_format")]


def test_wrong_settings(tmp_path: Path) -> None:
    lines(tmp_path / "a.jsonl", [said("hi")])
    mixture = opened(tmp_path, {"a": {"path": "a.jsonl"}})
    with pytest.raises(UsageError, match="without a processor"):
        check(mixture, most_tokens=10)
    with pytest.raises(UsageError, match="workers is 0"):
        check(mixture, workers=0)
