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

from reports.test_curve_page import results as curves
from reports.test_demo_page import results as demo
from reports.test_oracle_page import results as oracles
from trol import reports
from trol.errors import DataError
from trol.reports import curve, description, oracle, pages, study, training
from trol.reports.pages import Results

Content = dict[str, Any]


def trained(place: Path) -> Content:
    losses = {"steps": [0, 1], "losses": [2.0, 1.0], "gates": [[0.5, 0.4], [0.5, 0.3]]}
    results: Content = {
        "losses": {"step1": losses},
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
    (place / "training.json").write_text(json.dumps(results), encoding="utf-8")
    recipe = "policy: {}\nstages: {step1: {train: [mixers], data: boards}}\n"
    (place / "recipe.yaml").write_text(recipe, encoding="utf-8")
    return results


def write_trained(write: Callable[[Path], Path]) -> Callable[[Path], Path]:
    def write_both(place: Path) -> Path:
        trained(place)
        return write(place)

    return write_both


STUDIED = json.loads(
    (Path(__file__).parents[2] / "benchmarks/results/studies/single-layers.json").read_text("utf-8")
) | {"random": False}

WRITERS: dict[str, tuple[Any, Callable[[Path], Path], str]] = {
    "curve.render": (curve, lambda place: curve.write(curves(), place), "curve.json"),
    "oracle.render": (oracle, lambda place: oracle.write(oracles(), place), "oracle.json"),
    "training.render_demo": (
        training,
        lambda place: training.write_demo(demo(place), place),
        "results.json",
    ),
    "training.render_run": (training, write_trained(training.write_run), "training.json"),
    "description.render_card": (
        description,
        write_trained(description.write_card),
        "training.json",
    ),
    "study.render": (study, lambda place: study.write(STUDIED, place), "study.json"),
}
"""Function that makes a page -> its module, what writes the page, and the file of the results."""


def test_all_writers_of_pages_are_known() -> None:
    names = [
        module.name for module in pkgutil.iter_modules(reports.__path__) if module.name != "pages"
    ]
    modules = {name: importlib.import_module(f"trol.reports.{name}") for name in names}
    renders = [f"{name}.{one}" for name in names for one in vars(modules[name]) if "render" in one]
    assert set(renders) == set(WRITERS)


@pytest.mark.parametrize("name", WRITERS)
def test_results_outlive_their_page(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stumbles(*_: Any, **__: Any) -> str:
        raise ZeroDivisionError("of no\nuse")

    module, write, file = WRITERS[name]
    monkeypatch.setattr(module, name.split(".")[1], stumbles)
    with pytest.warns(UserWarning, match=f"ZeroDivisionError: of no use.*kept in .*{file}"):
        kept = write(tmp_path)
    assert kept == tmp_path / file
    assert json.loads(kept.read_text(encoding="utf-8"))


@pytest.mark.parametrize("kind", [curve.CURVE, oracle.ORACLE, training.DEMO, training.RUN])
def test_a_result_file_that_lacks_a_key_is_refused(kind: Results, tmp_path: Path) -> None:
    cure = f"run `{kind.command}` again"
    for content in (None, "{", json.dumps(dict.fromkeys(kind.keys[1:]))):
        if content is not None:
            (tmp_path / kind.file).write_text(content, encoding="utf-8")
        with pytest.raises(DataError, match=f"{kind.file}.*{cure}"):
            kind.read(tmp_path)
    with pytest.raises(DataError, match=f"{kind.file} lacks {kind.keys[0]}; {cure}"):
        kind.read(tmp_path)


def without_cosines(results: Content) -> None:
    for point in points_of(results):
        point["cosines"] = None


def without_half(results: Content) -> None:
    for drawn in task_of(results)["methods"].values():
        drawn["points"] = [p for p in drawn["points"] if p["visits_share"]["mean"] != 0.5]


def without_any_but_the_full_model(results: Content) -> None:
    for drawn in task_of(results)["methods"].values():
        drawn["points"] = drawn["points"][-1:]


def without_costs(results: Content) -> None:
    for point in points_of(results):
        for cost in ("flops", "ms", "prefill_ms"):
            for end in ("", "_share", "_ratio"):
                if f"{cost}{end}" in point:
                    point[f"{cost}{end}"] = None


def with_an_oracle(results: Content) -> None:
    full = copy.deepcopy(points_of(results)[0])
    full["metrics"].pop("loss", None)
    full |= {"ms_ratio": None, "flops_share": None, "prefill_ms_ratio": None, "cosines": None}
    made_on = {"n": 5, "split": "train", "metric": "rougeL", "full": 0.4, "full_here": 0.5}
    task_of(results)["methods"]["oracle"] = {"bound": True, "made_on": made_on, "points": [full]}


def without_loss(results: Content) -> None:
    task_of(results)["metrics"].pop("loss")
    for point in points_of(results):
        point["metrics"].pop("loss", None)


def with_one_seed(results: Content) -> None:
    results["seeds"] = [0]
    for point in points_of(results):
        for stat in chain(point.values(), point["metrics"].values()):
            if isinstance(stat, dict) and "values" in stat:
                stat |= {"spread": None, "values": stat["values"][:1]}


def without_run(results: Content) -> None:
    results["run"] = {}


def task_of(results: Content) -> Content:
    return next(iter(results["tasks"].values()))


def points_of(results: Content) -> list[Content]:
    return [point for drawn in task_of(results)["methods"].values() for point in drawn["points"]]


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
    monkeypatch.setattr(pages, "as_svg", lambda figure, name: f"<svg>{name}</svg>")
    monkeypatch.setattr(curve, "figures", lambda task: {**dict.fromkeys(COSTS), **shown(task)})
    for changes in combinations(CHANGES, many):
        results = curves()
        for change in changes:
            change(results)
        page = curve.render(results)
        assert page.count("<svg>") == 3 + len(shown(task_of(results)))
        assert page.count("<td>exit ") == len(task_of(results)["methods"]["exit"]["points"])


COSTS = ("visits", "flops", "time")


def shown(task: Content) -> Content:
    """Whether there are points at half of the visits with cosines, as `figures` would see."""
    near = map(curve.nearest_half, task["methods"].values())
    return {"cosine": None} if any(point is not None for point in near) else {}


@pytest.mark.parametrize("change", CHANGES)
def test_charts_of_curves_need_none_of_their_parts(
    change: Callable[[Content], None], tmp_path: Path
) -> None:
    results = curves()
    change(results)
    assert curve.write(results, tmp_path).name == "curve.html"
    assert (tmp_path / "alpaca-a-b.json-cosine.png").exists() == bool(shown(task_of(results)))
    assert curve.tables_of(task_of(results))


LESS = ("gates", "validation", "metrics", "chance", "versions", "run")


SUBSETS = [some for n in range(len(LESS) + 1) for some in combinations(LESS, n)]


@pytest.mark.parametrize("lacking", SUBSETS, ids="+".join)
def test_a_run_needs_none_of_its_parts(
    lacking: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "gates_over_time", lambda *_: "<svg></svg>")
    monkeypatch.setattr(pages, "as_svg", lambda *_: "<svg></svg>")
    results = trained(tmp_path)
    validation = results["validation"]
    if "gates" in lacking:
        del results["losses"]["step1"]["gates"]
    if "metrics" in lacking:  # as boards have it
        del validation["metrics"], validation["metric"]
        validation["accuracy"] = 0.5
    if "chance" in lacking:
        validation["chance_by_type"] = {}
    if "validation" in lacking:
        results["validation"] = None
    if "versions" in lacking:
        del results["run"]["versions"]
    if "run" in lacking:
        del results["run"]
    assert training.render_run(results, "run").count("<svg>") == (
        1 + ("gates" not in lacking) + ("validation" not in lacking)
    )
    recipe = {"policy": {}, "stages": {"step1": {"train": [], "data": "boards"}}}
    assert ("## Validation" in description.render_card(results, recipe, "run")) == (
        "validation" not in lacking
    )


@pytest.mark.parametrize("lacking", [(), ("cost",), ("maps",), ("cost", "maps", "run", "twin")])
def test_a_demo_needs_none_of_its_parts(lacking: tuple[str, ...], tmp_path: Path) -> None:
    results = demo(tmp_path)
    for part in lacking:
        if part == "twin":
            for arms in ("accuracy", "parameters", "steps"):
                results[arms].pop(part)
        elif part == "run":
            results[part] = {}
        else:
            del results[part]
    assert training.render_demo(results, tmp_path)


@pytest.mark.parametrize("samples", [0, 2])
@pytest.mark.parametrize("run", [{}, {"command": "trol oracle"}])
def test_an_oracle_needs_none_of_its_parts(samples: int, run: Content) -> None:
    results = oracles(samples=samples)
    results["run"] = run
    assert oracle.render(results)
