"""`trol data`: look after the data that models learn from."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from trol.cli import FAILED, models, terminal
from trol.cli.terminal import argument, option, run_record
from trol.errors import unknown

if TYPE_CHECKING:
    from trol.data.check import Report
    from trol.data.mixture import Damaged, Mixture, MixtureFile

EXAMPLES = (
    "trol data check examples/mixture/mixture.yaml",
    "trol data check examples/mixture/mixture.yaml --processor trol-tiny --json",
    "trol data check examples/mixture/mixture.yaml --workers 1 --quarantine bad-rows.jsonl",
)
ACTIONS = ("check",)
SHOWN = 5
"""Damaged rows that the text shows; all of them are in the list."""

ROOT_HELP = "Where the mixture's files lie."
PROCESSOR_HELP = "Also find rows too long for MODEL."
WORKERS_HELP = "Processes. Default: one per core."
QUARANTINE_HELP = (
    "List of damaged rows, for training to skip. Default: in trol's cache, or beside the data "
    "where one lies there."
)


def _known(action: str) -> str:
    """The verb behind `trol data`, before the rest is missed; raises `UsageError` for another."""
    if action not in ACTIONS:
        raise unknown("verb of trol data", action, ACTIONS)
    return action


def data(
    action: Annotated[
        str,
        typer.Argument(
            metavar="check", help="Read everything once.", callback=_known, is_eager=True
        ),
    ],
    mixture: Annotated[str, argument("MIXTURE", "A YAML file, or a name: trol-2.27m.")],
    *,
    root: Annotated[Path | None, option("--root", "DIR", ROOT_HELP)] = None,
    processor: Annotated[str | None, option("--processor", "MODEL", PROCESSOR_HELP)] = None,
    workers: Annotated[int | None, option("--workers", "N", WORKERS_HELP, min=1)] = None,
    quarantine: Annotated[Path | None, option("--quarantine", "FILE", QUARANTINE_HELP)] = None,
    as_json: terminal.AsJson = False,
) -> None:
    """Check training data: counts, images, lengths.

    Writes the list of damaged rows, and nothing beside the data. Exits with 1 when it found damage
    that the list did not hold before, or another number of sound rows than the mixture says.
    """
    del action
    from trol.data.mixture import quarantine_path, read_mixture

    described = read_mixture(mixture, root=root)
    listed = quarantine or quarantine_path(described)
    with terminal.noise_to_stderr():  # transformers is not needed without a model
        report, new = _checked(described, listed, processor, workers or os.cpu_count() or 1)
    result = {
        "mixture": mixture,
        "sources": [_row(source, encoded=processor is not None) for source in report.sources],
        "damaged": len(report.damaged),
        "new": len(new),
        "quarantine": str(listed) if listed.exists() else None,
        "run": run_record(),
    }
    terminal.report(result, as_json=as_json, text=lambda: _text(result, new[:SHOWN]))
    if new or not all(source.counted for source in report.sources):
        raise typer.Exit(FAILED)


def _checked(
    described: MixtureFile, listed: Path, model: str | None, workers: int
) -> tuple[Report, list[Damaged]]:
    """The report, and the damage in it that the list, which is rewritten, did not hold."""
    from trol.data.mixture import open_mixture, read_quarantine, write_quarantine

    mixture = open_mixture(
        described, quarantine=listed, opening=lambda name: terminal.note(f"opening {name} ...")
    )
    report = _read_all(mixture, model, workers)
    known = read_quarantine(listed, mixture.sizes())
    if report.damaged or listed.exists():
        write_quarantine(listed, mixture.sizes(), report.damaged)
    new = [row for row in report.damaged if known.get(row.source, {}).get(row.row) != row.reason]
    return report, new


def _read_all(mixture: Mixture, model: str | None, workers: int) -> Report:
    """Reads every row; with a model, finds those too long for its positions as well."""
    from trol.data.check import check

    processor = most_tokens = None
    if model is not None:
        opened, processor = models.open_model(model)
        most_tokens = opened.config.get_text_config().max_position_embeddings
    done, of = 0, sum(len(part.index) for part in mixture.parts)
    with terminal.progress("reading", "row") as bar:

        def advance(rows: int) -> None:
            nonlocal done
            done += rows
            bar(done, of)

        return check(
            mixture,
            processor=processor,
            most_tokens=most_tokens,
            workers=workers,
            progress=advance,
        )


def _row(source: Any, *, encoded: bool) -> dict[str, Any]:
    row = {**dataclasses.asdict(source), "sound": source.sound, "counted": source.counted}
    # Lengths are known only in tokens of a model: null is not zero.
    row["too_long"] = source.damaged.get("too_long", 0) if encoded else None
    return row


def _text(result: dict[str, Any], shown: list[Damaged]) -> str:
    from trol.data.formats import KINDS

    sources = result["sources"]
    kinds = [kind for kind in KINDS if any(kind in row["damaged"] for row in sources)]
    rows = [["source", "rows", "images", "sound", "expected", *kinds]]
    for row in sources:
        counts = [f"{row[key]:,}" for key in ("rows", "images", "sound")]
        counts.append("-" if row["expected"] is None else f"{row['expected']:,}")
        rows.append(
            [row["source"], *counts, *(f"{row['damaged'].get(kind, 0):,}" for kind in kinds)]
        )
    lines = [terminal.table(rows)]
    lines += [f"{one.source}, row {one.row}: {one.reason}: {one.detail}" for one in shown]
    if result["new"] > len(shown):
        lines.append(f"... and {result['new'] - len(shown):,} more")
    lines += [
        f"{row['source']} has {row['sound']:,} sound rows, the mixture says {row['expected']:,}"
        for row in sources
        if not row["counted"]
    ]
    if result["damaged"]:
        lines.append(
            f"{result['damaged']:,} damaged rows are listed in {result['quarantine']}, "
            "which training reads to leave them out; the data are as they were"
        )
    if any(row["too_long"] is None for row in sources):
        lines.append("not checked: rows too long for a model; name one with --processor")
    return "\n".join(lines)
