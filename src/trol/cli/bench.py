"""`trol bench`: ratios of measured time to its limit, measured in this process."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from trol.cli import terminal
from trol.cli.terminal import argument, flag, option, run_record
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
    suite: Annotated[str, argument("SUITE", f"One of {SUITES}; or all.")],
    *,
    size: Annotated[str, option("--size", "NAME", "Of the host: tiny, small, 1.8b, 7b.")] = "small",
    dtype: Annotated[
        str, option("--dtype", "NAME", "Of the weights: float32, bf16, nf4.")
    ] = "float32",
    device: Annotated[str, option("--device", "NAME", "cpu or cuda.")] = "cpu",
    threads: Annotated[int, option("--threads", "N", "Of torch.")] = 1,
    rounds: Annotated[int | None, option("--rounds", "N", "In place of each suite's own.")] = None,
    out: Annotated[Path | None, option("--out", "DIR", "Write one JSON for each suite.")] = None,
    against: Annotated[
        Path | None,
        option("--against", "PATH", "Fail where slower than this result, or folder."),
    ] = None,
    profile: Annotated[
        bool, flag("--profile", "Show where the time of one pass goes instead.")
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
    names = _suites(suite, setting)
    stored = {} if against is None else _stored(against, names, setting)
    if out is not None:
        check_writable(out)
    results = _measured(names, setting, out, quiet=as_json)
    if as_json:
        whole = {"suites": results, "run": run_record()} if suite == "all" else results[suite]
        terminal.report(whole, as_json=True, text=str)
    if against is not None:
        _check_speed(results, stored, against)


def _profile(suite: str, setting: Setting, *, as_json: bool) -> None:
    """The operators that take the most time in one pass, beside those of the bare host."""
    from trol.bench.operators import profiled

    with terminal.quiet_libraries():
        operators = profiled(suite, setting)
    rows = [["operator", "calls", "ms", "bare calls", "bare ms"]]
    rows += [
        [one.name[:48], f"{one.calls}", f"{one.ms:.2f}", f"{one.bare_calls}", f"{one.bare_ms:.2f}"]
        for one in operators[:TOP]
    ]
    result: dict[str, Any] = {"suite": suite, **setting.record()}
    result |= {"operators": [one._asdict() for one in operators], "run": run_record()}
    terminal.report(result, as_json=as_json, text=lambda: terminal.table(rows))


def _suites(name: str, setting: Setting) -> list[str]:
    """The suite of this name; of `all` those that can be measured at this setting."""
    from trol import bench

    if name != "all":
        bench.check_suites([name])
    setting.check()
    if name != "all":
        return [name]
    names: list[str] = []
    for suite, one in bench.SUITES.items():
        refusal = one.refusal(setting)
        if refusal is None:
            names.append(suite)
        else:
            terminal.note(f"trol bench: {suite} is left out: {refusal}.")
    return names


def _measured(
    names: list[str], setting: Setting, out: Path | None, *, quiet: bool
) -> dict[str, Any]:
    """Runs suite after suite; each is written, and shown unless `quiet`, when it is done."""
    from trol.bench import run
    from trol.files import folder, write_json

    load = _load_average()
    results: dict[str, Any] = {}
    for name in names:
        if len(names) > 1:
            terminal.note(f"trol bench: {name}")
        with terminal.quiet_libraries():
            measured = run(name, setting)
        results[name] = {**measured, "load_average": load, "run": run_record()}
        _note_noise(name, measured["rows"])
        if out is not None:
            write_json(folder(out) / f"{file_name(name, setting)}.json", results[name])
        if not quiet:
            print(_table(measured["rows"]), flush=True)
    return results


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


def _check_speed(results: dict[str, Any], stored: dict[str, Any], against: Path) -> None:
    """Fails, naming the rows, where a suite is slower than it was."""
    from trol.bench.cases import compare

    slower: list[str] = []
    for name, result in results.items():
        if stored[name] is None:
            terminal.note(f"trol bench: {against} has no result of {name}; not compared.")
            continue
        compared = compare(result, stored[name])
        slower += compared.slower
        for line in compared.unsure:
            terminal.note(f"trol bench: too noisy to tell whether slower: {line}")
        for line in compared.lacking:
            terminal.note(f"trol bench: stored, but not measured now: {line}")
    if slower:
        rows = "\n  ".join(slower)
        raise TrolError(f"slower than {against} by more than the spread:\n  {rows}")
    terminal.note(f"trol bench: nothing is slower than {against}.")


def _load_average() -> float | None:
    """The machine's load average of the last minute, with a note where its cores are busy."""
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


def _note_noise(suite: str, rows: list[dict[str, Any]]) -> None:
    noisy = [row["case"] for row in rows if row["noisy"]]
    if noisy:
        terminal.note(
            f"trol bench: {suite}: {len(noisy)} of {len(rows)} rows are noisy, marked ?: "
            f"{'; '.join(noisy)}. Close other programs, or take more --rounds."
        )


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
