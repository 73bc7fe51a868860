"""The demo's page: self-contained, complete, with the intervals of its differences."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from trol.cli.demo import LOOK_UPS_HELP, learn_look_ups
from trol.errors import DataError
from trol.files import write_json, write_whole
from trol.reports.training import (
    LOOK_UPS,
    differences_table,
    look_ups_table,
    readable,
    render_demo,
    write_demo,
)
from trol.studies.hop_learners import TINY

TYPES = ("digit", "hop1")


def results(place: Path, *, seeds: int = 3, gain: float = 0.0) -> dict[str, Any]:
    """Made-up results of `seeds` seeds in which traversal gains `gain` over the twin."""
    place.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8)).save(place / "map-0.png")
    noise = [0.01 * seed for seed in range(seeds)]
    curve = [{"steps": [0, 10, 20], "losses": [2.0, 1.0, 0.5 + x]} for x in noise]
    points = [
        {"tau": 1.0, "share": 0.0, "accuracy": 0.6, "random": 0.6},
        {"tau": 0.5, "share": 0.5, "accuracy": 0.8, "random": 0.7},
        {"tau": 0.0, "share": 1.0, "accuracy": 0.8, "random": 0.8},
    ]
    return {
        "model": "trol-tiny",
        "seeds": list(range(seeds)),
        "run": {"command": "trol demo <&>", "commit": None, "versions": {"trol": "0"}, "seed": 0},
        "look_ups": {
            "one visit": [{"1 hop": 1.0, "2 hops": 0.3 + x, "visits": 1.0} for x in noise],
            "TroL": [{"1 hop": 1.0, "2 hops": 1.0, "visits": 2.0} for x in noise],
        },
        "parameters": {"on": 1000, "twin": 1000},
        "steps": {"on": 20, "twin": 20},
        "losses": {"step 1": {"on": curve, "twin": curve}},
        "accuracy": {
            "on": [{"digit": 0.9 - x + gain, "hop1": 0.5 + x + gain} for x in noise],
            "off": [{"digit": 0.5, "hop1": 0.2} for _ in noise],
            "twin": [{"digit": 0.9 + x, "hop1": 0.5 - 2 * x} for x in noise],
        },
        "chance": dict.fromkeys(TYPES, 0.1),
        "counts": dict.fromkeys(TYPES, 100),
        "gates": [{"mean": [0.4, 0.6], "low": [0.1, 0.2], "high": [0.8, 0.9]} for _ in noise],
        "sparse": [{"points": points} for _ in noise],
        "cost": {"on": {"layer_visits": 80, "flops": 2.5e9}, "twin": {"layer_visits": 40}},
        "maps": [{"file": "map-0.png", "caption": "Asked: is there a <7>?"}],
    }


def test_the_page_needs_nothing_else(tmp_path: Path) -> None:
    page = write_demo(results(tmp_path), tmp_path).read_text()
    assert not re.search(r'(src|href)="(?!data:|#)', page)
    assert "<script" not in page
    assert page.count("<svg") == 4
    assert "currentColor" in page
    assert "&lt;7&gt;" in page
    assert "3 seeds (0, 1, 2)" in page
    assert json.loads((tmp_path / "results.json").read_text())["model"] == "trol-tiny"


def test_look_ups_are_learnt_measured_and_shown(tmp_path: Path) -> None:
    learnt = learn_look_ups(1, 0, tmp_path)
    assert list(learnt) == list(LOOK_UPS)
    assert str(TINY["steps"]) in LOOK_UPS_HELP
    table = look_ups_table({"look_ups": {name: [value] for name, value in learnt.items()}})
    assert table.heading[1:] == ["1 hop", "2 hops", "layer visits a token"]
    assert [row[-1] for row in table.rows] == ["1.00", "2.00", "2.00", "2.00"]
    assert all(float(cell) < 50 for row in table.rows for cell in row[1:3])  # after one step


def test_svg_ids_are_not_shared(tmp_path: Path) -> None:
    ids = re.findall(r'<(?:clipPath|path|g) id="(p[0-9a-f]{10}|m[0-9a-f]{10})"', _page(tmp_path))
    assert ids
    assert len(ids) == len(set(ids))


def test_a_difference_that_is_not_shown_holds_zero(tmp_path: Path) -> None:
    table = differences_table(results(tmp_path))
    assert table.rows[0] == [
        "traversal on − the twin trained without",
        "+0.5 [−0.7, +1.7]",
        "2 of 3",
    ]
    assert "+0.5 [−0.7, +1.7]" in _page(tmp_path)


def test_a_gain_is_shown_with_its_interval(tmp_path: Path) -> None:
    gained = results(tmp_path, gain=0.2)
    table = differences_table(gained)
    assert [row[1:] for row in table.rows] == [
        ["+20.5 [+19.3, +21.7]", "3 of 3"],
        ["+55.0 [+55.0, +55.0]", "3 of 3"],
        ["+0.0 [+0.0, +0.0]", "0 of 3"],
        ["−10.0 [−10.0, −10.0]", "0 of 3"],
        ["+10.0 [+10.0, +10.0]", "3 of 3"],
    ]
    assert "50% of second visits" in table.rows[2][0]
    assert "few" in table.notes[-1]
    assert "few" in render_demo(gained, tmp_path)


def test_one_seed_is_called_one_draw(tmp_path: Path) -> None:
    one = results(tmp_path, seeds=1)
    page = render_demo(one, tmp_path)
    assert "1 seed (0): there is no spread" in page
    assert "One seed gives no interval" in page
    assert "±" not in page
    assert all("[" not in row[1] for row in differences_table(one).rows)


def test_the_table_ends_with_the_mean_over_types(tmp_path: Path) -> None:
    last = re.search(r'<tr class="all">(.*?)</tr>', _page(tmp_path), re.DOTALL)
    assert last is not None
    cells = re.findall(r"<td>(.*?)</td>", last[1])
    assert cells[:3] == ["all", "200", ""]
    assert cells[4] == "35.0 ± 0.0"


def test_missing_results_are_named(tmp_path: Path) -> None:
    short = results(tmp_path)
    del short["gates"], short["chance"]
    with pytest.raises(
        DataError, match=r"results\.json lacks chance, gates; run `trol demo` again"
    ):
        write_demo(short, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_files_are_whole_or_absent(tmp_path: Path) -> None:
    path = write_whole(tmp_path / "a.txt", "first")
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(path, {"loss": float("nan")})
    assert path.read_text() == "first"
    assert [file.name for file in tmp_path.iterdir()] == ["a.txt"]


@pytest.mark.parametrize(
    ("value", "text"),
    [(80, "80"), (2.5e9, "2.5 G"), (81920, "81.9 k"), (0.1234, "0.123"), (None, "–")],
)
def test_numbers_are_readable(value: float | None, text: str) -> None:
    assert readable(value) == text


def _page(place: Path) -> str:
    return render_demo(results(place), place)
