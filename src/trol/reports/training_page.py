"""The page of one training run, made of the `training.json` that the run left."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trol.errors import DataError
from trol.files import write_whole
from trol.reports import charts, pages
from trol.reports.charts import gates_over_time

FILE = "training.json"
NEEDED = ("losses", "seconds", "steps", "parameters", "seed")


def write(folder: str | Path) -> Path:
    """Writes `report.html` beside the `training.json` of a run; returns the page's path.

    Where the page fails, that is a warning, and the path is that of `training.json`.

    Raises:
        DataError: there is no `training.json`, or it is no training run's.
    """
    folder = Path(folder)
    found, kept = read_findings(folder), folder / FILE
    with pages.beside(kept):
        return write_whole(folder / "report.html", render(found, folder.name))
    return kept


def read_findings(folder: Path) -> dict[str, Any]:
    """What a run has found; raises as `write`."""
    path = folder / FILE
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} tells nothing of a training run: {error}") from error
    if missing := [key for key in NEEDED if key not in found]:
        raise DataError(f"{path} lacks {', '.join(missing)}; run `trol train` again.")
    return found


def render(found: Mapping[str, Any], name: str) -> str:
    """The page for the findings of a run."""
    validation = found.get("validation")
    return pages.render(
        "training",
        name=name,
        found=found,
        loss_charts={
            stage: charts.losses(stage, {"run": [curve]})
            for stage, curve in found["losses"].items()
        },
        gate_charts={
            stage: gates_over_time(stage, curve["steps"], curve["gates"])
            for stage, curve in found["losses"].items()
            if curve.get("gates")
        },
        validation=validation,
        accuracy_chart=validation
        and charts.accuracies(
            list(validation["by_type"]),
            {"this model": [validation["by_type"]]},
            validation["chance_by_type"],
        ),
        run=found.get("run", {}),
    )
