"""`results.json` rendered as one self-contained page.

The results (every list of seeds in the same order as `seeds`; accuracies are shares, 0 to 1)::

    {"model": str, "seeds": [int], "run": {"command", "commit", "versions", "seed", ...},
     "questions": int,                             test questions behind each accuracy
     "parameters": {arm: int}, "steps": {arm: int},
     "losses": {stage: {arm: [{"steps": [int], "losses": [float]}]}},
     "accuracy": {arm: [{type: float}]},           arms: on, off, twin; a seed each
     "chance": {type: float}, "counts": {type: int},
     "gates": [{"mean": [L], "low": [L], "high": [L]}],   over question tokens; 5th, 95th percentile
     "sparse": [{"points": [{"tau", "share", "accuracy", "random"}]}],
     "cost": {arm: {name: number}},                one prompt each
     "maps": [{"file": str, "caption": str}]}      beside results.json

`accuracy` of arm x, seed s is a mean over types unless "all" is among its keys.
"""

from __future__ import annotations

import base64
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trol.errors import UsageError
from trol.files import folder, write_json, write_whole
from trol.reports import charts, pages
from trol.reports.charts import mean_spread, signed, verdict

NEEDED = ("model", "seeds", "run", "losses", "accuracy", "chance", "counts", "gates", "sparse")
TOTAL = "all"
ON, OFF, TWIN = "traversal on", "traversal off at test time", "the twin trained without traversal"


def write(results: Mapping[str, Any], out: str | Path) -> Path:
    """Write `results.json`, then `report.html` into the folder `out`; returns the page's path.

    Where the page fails, that is a warning, and the path is that of the results.
    """
    place = folder(out)
    check(results)
    kept = write_json(place / "results.json", results)
    with pages.beside(kept):
        return write_whole(place / "report.html", render(results, place))
    return kept


def check(results: Mapping[str, Any]) -> None:
    """Raises `UsageError` where the results are no demo's."""
    if missing := [key for key in NEEDED if key not in results]:
        raise UsageError(f"report: the results lack {', '.join(missing)}; run `trol demo` again.")


def render(results: Mapping[str, Any], place: Path) -> str:
    """The page for `results`, its map pictures read from `place`."""
    check(results)
    types = list(results["chance"])
    return pages.render(
        "report",
        results=results,
        types=types,
        loss_charts={
            stage: charts.losses(stage, arms) for stage, arms in results["losses"].items()
        },
        accuracy_chart=charts.accuracies(types, results["accuracy"], results["chance"]),
        accuracy_table=accuracy_table(results, types),
        gate_chart=charts.gates(results["gates"]),
        sparse_chart=charts.sparse(results["sparse"]),
        cost_table=cost_table(results.get("cost", {})),
        maps=[_embedded(item, place) for item in results.get("maps", ())],
        verdicts=verdicts(results),
        sparse_verdict=sparse_verdict(results["sparse"]),
        arm_names=charts.ARM_NAMES,
    )


def total(accuracy: Mapping[str, float]) -> float:
    """The accuracy of one seed over all types: as measured, else the mean over types."""
    return accuracy[TOTAL] if TOTAL in accuracy else statistics.fmean(accuracy.values())


def verdicts(results: Mapping[str, Any]) -> list[str]:
    """What the paired differences say about traversal, overall and at test time."""
    totals = {arm: [total(seed) for seed in seeds] for arm, seeds in results["accuracy"].items()}
    found: list[str] = []
    if "twin" in totals:
        found.append(verdict(totals["on"], totals["twin"], this=ON, that=TWIN))
    if "off" in totals:
        found.append(verdict(totals["on"], totals["off"], this=ON, that=OFF))
    return found


def sparse_verdict(seeds: Sequence[Mapping[str, Any]]) -> str:
    """What leaving out about half of the second visits cost, by gate and at random."""
    half = [min(seed["points"], key=lambda point: abs(point["share"] - 0.5)) for seed in seeds]
    full = [max(seed["points"], key=lambda point: point["share"]) for seed in seeds]
    share = statistics.fmean(point["share"] for point in half)
    told = {
        name: statistics.fmean(h[name] - f["accuracy"] for h, f in zip(half, full, strict=True))
        for name in ("accuracy", "random")
    }
    chosen = [point["accuracy"] for point in half]
    random = [point["random"] for point in half]
    return (
        f"With {share:.0%} of the second visits made, accuracy changed by "
        f"{signed(told['accuracy'])} points when the smallest gates were left out and by "
        f"{signed(told['random'])} points when as many were left out at random. "
        + verdict(chosen, random, this="leaving out small gates", that="leaving out at random")
    )


def accuracy_table(results: Mapping[str, Any], types: Sequence[str]) -> list[dict[str, Any]]:
    """One row per type and a last one over all: chance, then mean and spread of each arm."""
    rows: list[dict[str, Any]] = []
    for name in types:
        arms = {
            arm: _cell([seed[name] for seed in seeds]) for arm, seeds in results["accuracy"].items()
        }
        counts = {"n": results["counts"][name], "chance": f"{100 * results['chance'][name]:.1f}"}
        rows.append({"type": name.replace("_", " "), **counts, "arms": arms})
    arms = {
        arm: _cell([total(seed) for seed in seeds]) for arm, seeds in results["accuracy"].items()
    }
    everything = sum(results["counts"].values())
    rows.append({"type": "all", "n": everything, "chance": "", "arms": arms})
    return rows


def _cell(values: Sequence[float]) -> str:
    """Mean and spread in percent."""
    mean, spread = mean_spread(values)
    return f"{100 * mean:.1f}" if spread is None else f"{100 * mean:.1f} ± {100 * spread:.1f}"


def cost_table(cost: Mapping[str, Mapping[str, float]]) -> list[dict[str, Any]]:
    """One row per measure, one column per arm, in readable units."""
    measures = list(dict.fromkeys(name for arm in cost.values() for name in arm))
    return [
        {
            "measure": name.replace("_", " "),
            "arms": {arm: readable(cost[arm].get(name)) for arm in cost},
        }
        for name in measures
    ]


def readable(value: float | None) -> str:
    """A number with a unit prefix (k, M, G), three digits."""
    if value is None:
        return "–"
    for scale, prefix in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if abs(value) >= scale:
            return f"{value / scale:.3g}{prefix}"
    return f"{value:.3g}"


def _embedded(item: Mapping[str, str], place: Path) -> dict[str, str]:
    """A map with its picture inside the page."""
    data = base64.b64encode((place / item["file"]).read_bytes()).decode()
    return {"caption": item["caption"], "source": f"data:image/png;base64,{data}"}
