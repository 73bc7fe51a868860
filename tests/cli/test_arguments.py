"""What no model could do is refused before one is opened."""

from pathlib import Path
from typing import Any, NoReturn

import pytest

from cli.command import run

REFUSED = {
    "plan": (
        (),
        ("--keep", "2"),
        ("--keep", "0.5", "--method", "no"),
        ("--keep", "0.5", "--scope", "no"),
        ("--keep", "0.5", "--method", "greedy", "--task", "no"),
        ("--method", "draft", "--scope", "all"),
        ("--keep", "0.5", "--out", "/proc/nope/plan.json"),
    ),
    "calibrate": (
        ("--questions", "16"),
        ("--questions", "16", "--exit", "margin"),
        ("--quality", "2"),
        ("--confidence", "0"),
        ("--exit", "no"),
        ("--exit", "margin", "--cost", "2"),
        ("--exit", "margin", "--cost", "0.5", "--quality", "0.5"),
        ("--cost", "0.5", "--quality", "0.5"),
        ("--data", "no"),
        ("--out", "/proc/nope"),
    ),
    "curve": (
        ("--tasks", "no"),
        ("--tasks", ""),
        ("--methods", "no"),
        ("--methods", "oracle"),
        ("--methods", "oracle", "--oracle", "absent"),
        ("--methods", "controller"),
        ("--methods", "skip,router"),
        ("--keep", "0.5:2"),
        ("--scope", "question"),
        ("--out", "/proc/nope"),
    ),
    "oracle": (
        ("--task", "no"),
        ("--metric", "no"),
        ("--menu", "uniform:8,no"),
        ("--menu", "unifrom:8"),
        ("--menu", "absent.json"),
        ("--questions", "1"),
        ("--split", "no"),
        ("--scope", "question"),
        ("--shard", "2/2"),
        ("--router", "r", "--scope", "all"),
        ("--out", "/proc/nope"),
    ),
    "export": (
        ("short", "--plan", "absent.json"),
        ("short", "--plan", "1-0"),
        ("/proc/nope", "--plan", "0-1"),
        ("short", "--plan", "0-1", "--task", "no"),
    ),
}


CASES = [(verb, *words) for verb, several in REFUSED.items() for words in several]


@pytest.mark.parametrize("words", CASES, ids=" ".join)
def test_it_is_refused_before_a_model_is_opened(
    words: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def opened(*_: Any, **__: Any) -> NoReturn:
        raise AssertionError("a model was opened")

    monkeypatch.setattr("trol.cli.models.open_model", opened)
    monkeypatch.chdir(tmp_path)
    assert run(words[0], "trol-tiny", *words[1:]) == 2
    assert capsys.readouterr().err.startswith(("trol: ", "Usage: "))
    assert not list(tmp_path.iterdir())
