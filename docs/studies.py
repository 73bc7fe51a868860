"""Writes what studies found into README.md, docs/studies.md and docs/claims.md.

    python docs/studies.py

The figures are those of benchmarks/results/studies/*.json, each the study.json of a `trol study`;
the claims of docs/claims.md are those of docs/claims.yaml. tests/test_documents.py compares.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import yaml

from trol.reports.study import figures

ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- studies: python docs/studies.py -->", "<!-- end of studies -->"
README, ALL = ROOT / "README.md", ROOT / "docs" / "studies.md"
CLAIMS, TABLE = ROOT / "docs" / "claims.md", ROOT / "docs" / "claims.yaml"


def results() -> list[dict[str, Any]]:
    """The results of all studies, by name and model."""
    files = (ROOT / "benchmarks" / "results" / "studies").glob("*.json")
    found = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    return sorted(found, key=lambda one: (one["study"], measured_on(one)))


def measured_on(result: dict[str, Any]) -> str:
    """What a study measured, which may be models that it trained."""
    if not result["model"]:
        return f"a {result['size']} model"
    bits = re.match(r"\d+-bit", result["weights"])
    seeds = ["one seed"] if result["seeds"] == 1 else []
    of_weights = ", ".join([*([bits[0]] if bits else []), *seeds])
    return f"{result['model']} ({of_weights})" if of_weights else result["model"]


def figure(claim: dict[str, Any]) -> str:
    """A claim's statistic with its interval."""
    value, interval, _ = figures(claim)
    return f"{claim['statistic']}: {value} ({interval})"


def line(*cells: str) -> str:
    """A line of a table."""
    return "| " + " | ".join(cells) + " |"


def first_claims() -> str:
    """The first claim of each study, pretrained models before those that studies train."""
    heading = ("what is said", "measured on", "found (95 % interval; claimed)", "verdict")
    lines = [line(*heading, "all claims of the study"), "|---|---|---|---|---|"]
    ordered = sorted(results(), key=lambda one: one["size"] == "tiny")
    for _, group in groupby(ordered, key=lambda one: one["study"]):
        of_models = list(group)
        claims = [result["claims"][0] for result in of_models]
        found = ["{} ({}; {})".format(*figures(one)) for one in claims]
        found[0] = f"{claims[0]['statistic']}: {found[0]}"
        models, verdicts = map(measured_on, of_models), (one["verdict"] for one in claims)
        cells = (models, found, verdicts, map(counted, of_models))
        lines.append(line(claims[0]["claim"], *map("<br>".join, cells)))
    return "\n".join(lines)


def counted(result: dict[str, Any]) -> str:
    """How many claims of a study have which verdict."""
    verdicts = Counter(claim["verdict"].split(" at ")[0] for claim in result["claims"])
    return ", ".join(f"{count} {verdict}" for verdict, count in sorted(verdicts.items()))


def all_claims() -> str:
    """Every claim, study by study."""
    parts = []
    for result in results():
        amounts = ", ".join(f"{n.replace('_', ' ')} {v}" for n, v in result["amounts"].items())
        seeds = "" if result["seeds"] is None else f"; seeds {result['seeds']}"
        weights = f" Weights: {result['weights']}." if result["weights"] else ""
        parts += [
            f"### {result['study']}: {measured_on(result)}\n",
            f"`{result['run']['command']}`; {amounts}{seeds}.{weights}\n",
            "| claim | who says so | statistic | verdict |",
            "|---|---|---|---|",
            *(
                line(
                    claim["claim"],
                    claim["source"],
                    f"{figure(claim)}; claimed {figures(claim)[2]}",
                    claim["verdict"],
                )
                for claim in result["claims"]
            ),
            "",
        ]
    return "\n".join(parts).rstrip()


def claimed() -> list[dict[str, Any]]:
    """The groups of docs/claims.yaml."""
    return yaml.safe_load(TABLE.read_text(encoding="utf-8"))


def claims_page() -> str:
    """Every claim of docs/claims.yaml with what decides it."""
    parts = []
    for group in claimed():
        parts += [f"## {group['group']}\n", f"{group['about']}\n"]
        parts += [
            line("claim", group["figures"], "decided by", "found (95 % interval)", "verdict"),
            "|---|---|---|---|---|",
        ]
        for claim in group["claims"]:
            said = about(claim)
            for cells in deciders(claim):
                parts.append(line(*said, *cells))
                said = ("", "")  # once, above all that decides it
        parts.append("")
    return "\n".join(parts).rstrip()


def about(claim: dict[str, Any]) -> tuple[str, str]:
    """A claim, and its source with figures and what is disputed of them."""
    said = f"{claim['source']}: {claim['says']}" if "says" in claim else claim["source"]
    disputed = f". **Disputed**: {claim['disputed']}" if "disputed" in claim else ""
    return claim["claim"], said + disputed


def deciders(claim: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    """What decides a claim, what was found, and the verdict: one row each."""
    for study, texts in claim.get("by", {}).items():
        found = [result for result in results() if result["study"] == study]
        for text in texts or [""]:
            name = f"`{study}`" + (f": {text}" if text else "")
            if not found:
                yield name, "", "not run"
            for result in found:
                one = its_claim(result, text, claim["claim"])
                yield name, f"{measured_on(result)}, {figure(one)}", one["verdict"]
    if "lab" in claim:
        yield (
            f"[LAB.md](../LAB.md): {claim['lab']}",
            "measured without a bound set before",
            "see there",
        )
    if "open" in claim:
        yield f"would decide it: {claim['open']}", "", "open"


def its_claim(result: dict[str, Any], text: str, asked: str) -> dict[str, Any]:
    """The claim of a study's result that docs/claims.yaml names; else `ValueError`."""
    for claim in result["claims"]:
        if claim["claim"] == text:
            return claim
    known = "; ".join(claim["claim"] for claim in result["claims"])
    raise ValueError(
        f"docs/claims.yaml, {asked!r}: {text!r} is no claim of the study {result['study']}, which "
        f"has a result; name some of these: {known}"
    )


def written() -> dict[Path, str]:
    """Each page with its table as the results are now."""
    return {
        page: re.sub(
            f"{BEGIN}.*?{END}",
            lambda _, table=table: f"{BEGIN}\n{table}\n{END}",
            page.read_text(encoding="utf-8"),
            flags=re.DOTALL,
        )
        for page, table in (
            (README, first_claims()),
            (ALL, all_claims()),
            (CLAIMS, claims_page()),
        )
    }


if __name__ == "__main__":
    for page, text in written().items():
        page.write_text(text, encoding="utf-8")
