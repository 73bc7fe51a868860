"""Writes what studies found into README.md and docs/studies.md: `python docs/studies.py`.

The figures are those of benchmarks/results/studies/*.json, each the study.json of a `trol study`.
tests/test_documents.py compares.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from trol.reports.study import figures

ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- studies: python docs/studies.py -->", "<!-- end of studies -->"
README, ALL = ROOT / "README.md", ROOT / "docs" / "studies.md"


def results() -> list[dict[str, Any]]:
    """The results of all studies, by name and model."""
    files = (ROOT / "benchmarks" / "results" / "studies").glob("*.json")
    found = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    return sorted(found, key=lambda one: (one["study"], one["model"]))


def row(result: dict[str, Any], claim: dict[str, Any], *, about: bool) -> str:
    """A claim as a line of a table; `about`: with its source and the command that measured it."""
    value, interval, bound = figures(claim)
    cells = [claim["claim"], f"{claim['statistic']}: {value} ({interval})", claim["verdict"]]
    if about:
        cells = [*cells[:1], claim["source"], f"{cells[1]}; claimed {bound}", cells[2]]
    return "| " + " | ".join(cells) + " |"


def first_claims() -> str:
    """The first claim of each study."""
    lines = ["| what is said | on SmolLM2-135M (95 % interval) | verdict |", "|---|---|---|"]
    return "\n".join([*lines, *(row(one, one["claims"][0], about=False) for one in results())])


def all_claims() -> str:
    """Every claim, study by study."""
    parts = []
    for result in results():
        amounts = ", ".join(f"{n.replace('_', ' ')} {v}" for n, v in result["amounts"].items())
        parts += [
            f"### {result['study']}: {result['model']}\n",
            f"`{result['run']['command']}`; {amounts}; seeds {result['seeds']}.\n",
            "| claim | who says so | statistic | verdict |",
            "|---|---|---|---|",
            *(row(result, claim, about=True) for claim in result["claims"]),
            "",
        ]
    return "\n".join(parts).rstrip()


def written() -> dict[Path, str]:
    """Each page with its table as the results are now."""
    return {
        page: re.sub(
            f"{BEGIN}.*?{END}",
            lambda _, table=table: f"{BEGIN}\n{table}\n{END}",
            page.read_text(encoding="utf-8"),
            flags=re.DOTALL,
        )
        for page, table in ((README, first_claims()), (ALL, all_claims()))
    }


if __name__ == "__main__":
    for page, text in written().items():
        page.write_text(text, encoding="utf-8")
