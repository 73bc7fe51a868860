"""The page of an oracle: whole, self-contained, and no gain told without its controls."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from evaluation.oracle_standins import rows_of
from trol.depth import Plan
from trol.errors import UsageError
from trol.evaluation.oracle_report import report
from trol.evaluation.oracle_store import menu_of
from trol.reports import oracle_page

MENU = menu_of([Plan("0"), Plan("0-1"), Plan("all")], 4)


def results(metric: str = "rougeL", samples: int = 2) -> dict[str, Any]:
    source = np.random.default_rng(0)
    drawn = source.random((30, samples)).tolist() if samples else ()
    rows = rows_of(source.random((30, 3)).tolist(), MENU, drawn=drawn, metric=metric)
    found = report(rows, MENU, metric, [metric])
    about = {"model": "a <decoder>", "task": "docstrings", "split": "test", "scope": "answer"}
    return {**about, **found, "run": {"command": "trol oracle", "versions": {"trol": "0"}}}


def test_three_files_that_need_nothing_else(tmp_path: Path) -> None:
    page = oracle_page.write(results(), tmp_path / "out")
    text = page.read_text()
    assert sorted(path.name for path in page.parent.iterdir()) == [
        "oracle.html",
        "oracle.json",
        "oracle.png",
    ]
    assert not re.search(r'(src|href)="(?!data:|#)', text)
    assert "<script" not in text
    assert text.count("<svg") == 2
    assert "a &lt;decoder&gt;" in text
    assert json.loads((page.parent / "oracle.json").read_text())["n"] == 30
    with Image.open(page.parent / "oracle.png") as picture:
        assert len(picture.convert("RGB").resize((64, 64)).getcolors(64 * 64) or ()) > 20


def test_the_page_says_what_choosing_alone_gives() -> None:
    found = results()
    page = oracle_page.render(found)
    for sentence in found["verdict"]:
        assert sentence.replace("'", "&#39;") in page
    assert "choosing among outputs alone gives" in page
    assert "best of 3 outputs of the full model" in page
    assert page.count("<td>oracle, reference at hand</td>") == 1


def test_without_drawn_answers_the_page_says_so() -> None:
    page = oracle_page.render(results(samples=0))
    assert "was not measured: no answers were drawn at full depth" in page
    assert "outputs of the full model</td>" not in page


def test_a_loss_is_told_in_nats() -> None:
    page = oracle_page.render(results("loss", samples=0))
    assert "nats" in page
    assert "a loss belongs to the reference" in page


def test_unfinished_results_are_refused(tmp_path: Path) -> None:
    found = results()
    del found["curve"]
    with pytest.raises(UsageError, match="lack curve"):
        oracle_page.write(found, tmp_path / "out")
    assert not (tmp_path / "out").exists()
