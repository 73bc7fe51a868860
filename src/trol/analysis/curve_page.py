"""The files of `trol curve`: `curve.json`, its charts as PNG, and the page `curve.html`.

The results are those that `trol.evaluation.curves.curve` gives, with `model` and `run` beside
them; nothing else is read. Charts are named `TASK-visits.png`, `TASK-flops.png`, `TASK-time.png`
and, of the hidden states at half of the visits, `TASK-cosine.png`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trol.analysis import pages
from trol.analysis.charts import as_svg
from trol.analysis.curve_charts import COSTS, as_png, cosines, quality
from trol.analysis.curve_words import cell, label, saves, sentences, settings_told
from trol.analysis.files import folder, write_json, write_whole
from trol.errors import DataError

NEEDED = ("model", "scope", "layers", "seeds", "questions", "device", "timing", "tasks", "run")
FILE, PAGE = "curve.json", "curve.html"


def write(results: Mapping[str, Any], out: str | Path) -> Path:
    """Writes results, then charts and page into the folder `out`; returns the page's path.

    Where the page fails, that is a warning, and the path is that of the results.

    Raises:
        DataError: the results are no curves.
        UsageError: the folder cannot be made.
    """
    check(results)
    place = folder(out)
    kept = write_json(place / FILE, results)
    with pages.beside(kept):
        for name, task in results["tasks"].items():
            for chart, figure in figures(task).items():
                write_whole(place / f"{slug(name)}-{chart}.png", as_png(figure))
        return write_whole(place / PAGE, render(results))
    return kept


def read(path: str | Path) -> dict[str, Any]:
    """The results in a folder or a file that `trol curve` wrote.

    Raises:
        DataError: there are none, or they are damaged.
    """
    path = Path(path)
    path = path / FILE if path.is_dir() else path
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} tells of no curves: {error}; run `trol curve` again.") from error


def check(results: Mapping[str, Any]) -> None:
    """Raises `DataError` where the results are no curves."""
    if missing := [key for key in NEEDED if key not in results]:
        raise DataError(f"the results of curves lack {', '.join(missing)}; run `trol curve` again.")


def render(results: Mapping[str, Any]) -> str:
    """The page; raises `DataError` where the results are no curves."""
    check(results)
    return pages.render(
        "curve",
        results=results,
        charts={
            name: {
                chart: as_svg(figure, f"{slug(name)}-{chart}")
                for chart, figure in figures(task).items()
            }
            for name, task in results["tasks"].items()
        },
        verdicts={name: sentences(results, name) for name in results["tasks"]},
        tables={name: table(task) for name, task in results["tasks"].items()},
        run=results["run"],
    )


def figures(task: Mapping[str, Any]) -> dict[str, Any]:
    """Chart name -> figure: quality against each cost, and cosines where there are any."""
    found = {cost: quality(task, cost) for cost in COSTS}
    shown = cosines(task)
    return found if shown is None else {**found, "cosine": shown}


def table(task: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row for each point: costs in percent of the full model's, then all metrics."""
    return [
        {
            "method": label(method, drawn),
            "settings": settings_told(point["settings"]),
            "costs": [
                cell(point[key], percent=True)
                for key in ("visits_share", "flops_share", "ms_ratio", "prefill_ms_ratio")
            ],
            "slow": point["ms_ratio"] is not None
            and point["visits_share"]["mean"] < 1 - 1e-6
            and not saves(point),
            "metrics": [cell(point["metrics"].get(metric)) for metric in task["metrics"]],
        }
        for method, drawn in task["methods"].items()
        for point in drawn["points"]
    ]


def slug(name: str) -> str:
    """A task's name as part of a file's name: `alpaca:a/b.json` -> `alpaca-a-b.json`."""
    return re.sub(r"[^\w.]+", "-", name).strip("-.")
