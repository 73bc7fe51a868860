"""All pages: results outlive a page that fails, and a page needs none of the optional parts."""

import copy
import importlib
import json
import pkgutil
from collections.abc import Callable
from itertools import chain, combinations
from pathlib import Path
from typing import Any

import pytest

from analysis.test_curve_page import results as curves
from analysis.test_oracle_page import results as oracle
from analysis.test_report import results as demo
from trol import reports as analysis
from trol.reports import card, curve_page, curve_words, oracle_page, training_page
from trol.reports import curve_page as curve_charts
from trol.reports import demo_report as report

Found = dict[str, Any]


def training(place: Path) -> Found:
    curve = {"steps": [0, 1], "losses": [2.0, 1.0], "gates": [[0.5, 0.4], [0.5, 0.3]]}
    found: Found = {
        "losses": {"step1": curve},
        "seconds": {"step1": 2.0},
        "steps": 2,
        "parameters": 10,
        "seed": 0,
        "validation": {
            "metrics": {"rougeL": 0.5},
            "metric": "rougeL",
            "by_type": {"": 0.5},
            "n_by_type": {"": 2},
            "chance_by_type": {"": 0.1},
            "n": 2,
        },
        "run": {"command": "trol train", "commit": None, "machine": "here", "versions": {}},
    }
    place.mkdir(parents=True, exist_ok=True)
    (place / "training.json").write_text(json.dumps(found), encoding="utf-8")
    recipe = "policy: {}\nstages: {step1: {train: [mixers], data: boards}}\n"
    (place / "recipe.yaml").write_text(recipe, encoding="utf-8")
    return found


def write_training(module: Any) -> Callable[[Path], Path]:
    def write(place: Path) -> Path:
        training(place)
        return module.write(place)

    return write


WRITERS: dict[Any, tuple[Callable[[Path], Path], str]] = {
    curve_page: (lambda place: curve_page.write(curves(), place), "curve.json"),
    oracle_page: (lambda place: oracle_page.write(oracle(), place), "oracle.json"),
    report: (lambda place: report.write(demo(place), place), "results.json"),
    training_page: (write_training(training_page), "training.json"),
    card: (write_training(card), "training.json"),
}


def test_all_writers_of_pages_are_known() -> None:
    names = [module.name for module in pkgutil.iter_modules(analysis.__path__)]
    modules = [importlib.import_module(f"trol.reports.{name}") for name in names]
    assert {m for m in modules if hasattr(m, "write") and hasattr(m, "render")} == set(WRITERS)


@pytest.mark.parametrize("module", WRITERS, ids=lambda module: module.__name__.split(".")[-1])
def test_results_outlive_their_page(
    module: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stumbles(*_: Any, **__: Any) -> str:
        raise ZeroDivisionError("of no\nuse")

    monkeypatch.setattr(module, "render", stumbles)
    write, name = WRITERS[module]
    told = f"could not be made .ZeroDivisionError: of no use.; the results are kept in .*{name}"
    with pytest.warns(UserWarning, match=told):
        kept = write(tmp_path)
    assert kept == tmp_path / name
    assert json.loads(kept.read_text(encoding="utf-8"))


def without_cosines(found: Found) -> None:
    for point in points_of(found):
        point["cosines"] = None


def without_half(found: Found) -> None:
    for drawn in task_of(found)["methods"].values():
        drawn["points"] = [p for p in drawn["points"] if p["visits_share"]["mean"] != 0.5]


def without_any_but_the_full_model(found: Found) -> None:
    for drawn in task_of(found)["methods"].values():
        drawn["points"] = drawn["points"][-1:]


def without_costs(found: Found) -> None:
    for point in points_of(found):
        for cost in ("flops", "ms", "prefill_ms"):
            for end in ("", "_share", "_ratio"):
                if f"{cost}{end}" in point:
                    point[f"{cost}{end}"] = None


def with_an_oracle(found: Found) -> None:
    full = copy.deepcopy(points_of(found)[0])
    full["metrics"].pop("loss", None)
    full |= {"ms_ratio": None, "flops_share": None, "prefill_ms_ratio": None, "cosines": None}
    made_on = {"n": 5, "split": "train", "metric": "rougeL", "full": 0.4, "full_here": 0.5}
    task_of(found)["methods"]["oracle"] = {"bound": True, "made_on": made_on, "points": [full]}


def without_loss(found: Found) -> None:
    task_of(found)["metrics"].pop("loss")
    for point in points_of(found):
        point["metrics"].pop("loss", None)


def with_one_seed(found: Found) -> None:
    found["seeds"] = [0]
    for point in points_of(found):
        for stat in chain(point.values(), point["metrics"].values()):
            if isinstance(stat, dict) and "values" in stat:
                stat |= {"spread": None, "values": stat["values"][:1]}


def without_run(found: Found) -> None:
    found["run"] = {}


def task_of(found: Found) -> Found:
    return next(iter(found["tasks"].values()))


def points_of(found: Found) -> list[Found]:
    return [point for drawn in task_of(found)["methods"].values() for point in drawn["points"]]


CHANGES = (
    without_cosines,
    without_half,
    without_any_but_the_full_model,
    without_costs,
    with_an_oracle,
    without_loss,
    with_one_seed,
    without_run,
)


@pytest.mark.parametrize("many", range(len(CHANGES) + 1))
def test_curves_need_none_of_their_parts(many: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(curve_page, "as_svg", lambda figure, name: f"<svg>{name}</svg>")
    monkeypatch.setattr(curve_page, "figures", lambda task: {**dict.fromkeys(COSTS), **shown(task)})
    for changes in combinations(CHANGES, many):
        found = curves()
        for change in changes:
            change(found)
        page = curve_page.render(found)
        assert page.count("<svg>") == 3 + len(shown(task_of(found)))
        assert page.count("<td>exit</td>") == len(task_of(found)["methods"]["exit"]["points"])


COSTS = ("visits", "flops", "time")


def shown(task: Found) -> Found:
    """Whether there are points at half of the visits with cosines, as `figures` would see."""
    near = map(curve_charts.nearest_half, task["methods"].values())
    return {"cosine": None} if any(point is not None for point in near) else {}


@pytest.mark.parametrize("change", CHANGES)
def test_charts_of_curves_need_none_of_their_parts(
    change: Callable[[Found], None], tmp_path: Path
) -> None:
    found = curves()
    change(found)
    assert curve_page.write(found, tmp_path).name == "curve.html"
    assert (tmp_path / "alpaca-a-b.json-cosine.png").exists() == bool(shown(task_of(found)))
    assert curve_words.sentences(found, "alpaca:a/b.json")


LESS = ("gates", "validation", "metrics", "chance", "versions", "run")


SUBSETS = [some for n in range(len(LESS) + 1) for some in combinations(LESS, n)]


@pytest.mark.parametrize("lacking", SUBSETS, ids="+".join)
def test_a_run_needs_none_of_its_parts(
    lacking: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training_page, "gates_over_time", lambda *_: "<svg></svg>")
    monkeypatch.setattr("trol.reports.charts.as_svg", lambda *_: "<svg></svg>")
    found = training(tmp_path)
    told = found["validation"]
    if "gates" in lacking:
        del found["losses"]["step1"]["gates"]
    if "metrics" in lacking:  # as boards are told
        del told["metrics"], told["metric"]
        told["accuracy"] = 0.5
    if "chance" in lacking:
        told["chance_by_type"] = {}
    if "validation" in lacking:
        found["validation"] = None
    if "versions" in lacking:
        del found["run"]["versions"]
    if "run" in lacking:
        del found["run"]
    assert training_page.render(found, "run").count("<svg>") == (
        1 + ("gates" not in lacking) + ("validation" not in lacking)
    )
    recipe = {"policy": {}, "stages": {"step1": {"train": [], "data": "boards"}}}
    assert ("## Validation" in card.render(found, recipe, "run")) == ("validation" not in lacking)


@pytest.mark.parametrize("lacking", [(), ("cost",), ("maps",), ("cost", "maps", "run", "twin")])
def test_a_demo_needs_none_of_its_parts(lacking: tuple[str, ...], tmp_path: Path) -> None:
    found = demo(tmp_path)
    for part in lacking:
        if part == "twin":
            for arms in ("accuracy", "parameters", "steps"):
                found[arms].pop(part)
        elif part == "run":
            found[part] = {}
        else:
            del found[part]
    assert report.render(found, tmp_path)


@pytest.mark.parametrize("samples", [0, 2])
@pytest.mark.parametrize("run", [{}, {"command": "trol oracle"}])
def test_an_oracle_needs_none_of_its_parts(samples: int, run: Found) -> None:
    found = oracle(samples=samples)
    found["run"] = run
    assert oracle_page.render(found)
