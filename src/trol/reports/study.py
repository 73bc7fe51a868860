"""The files of `trol study`: `study.json`, and the page `study.html`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trol.reports import pages
from trol.reports.pages import Results, Table

STUDY = Results(
    "study.json",
    "study.html",
    "trol study",
    ("study", "model", "weights", "random", "size", "seeds", "layers", "rule", "claims", "tables"),
)

RANDOM = "A random model knows nothing, so its verdicts mean nothing: they show that it runs."


def write(results: Mapping[str, Any], out: str | Path) -> Path:
    """Writes both files into the folder `out`, results first; see `Results.write`."""
    return STUDY.write(results, out, lambda _: render(results))


def render(results: Mapping[str, Any]) -> str:
    """The page."""
    tables = [(t["title"], Table(t["heading"], t["rows"], [])) for t in results["tables"]]
    values = {
        "claims": claims_table(results),
        "tables": tables,
        "run": results.get("run", {}),
        "measured_on": measured_on(results),
        "warning": RANDOM if results["random"] else "",
    }
    return pages.render("study.html", results=results, **values)


def claims_table(results: Mapping[str, Any]) -> Table:
    """Each claim with its statistic, interval and verdict."""
    rows = [
        [claim["claim"], claim["source"], claim["statistic"], *figures(claim), claim["verdict"]]
        for claim in results["claims"]
    ]
    heading = ["claim", "source", "statistic", "estimate", "95 % interval", "bound", "verdict"]
    return Table(heading, rows, [results["rule"]])


def measured_on(results: Mapping[str, Any]) -> str:
    """What a study measured, in words."""
    if results["random"]:
        return "a random model"
    return results["model"] or "small models that it trains"


def figures(claim: Mapping[str, Any]) -> list[str]:
    """Estimate, interval and bound as text, with digits enough to tell an end from the bound."""
    bound = f"{claim['side']} {claim['bound']:g}"
    if claim["value"] is None:
        return ["–", "nothing to compare", bound]
    ends = [abs(claim[key] - claim["bound"]) for key in ("low", "high")]
    digits = next((n for n in (3, 4, 5) if all(end == 0 or round(end, n) for end in ends)), 6)
    value, low, high = (f"{claim[key]:.{digits}f}" for key in ("value", "low", "high"))
    figures = [value, f"{low} to {high}", bound]
    return [text.replace("-", "−") for text in figures]
