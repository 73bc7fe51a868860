"""The page of an oracle: whole, self-contained, and no gain shown without its controls."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from evaluation.oracle_standins import rows_of
from trol.depth import Plan
from trol.errors import DataError
from trol.evaluation.oracle import menu_of
from trol.evaluation.oracle_report import report
from trol.reports import oracle

MENU = menu_of([Plan("0"), Plan("0-1"), Plan("all")], 4)


def results(metric: str = "rougeL", samples: int = 2) -> dict[str, Any]:
    source = np.random.default_rng(0)
    drawn = source.random((30, samples)).tolist() if samples else ()
    rows = rows_of(source.random((30, 3)).tolist(), MENU, drawn=drawn, metric=metric)
    finished = report(rows, MENU, metric, [metric])
    about = {"model": "a <decoder>", "task": "docstrings", "split": "test", "scope": "answer"}
    return {**about, **finished, "run": {"command": "trol oracle", "versions": {"trol": "0"}}}


def test_three_files_that_need_nothing_else(tmp_path: Path) -> None:
    page = oracle.write(results(), tmp_path / "out")
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


def cells(results: dict[str, Any]) -> dict[str, list[str]]:
    """First cell of each row of both tables -> the others."""
    return {name: row for table in oracle.tables_of(results) for name, *row in table.rows}


def test_the_tables_hold_every_figure() -> None:
    finished = results()
    rows, controls = cells(finished), finished["controls"]
    equal, low = finished["equal_budget"], finished["equal_shares"][0]
    assert rows["as good as the full model in the mean"] == [
        f"{equal['layers']:.2f}",
        f"{100 * equal['share']:.1f} %",
        f"{100 * low:.1f} % to {100 * finished['equal_shares'][1]:.1f} %",
        f"{100 * equal['score']:.1f}",
    ]
    outputs, full = controls["best_of_n"], finished["full"]
    reached = rows["as good as the best of 3 outputs of the full model"]
    assert reached[1] == f"{100 * outputs['oracle_reaches']['share']:.1f} %"
    gain, share = 100 * (outputs["score"] - full), 100 * outputs["share_of_gain"]
    best = rows["best of 3 outputs of the full model"]
    assert best[2] == f"{gain:+.1f} ({share:.1f} % of the oracle's)"
    at_equal, at_full = controls["at_equal_budget"], controls["at_full_budget"]
    for arm, (name, *_) in oracle.ARMS.items():
        assert rows[name][0].startswith(f"{100 * at_equal[arm]:.1f}")
        assert rows[name][1].startswith(f"{100 * at_full[arm]:.1f}")
        assert rows[name][2] == f"{100 * (at_full[arm] - full):+.1f}".replace("-", "−")
    page = oracle.render(finished)
    for name, values in rows.items():
        for value in (name, *values):
            assert f"<td>{value}</td>".replace("'", "&#39;") in page


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, "ask more with --questions"),
        ({"full": 0.0}, "scores nothing by rougeL"),
        ({"n": 100}, None),
    ],
)
def test_figures_that_say_little_are_noted(change: dict[str, Any], expected: str | None) -> None:
    notes = " ".join(oracle.tables_of(results() | change)[0].notes)
    warned = [words for words in ("ask more with", "scores nothing") if words in notes]
    assert (expected in notes) if expected else not warned


def test_the_questions_are_split_by_what_the_full_model_has_right() -> None:
    finished = results()
    rows = cells(finished)
    parts = {name: part for name, part in finished["by_full"].items() if part}
    assert sum(part["n"] for part in parts.values()) == finished["n"]
    for name, part in parts.items():
        row = rows[f"the same for the {part['n']} that the full model has {name}"]
        assert row[0] == f"{part['layers']:.2f}"
    assert results("loss", samples=0)["by_full"] is None


def test_without_drawn_answers_the_page_says_so() -> None:
    page = oracle.render(results(samples=0))
    assert "was not measured: --samples is 0" in page
    assert "outputs of the full model</td>" not in page


def test_a_loss_is_in_nats_and_its_sign_is_explained() -> None:
    loss = results("loss", samples=0)
    rows = cells(loss)
    assert rows["full model"][1] == f"{-loss['full']:.3f} nats"
    gain = loss["controls"]["at_full_budget"]["oracle"] - loss["full"]
    assert rows["oracle, reference at hand"][2] == f"{gain:+.3f} nats"
    page = oracle.render(loss)
    assert "a loss belongs to the reference" in page
    assert "sign turned" in page


def test_unfinished_results_are_refused(tmp_path: Path) -> None:
    short = results()
    del short["curve"]
    with pytest.raises(DataError, match=r"oracle\.json lacks curve; run `trol oracle` again"):
        oracle.write(short, tmp_path / "out")
    assert not (tmp_path / "out").exists()
