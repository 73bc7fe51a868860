"""`trol bench`: ratios of measured time to its limit, measured in this process."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from trol.cli import terminal
from trol.cli.terminal import run_record
from trol.errors import TrolError, UsageError

if TYPE_CHECKING:
    from trol.bench.setting import Setting

EXAMPLES = (
    "trol bench traverse --size tiny",
    "trol bench overhead --size tiny --rounds 3 --json",
    "trol bench all --size tiny --rounds 2 --out runs/bench",
)
TOP = 20
"""Operators that a profile shows."""

SUITES = "overhead, traverse, skip, rows, sparse, launch, speculate, train, load"


def bench(
    suite: Annotated[str, typer.Argument(metavar="SUITE", help=f"One of {SUITES}; or all.")],
    *,
    size: Annotated[
        str, typer.Option("--size", metavar="NAME", help="Of the host: tiny, small, 1.8b, 7b.")
    ] = "small",
    dtype: Annotated[
        str, typer.Option("--dtype", metavar="NAME", help="Of the weights: float32, bf16, nf4.")
    ] = "float32",
    device: Annotated[str, typer.Option("--device", metavar="NAME", help="cpu or cuda.")] = "cpu",
    threads: Annotated[int, typer.Option("--threads", metavar="N", help="Of torch.")] = 1,
    rounds: Annotated[
        int | None, typer.Option("--rounds", metavar="N", help="In place of each suite's own.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Write one JSON for each suite.")
    ] = None,
    against: Annotated[
        Path | None,
        typer.Option(
            "--against", metavar="PATH", help="Fail where slower than this result, or folder."
        ),
    ] = None,
    profile: Annotated[
        bool, typer.Option("--profile", help="Show where the time of one pass goes instead.")
    ] = False,
    as_json: terminal.AsJson = False,
) -> None:
    """Measure what SUITE promises, beside the bound it must keep."""
    from trol.bench import Setting
    from trol.bench.setting import size_of
    from trol.checkpoints.adapter import check_writable

    setting = Setting(size_of(size), dtype, device, threads, rounds)
    if profile:
        return _profile(suite, setting, as_json=as_json)
    names = _chosen(suite, setting)
    stored = {} if against is None else _stored(against, names, setting)
    if out is not None:
        check_writable(out)
    terminal.no_library_bars()
    found = _measured(names, setting, out, quiet=as_json)
    if as_json:
        whole = {"suites": found, "run": run_record()} if suite == "all" else found[suite]
        terminal.report(whole, as_json=True, text=str)
    if against is not None:
        _check(found, stored, against)


def _profile(suite: str, setting: Setting, *, as_json: bool) -> None:
    """The operators that take the most time in one pass, beside those of the bare host."""
    from trol.bench.operators import profiled

    with terminal.noise_to_stderr():
        made = profiled(suite, setting)
    shown = [one._asdict() for one in made]
    heading = ["operator", "calls", "ms", "bare calls", "bare ms"]
    lines = [
        [one.name[:48], f"{one.calls}", f"{one.ms:.2f}", f"{one.bare_calls}", f"{one.bare_ms:.2f}"]
        for one in made[:TOP]
    ]
    result = {"suite": suite, **setting.record(), "operators": shown, "run": run_record()}
    terminal.report(result, as_json=as_json, text=lambda: terminal.table([heading, *lines]))


def _chosen(suite: str, setting: Setting) -> list[str]:
    """The suite of this name; of `all` those that can be measured at this setting."""
    from trol.bench import SUITES as KNOWN
    from trol.bench import check_suites

    if suite != "all":
        check_suites([suite])
    setting.check()
    if suite != "all":
        return [suite]
    refused = {name: one.refusal(setting) for name, one in KNOWN.items()}
    for name, why in refused.items():
        if why is not None:
            terminal.note(f"trol bench: {name} is left out: {why}.")
    return [name for name, why in refused.items() if why is None]


def _measured(
    names: list[str], setting: Setting, out: Path | None, *, quiet: bool
) -> dict[str, Any]:
    """Runs suite after suite; each is written, and shown unless `quiet`, when it is done."""
    from trol.bench import run

    load, found = _load_average(), {}
    for name in names:
        if len(names) > 1:
            terminal.note(f"trol bench: {name}")
        with terminal.noise_to_stderr():
            made = run(name, setting)
        found[name] = {**made, "load_average": load, "run": run_record()}
        _tell_noise(found[name])
        if out is not None:
            _write(found[name], out, setting)
        if not quiet:
            print(_table(made["rows"]), flush=True)
    return found


def file_name(suite: str, setting: Setting) -> str:
    """What a suite's result is called, without the ending."""
    return "-".join(part for part in (suite, setting.name) if part)


def _stored(against: Path, names: list[str], setting: Setting) -> dict[str, Any]:
    """The stored results of these suites, as far as there are any."""
    from trol.bench.cases import read_stored

    if not against.exists():
        raise UsageError(f"there is no {against}; give a result of --out, or the folder of them.")
    if not against.is_dir() and len(names) > 1:
        raise UsageError(f"{against} is no folder; `all` needs one of stored results.")
    stored = {name: read_stored(against, file_name(name, setting)) for name in names}
    if not any(stored.values()):
        raise UsageError(
            f"{against} has no result of {', '.join(names)} at this setting; write one by --out."
        )
    return stored


def _check(found: dict[str, Any], stored: dict[str, Any], against: Path) -> None:
    """Fails, naming the rows, where a suite is slower than it was."""
    from trol.bench.cases import compare

    slower: list[str] = []
    for name, made in found.items():
        if stored[name] is None:
            terminal.note(f"trol bench: {against} has no result of {name}; not compared.")
            continue
        compared = compare(made, stored[name])
        slower += compared.slower
        for line in compared.unsure:
            terminal.note(f"trol bench: too noisy to tell whether slower: {line}")
        for line in compared.lacking:
            terminal.note(f"trol bench: stored, but not measured now: {line}")
    if slower:
        listed = "\n  ".join(slower)
        raise TrolError(f"slower than {against} by more than the spread:\n  {listed}")
    terminal.note(f"trol bench: nothing is slower than {against}.")


def _load_average() -> float | None:
    """The machine's load average of the last minute; said where the cores have work already."""
    from trol.bench.setting import cores

    if not hasattr(os, "getloadavg"):
        return None
    load = os.getloadavg()[0]
    if load > cores():
        terminal.note(
            f"trol bench: this machine is busy: a load of {load:.1f} on {cores()} cores; read the "
            "spreads, or measure again when it is quiet."
        )
    return load


def _tell_noise(found: dict[str, Any]) -> None:
    noisy = [row["case"] for row in found["rows"] if row["noisy"]]
    if noisy:
        terminal.note(
            f"trol bench: {found['suite']}: {len(noisy)} of {len(found['rows'])} rows are noisy, "
            f"marked ?: {'; '.join(noisy)}. Close other programs, or take more --rounds."
        )


def _write(result: dict[str, Any], out: Path, setting: Setting) -> None:
    from trol.files import folder, write_json

    write_json(folder(out) / f"{file_name(result['suite'], setting)}.json", result)


def _table(rows: list[dict[str, Any]]) -> str:
    heading = ["case", "baseline ms", "measured ms", "limit ms", "ratio", "spread", "must", ""]
    keys = ("baseline_ms", "measured_ms", "limit_ms", "ratio", "spread", "must")
    lines = [[row["case"], *(_number(row[key]) for key in keys), _mark(row)] for row in rows]
    return terminal.table([heading, *lines])


def _mark(row: dict[str, Any]) -> str:
    """? for a noisy row, ! for one above its bound."""
    above = row["must"] is not None and row["ratio"] > row["must"]
    return ("!" if above else "") + ("?" if row["noisy"] else "")


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
