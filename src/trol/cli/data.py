"""`trol data`: look after the data that models learn from."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from trol.cli import FAILED, terminal
from trol.cli.terminal import run_record
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
"""Damaged rows that are told in words; all of them are in the list."""

Root = Annotated[
    Path | None, typer.Option("--root", metavar="DIR", help="Where the mixture's files lie.")
]
Processor = Annotated[
    str | None,
    typer.Option("--processor", metavar="MODEL", help="Also find rows too long for MODEL."),
]
Workers = Annotated[
    int | None,
    typer.Option("--workers", metavar="N", min=1, help="Processes. Default: one per core."),
]
Quarantine = Annotated[
    Path | None,
    typer.Option(
        "--quarantine",
        metavar="FILE",
        help="List of damaged rows, for training to skip. Default: in trol's cache, or beside "
        "the data where one lies there.",
    ),
]


def data(
    action: Annotated[str, typer.Argument(metavar="check", help="Read everything once.")],
    mixture: Annotated[
        str, typer.Argument(metavar="MIXTURE", help="A YAML file, or a name: trol-2.27m.")
    ],
    *,
    root: Root = None,
    processor: Processor = None,
    workers: Workers = None,
    quarantine: Quarantine = None,
    as_json: terminal.AsJson = False,
) -> None:
    """Check training data: counts, images, lengths.

    Writes the list of damaged rows, and nothing beside the data. Exits with 1 when it found damage
    that the list did not hold before, or another number of sound rows than the mixture says.
    """
    if action not in ACTIONS:
        raise unknown("action", action, ACTIONS)
    from trol.data.mixture import quarantine_path, read_mixture

    described = read_mixture(mixture, root=root)
    listed = quarantine or quarantine_path(described)
    with terminal.noise_to_stderr():
        report, new = _checked(described, listed, processor, workers or os.cpu_count() or 1)
    result = {
        "mixture": mixture,
        "sources": [_row(one, encoded=processor is not None) for one in report.sources],
        "damaged": len(report.damaged),
        "new": len(new),
        "quarantine": str(listed) if listed.exists() else None,
        "run": run_record(None),
    }
    terminal.report(result, as_json=as_json, text=lambda: _text(result, new[:SHOWN]))
    if new or not all(one.counted for one in report.sources):
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
    return report, [
        one for one in report.damaged if known.get(one.source, {}).get(one.row) != one.reason
    ]


def _read_all(mixture: Mixture, model: str | None, workers: int) -> Report:
    from rich.console import Console
    from rich.progress import Progress

    from trol.data.check import check

    reader, most = _processor(model)
    with Progress(console=Console(stderr=True), transient=True) as bars:
        bar = bars.add_task("reading rows", total=sum(len(part.index) for part in mixture.parts))
        return check(
            mixture,
            processor=reader,
            most_tokens=most,
            workers=workers,
            progress=lambda rows: bars.advance(bar, rows),
        )


def _processor(model: str | None) -> tuple[Any, int | None]:
    """The model's processor, and how many positions the model has."""
    if model is None:
        return None, None
    from trol.cli.models import open_model

    loaded, processor = open_model(model)
    return processor, loaded.config.get_text_config().max_position_embeddings


def _row(one: Any, *, encoded: bool) -> dict[str, Any]:
    row = {**dataclasses.asdict(one), "sound": one.sound, "counted": one.counted}
    # Lengths are known only in tokens of a model: null is not zero.
    row["too_long"] = one.damaged.get("too_long", 0) if encoded else None
    return row


def _text(result: dict[str, Any], told: list[Damaged]) -> str:
    from trol.data.formats import KINDS

    sources = result["sources"]
    kinds = [kind for kind in KINDS if any(kind in row["damaged"] for row in sources)]
    rows = [["source", "rows", "images", "sound", "expected", *kinds]]
    for row in sources:
        expected = "-" if row["expected"] is None else f"{row['expected']:,}"
        found = [f"{row[key]:,}" for key in ("rows", "images", "sound")]
        damaged = [f"{row['damaged'].get(kind, 0):,}" for kind in kinds]
        rows.append([row["source"], *found, expected, *damaged])
    lines = [terminal.table(rows)]
    lines += [f"{one.source}, row {one.row}: {one.reason}: {one.detail}" for one in told]
    if result["new"] > len(told):
        lines.append(f"... and {result['new'] - len(told):,} more")
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
