"""`trol bench`: medians and ratios of one suite, measured in this process."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from trol.cli import terminal
from trol.cli.provenance import run_record

EXAMPLES = (
    "trol bench overhead",
    "trol bench overhead --json",
    "trol bench skip",
)


def bench(
    suite: Annotated[
        str, typer.Argument(metavar="SUITE", help="The suite: overhead, train, skip.")
    ],
    as_json: terminal.AsJson = False,
) -> None:
    """Measure what SUITE promises, beside the bound it must keep."""
    from trol.evaluation import bench as suites

    with terminal.noise_to_stderr():
        found = suites.run(suite)
    result = {**found, "run": run_record()}
    terminal.report(result, as_json=as_json, text=lambda: _table(found["rows"]))


def _table(rows: list[dict[str, Any]]) -> str:
    heading = ["case", "baseline ms", "measured ms", "ratio", "must"]
    lines = [
        [
            row["case"],
            *(_number(row[key]) for key in ("baseline_ms", "measured_ms", "ratio", "must")),
        ]
        for row in rows
    ]
    return terminal.table([heading, *lines])


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
