"""The page of curves: drawn from the results alone, with the intervals of their numbers."""

import copy
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from trol.errors import DataError
from trol.reports import curve

LAYERS = 4
NOISE = (-0.01, 0.0, 0.01)


def stat(mean: float, noise: tuple[float, ...] = (0.0, 0.0, 0.0)) -> dict[str, Any]:
    spread = None if len(noise) == 1 else max(noise)
    return {"mean": mean, "spread": spread, "values": [mean + one for one in noise]}


def point(share: float, rouge: float, loss: float, time: float, **settings: Any) -> dict[str, Any]:
    return {
        "keep": share,
        "settings": settings or {"plan": f"exit@{round(share * LAYERS)}"},
        "metrics": {"rougeL": stat(rouge, NOISE), "loss": stat(loss, NOISE)},
        "visits": stat(share * LAYERS),
        "visits_share": stat(share),
        "flops": stat(share),
        "flops_share": stat(share),
        "prefill_flops": None,
        "prefill_flops_share": None,
        "ms": stat(time),
        "ms_ratio": stat(time),
        "prefill_ms": stat(1.0),
        "prefill_ms_ratio": stat(1.0),
        "cosines": [1.0, 0.9, 0.8, share],
    }


def results(**rouges: tuple[float, float, float]) -> dict[str, Any]:
    """Methods with scores at 25, 50 and 75 % of the visits, all 0.5 at the full model."""
    rouges = rouges or {"exit": (0.2, 0.3, 0.4), "skip": (0.1, 0.4, 0.4)}
    shares = (0.25, 0.5, 0.75)
    full = point(1.0, 0.5, 2.0, 1.0, plan="all")
    drawn = {
        method: {
            "bound": False,
            "points": [
                *(point(s, r, 3 - r, s) for s, r in zip(shares, scores, strict=True)),
                full,
            ],
        }
        for method, scores in rouges.items()
    }
    better = {"rougeL": {"better": "higher"}, "loss": {"better": "lower"}}
    return {
        "model": "tiny <decoder>",
        "scope": "answer",
        "layers": LAYERS,
        "questions": 9,
        "seeds": [0, 1, 2],
        "keep": list(shares),
        "device": "cpu, 1 thread",
        "timing": {"batch": 1, "tokens": 16, "rounds": 3},
        "tasks": {"alpaca:a/b.json": {"n": 9, "metrics": better, "methods": drawn}},
        "run": {"command": "trol curve", "commit": None, "versions": {"trol": "0"}, "seed": None},
    }


def task_of(drawn: dict[str, Any]) -> dict[str, Any]:
    return drawn["tasks"]["alpaca:a/b.json"]


def test_the_files_need_nothing_else(tmp_path: Path) -> None:
    drawn = results()
    page = curve.write(drawn, tmp_path / "made" / "here").read_text()
    assert page.count("<svg") == 4
    assert not re.search(r'(src|href)="(?!data:|#)', page)
    assert "&lt;decoder&gt;" in page
    assert "tiny <decoder>" not in page
    names = {path.name for path in (tmp_path / "made" / "here").iterdir()}
    charts = {f"alpaca-a-b.json-{chart}.png" for chart in ("visits", "flops", "time", "cosine")}
    assert names == {"curve.json", "curve.html", *charts}
    for name in charts:
        picture = Image.open(io.BytesIO((tmp_path / "made" / "here" / name).read_bytes()))
        assert picture.convert("RGB").getpixel((0, 0)) == (255, 255, 255)
    assert curve.CURVE.read(tmp_path / "made" / "here") == json.loads(json.dumps(drawn))
    assert curve.render(curve.CURVE.read(tmp_path / "made" / "here")) == page


def test_results_that_are_no_curves_are_refused(tmp_path: Path) -> None:
    short = results()
    del short["tasks"], short["device"]
    cure = r"out/curve\.json lacks device, tasks; run `trol curve` again"
    with pytest.raises(DataError, match=cure):
        curve.write(short, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(DataError, match=r"curve\.json .* run `trol curve` again"):
        curve.CURVE.read(tmp_path)
    (tmp_path / "curve.json").write_text(json.dumps(short))
    with pytest.raises(DataError, match=r"curve\.json lacks device, tasks"):
        curve.CURVE.read(tmp_path)


def at_equal_visits(task: dict[str, Any]) -> dict[str, list[str]]:
    """Share -> the methods there, the best one first."""
    rows: dict[str, list[str]] = {}
    for name, *_ in curve.equal_visits_table(task).rows:
        share, method = name.split(" % ")
        rows.setdefault(share, []).append(method)
    return rows


def test_it_shows_which_method_is_best_where() -> None:
    table = curve.equal_visits_table(task_of(results()))
    assert table.rows == [
        ["25 % exit", "0.200", "best"],
        ["25 % skip", "0.100", "−0.100 [−0.100, −0.100]"],
        ["50 % skip", "0.400", "best"],
        ["50 % exit", "0.300", "−0.100 [−0.100, −0.100]"],
        ["75 % exit", "0.400", "best"],
        ["75 % skip", "0.400", "+0.000 [+0.000, +0.000]"],
    ]
    assert "3 seeds" in table.notes[0]


def test_the_papers_claim_is_judged_beside_exit() -> None:
    """By the interval of the paired difference, at each share; the full model is no method."""
    task = task_of(results(exit=(0.3, 0.3, 0.3), skip=(0.1, 0.3, 0.4)))
    rows = curve.beside_exit_table(task).rows
    assert [row[0] for row in rows] == [f"{at} % skip (evenly spaced)" for at in (25, 50, 75)]
    assert [row[2] for row in rows] == ["worse", "not shown", "better"]
    assert rows[2][1] == "+0.100 [+0.100, +0.100]"
    task["metrics"] = dict(reversed(task["metrics"].items()))  # loss = 3 - rouge
    assert [row[2] for row in curve.beside_exit_table(task).rows] == [
        "worse",
        "not shown",
        "better",
    ]
    assert not curve.beside_exit_table(task_of(results(skip=(0.1, 0.2, 0.3)))).rows


def test_a_page_of_windows_says_what_chose_and_what_judged(tmp_path: Path) -> None:
    drawn = results()
    task_of(drawn).update(kind="window", splits=False)
    page = " ".join(curve.write(drawn, tmp_path / "out").read_text().split())
    assert "9 windows for each seed, of the file without its first eighth" in page
    assert "chosen on the first eighth of the file" in page
    assert "skip</em> are evenly spaced" in page


def test_a_lower_loss_is_better() -> None:
    task = task_of(results(exit=(0.2, 0.2, 0.2), skip=(0.4, 0.4, 0.4)))  # loss = 3 - rouge
    task["metrics"] = dict(reversed(task["metrics"].items()))
    assert at_equal_visits(task) == {key: ["skip", "exit"] for key in ("25", "50", "75")}


def test_a_difference_that_is_not_shown_holds_zero() -> None:
    task = task_of(results(skip=(0.4, 0.4, 0.4), greedy=(0.401, 0.401, 0.401)))
    for one in task["methods"]["greedy"]["points"]:  # other seeds are the good ones
        one["metrics"]["rougeL"]["values"].reverse()
    rows = curve.equal_visits_table(task).rows
    assert [row[2] for row in rows if "skip" in row[0]] == ["−0.001 [−0.051, +0.049]"] * 3


def test_a_method_between_its_points_lies_on_their_line() -> None:
    task = task_of(results(exit=(0.2, 0.3, 0.4), skip=(0.1, 0.2, 0.3)))
    router = copy.deepcopy(task["methods"]["exit"])
    router["points"] = [point(0.25, 0.3, 2, 0.2, dial=0.0), router["points"][-1]]
    router["points"][0]["keep"] = None
    task["methods"]["router"] = router
    rows = curve.equal_visits_table(task).rows
    # On the line from 0.3 at 25 % to 0.5 at 100 %.
    assert [row for row in rows if "router" in row[0]] == [
        ["25 % router", "0.300", "best"],
        ["50 % router", "0.367", "best"],
        ["75 % router", "0.433", "best"],
    ]


def test_one_method_alone_is_not_compared() -> None:
    assert len(curve.tables_of(task_of(results(exit=(0.2, 0.3, 0.4))))) == 1


def with_an_oracle(task: dict[str, Any], **made_on: Any) -> None:
    oracle = copy.deepcopy(task["methods"]["exit"]) | {"bound": True}
    for one in oracle["points"]:
        one["metrics"]["rougeL"] = stat(1.0, (0, 0, 0))
        one |= {"ms_ratio": None, "prefill_ms_ratio": None, "flops_share": None, "cosines": None}
    task["methods"]["oracle"] = {**oracle, **made_on}


def test_a_bound_is_not_compared() -> None:
    drawn = results()
    with_an_oracle(task_of(drawn))
    assert all("oracle" not in some for some in at_equal_visits(task_of(drawn)).values())
    page = curve.render(drawn)
    assert "a bound, no method" in page
    assert "<td>oracle (sees the references) all layers</td>" in page
    assert "<td>exit all layers</td>" in page


def test_an_oracle_of_other_questions_is_noted() -> None:
    drawn = results()
    here = {"n": 9, "split": "test", "metric": "rougeL", "seed": 0, "full": 0.5, "full_here": 0.5}
    with_an_oracle(task_of(drawn), made_on=here)
    assert len(curve.tables_of(task_of(drawn))[0].notes) == 1
    for change in ({"n": 500}, {"split": "train"}, {"full": 0.18}):
        on = {**here, **change}
        with_an_oracle(task_of(drawn), made_on=on)
        note = curve.tables_of(task_of(drawn))[0].notes[-1]
        for figure in (
            f"{on['n']} questions",
            f"{on['split']} split",
            f"{on['full']:.3f}",
            "0.500",
        ):
            assert figure in note
        assert '<p class="soft">The oracle was made on' in curve.render(drawn)


def test_one_seed_has_no_interval() -> None:
    drawn = results()
    drawn["seeds"] = [0]
    for method in task_of(drawn)["methods"].values():
        for one in method["points"]:
            for value in (*one["metrics"].values(), one["ms_ratio"], one["visits_share"]):
                value["values"], value["spread"] = value["values"][:1], None
    points, equal, claim = curve.tables_of(task_of(drawn))
    assert {row[-1] for row in claim.rows} == {"not shown"}
    assert [row[-1] for row in points.rows[:4]] == ["−0.300", "−0.200", "−0.100", "–"]
    assert "[" not in "".join(cell for row in equal.rows for cell in row)
    assert "--seeds 3" in equal.notes[0]
    assert "over 1 seed;" in curve.render(drawn)


def test_every_point_stands_beside_the_full_model() -> None:
    task = task_of(results(exit=(0.2, 0.5, 0.6)))
    table = curve.points_table(task, ["rougeL"])
    assert table.heading[0] == "method"
    assert table.heading[-2:] == ["rougeL", "rougeL − full"]
    assert table.rows[0] == [
        "exit exit@1",
        *["25.0 ± 0.0"] * 3,
        "100.0 ± 0.0",
        "0.200 ± 0.010",
        "−0.300 [−0.300, −0.300]",
    ]
    assert [row[-1] for row in table.rows[1:]] == [
        "+0.000 [+0.000, +0.000]",
        "+0.100 [+0.100, +0.100]",
        "–",
    ]


def test_points_that_save_no_time_are_marked() -> None:
    task = task_of(results())
    assert "*" not in str(curve.points_table(task, []).rows)
    task["methods"]["skip"]["points"][2]["ms_ratio"] = stat(1.02)
    marked = [row[0] for row in curve.points_table(task, []).rows if row[3].endswith("*")]
    assert marked == ["skip (evenly spaced) exit@3"]


def test_a_time_within_its_scatter_of_the_full_models_saves_nothing() -> None:
    one = point(0.5, 0.3, 2.0, 0.98)
    assert curve.saves_time(one)
    one["ms_ratio"]["spread"] = 0.03
    assert not curve.saves_time(one)
    full = point(1.0, 0.3, 2.0, 1.0)
    assert curve.saves_time(full)  # it visits no fewer layers
