"""The page of curves: drawn from the results alone, and worded from their numbers."""

import copy
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from trol.errors import DataError
from trol.reports import curve_page, curve_words

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


def task_of(found: dict[str, Any]) -> dict[str, Any]:
    return found["tasks"]["alpaca:a/b.json"]


def test_the_files_need_nothing_else(tmp_path: Path) -> None:
    found = results()
    page = curve_page.write(found, tmp_path / "made" / "here").read_text()
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
    assert curve_page.read(tmp_path / "made" / "here") == json.loads(json.dumps(found))
    assert curve_page.render(curve_page.read(tmp_path / "made" / "here")) == page


def test_results_that_are_no_curves_are_refused(tmp_path: Path) -> None:
    found = results()
    del found["tasks"], found["device"]
    with pytest.raises(DataError, match="lack device, tasks; run `trol curve` again"):
        curve_page.write(found, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(DataError, match="run `trol curve` again"):
        curve_page.read(tmp_path)


def test_it_names_which_method_wins_where() -> None:
    told = curve_words.winners(task_of(results()), "rougeL")
    assert told.startswith(
        "rougeL by layer visits: up to 25 % of the layers: exit; at 50 %: skip; "
        "from 75 %: no difference is shown."
    )


def test_a_lower_loss_wins() -> None:
    found = results(exit=(0.2, 0.2, 0.2), skip=(0.4, 0.4, 0.4))  # loss = 3 - rouge
    assert "everywhere: skip" not in curve_words.winners(task_of(results()), "loss")
    assert "loss by layer visits: everywhere: skip." in curve_words.winners(task_of(found), "loss")


def test_differences_within_their_interval_are_ties() -> None:
    found = results(exit=(0.2, 0.2, 0.2), skip=(0.4, 0.4, 0.4), greedy=(0.401, 0.401, 0.401))
    half = task_of(found)["methods"]["greedy"]["points"]
    for one in half:  # as high in the mean, but other seeds are the good ones
        one["metrics"]["rougeL"]["values"].reverse()
    assert "everywhere: greedy and skip (a tie)" in curve_words.winners(task_of(found), "rougeL")


def test_a_method_between_its_points_lies_on_their_line() -> None:
    found = results(exit=(0.2, 0.3, 0.4), skip=(0.1, 0.2, 0.3))
    router = copy.deepcopy(task_of(found)["methods"]["exit"])
    router["points"] = [point(0.25, 0.3, 2, 0.2, dial=0.0), router["points"][-1]]
    router["points"][0]["keep"] = None
    task_of(found)["methods"]["router"] = router
    # On the line from 0.3 at 25 % to 0.5 at 100 %: 0.367 at 50 %, 0.433 at 75 %.
    assert "everywhere: router." in curve_words.winners(task_of(found), "rougeL")


def test_a_bound_wins_nothing() -> None:
    found = results()
    oracle = copy.deepcopy(task_of(found)["methods"]["exit"])
    oracle["bound"] = True
    for one in oracle["points"]:
        one["metrics"]["rougeL"] = stat(1.0)
        one |= {"ms_ratio": None, "prefill_ms_ratio": None, "flops_share": None, "cosines": None}
    task_of(found)["methods"]["oracle"] = oracle
    assert "oracle" not in " ".join(curve_words.sentences(found, "alpaca:a/b.json"))
    page = curve_page.render(found)
    assert "a bound, no method" in page
    assert "oracle (sees the references)</td>" in page
    assert "exit</td>" in page


def test_an_oracle_of_other_questions_is_told() -> None:
    found = results()
    oracle = copy.deepcopy(task_of(found)["methods"]["exit"]) | {"bound": True}
    here = {"n": 9, "split": "test", "metric": "rougeL", "seed": 0, "full": 0.5, "full_here": 0.5}
    task_of(found)["methods"]["oracle"] = {**oracle, "made_on": here}
    assert curve_words.other_questions(task_of(found)) == []
    for change in ({"n": 500}, {"split": "train"}, {"full": 0.18}):
        on = {**here, **change}
        task_of(found)["methods"]["oracle"] = {**oracle, "made_on": on}
        told = curve_words.sentences(found, "alpaca:a/b.json")[-1]
        assert f"made on {on['n']} questions of the {on['split']} split" in told
        assert f"scores rougeL {on['full']:.3f} (0.500 here, 9 questions" in told
        assert told in curve_page.render(found)


def test_one_seed_names_no_winner() -> None:
    found = results()
    found["seeds"] = [0]
    for drawn in task_of(found)["methods"].values():
        for one in drawn["points"]:
            for value in (*one["metrics"].values(), one["ms_ratio"], one["visits_share"]):
                value["values"], value["spread"] = value["values"][:1], None
    told = curve_words.sentences(found, "alpaca:a/b.json")
    assert "no winner" in told[0]
    assert not any("Not shown to be worse" in sentence for sentence in told)
    assert "over 1 seed;" in curve_page.render(found)


def test_who_keeps_up_with_the_full_model() -> None:
    found = results(exit=(0.2, 0.5, 0.5), skip=(0.2, 0.3, 0.4))
    told = curve_words.keeping_up(task_of(found), "rougeL")
    assert "exit 50 %, skip 100 %" in told


def test_plans_that_save_no_time_are_named() -> None:
    found = results()
    task, device = task_of(found), found["device"]
    (told,) = curve_words.without_saving(task, device)
    assert "also took less time" in told
    task["methods"]["skip"]["points"][2]["ms_ratio"] = stat(1.02)
    (told,) = curve_words.without_saving(task, device)
    assert told.startswith("Saves no time per token on this device (cpu, 1 thread)")
    assert "skip (75 % of the visits)" in told
    assert "exit" not in told
    rows = [row for row in curve_page.table(task) if row["slow"]]
    assert [row["method"] for row in rows] == ["skip"]


def test_a_time_within_its_scatter_of_the_full_models_saves_nothing() -> None:
    one = point(0.5, 0.3, 2.0, 0.98)
    assert curve_words.saves(one)
    one["ms_ratio"]["spread"] = 0.03
    assert not curve_words.saves(one)
