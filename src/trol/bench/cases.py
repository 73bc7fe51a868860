"""Rows of a suite: times measured in turn, each beside its limit, and beside stored results.

The limit is what the host itself takes for the layer visits that are really made:

    fixed(n) = time of the host with no layer left (embedding, norm, head) for n tokens or rows
    layer(n) = (host(n) - fixed(n)) / layers
    limit    = fixed(N) + sum over all visits of layer(how many tokens or rows make the visit)

All of it is measured in the same rounds as what is held against it, and worked out round by round.
"""

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

import torch

from trol.bench.setting import Setting
from trol.errors import DataError, UsageError
from trol.evaluation.timing import interleaved, ratio_and_spread, time_forward, time_generate

Row = dict[str, Any]
"""`{"case", "baseline_ms", "measured_ms", "limit_ms", "ratio", "spread", "must", "limit",
"noisy"}`: medians in milliseconds; ratio = measured / limit, the median over rounds, spread half
its interquartile range; `must` is the most that the ratio may be, None where nothing is promised;
`limit` says in words what the limit is."""

NOISE = 0.05
"""A spread above this share of the ratio makes a row noisy."""

Runs = dict[str, Callable[[], Any]]
"""Name -> a run that gives its milliseconds, or a dataclass of several figures."""

Times = dict[str, list[float]]
"""Run -> milliseconds, round by round. A dataclass has one entry for each field: "bare prefill"."""

FromTimes = Callable[[Times], list[float]]


@dataclass(frozen=True)
class Case:
    """One row of a suite: a run, and the limit that its time is held against."""

    name: str
    run: str | FromTimes
    """Whose time is measured."""
    limit: str
    """What the limit is, in words."""
    limit_ms: float | str | FromTimes
    """So many times the baseline, the time of another run, or worked out from all times."""
    must: float | None = None
    """The most that the ratio may be at the default setting; None where nothing is promised."""
    baseline: str = ""
    """The bare host's run; by default "bare" and the last word of `run`."""
    speed: bool = False
    """Whether the row gives `tokens_per_s`: of a prompt's tokens, or of new ones."""

    def row(self, times: Times, setting: Setting, shape: tuple[int, int] | None = None) -> Row:
        """The row of this case, which names the (rows, tokens) of its prompt."""
        baseline = times[self.baseline or f"bare {str(self.run).rsplit(' ', 1)[-1]}"]
        own = times[self.run] if isinstance(self.run, str) else self.run(times)
        if isinstance(self.limit_ms, str):
            limits = times[self.limit_ms]
        elif callable(self.limit_ms):
            limits = self.limit_ms(times)
        else:
            limits = [self.limit_ms * one for one in baseline]
        ratio, spread = ratio_and_spread(limits, own)
        row = {
            "case": self.name if shape is None else f"{self.name} b{shape[0]} t{shape[1]}",
            "baseline_ms": statistics.median(baseline),
            "measured_ms": statistics.median(own),
            "limit_ms": statistics.median(limits),
            "ratio": ratio,
            "spread": spread,
            "must": None if self.must is None else setting.must(self.must),
            "limit": self.limit,
            "noisy": spread > NOISE * abs(ratio),
        }
        if self.speed and shape:
            tokens = shape[0] * (shape[1] if "prefill" in self.name else 1)
            row["tokens_per_s"] = 1000 * tokens / row["measured_ms"]
        return row


def figure(case: str, ratio: float, limit: str, must: float | None) -> Row:
    """A row of something that is no time, and is measured once."""
    times: Row = dict.fromkeys(("baseline_ms", "measured_ms", "limit_ms"))
    ratios = {"ratio": ratio, "spread": 0.0, "must": must, "limit": limit, "noisy": False}
    return {"case": case, **times, **ratios}


def measured(runs: Runs, rounds: int, *, warmups: int = 1) -> Times:
    """The times of all runs, made in turn."""
    times: Times = {}
    for name, results in interleaved(runs, rounds=rounds, warmups=warmups).items():
        if is_dataclass(results[0]):
            for part in fields(results[0]):
                times[f"{name} {part.name}"] = [getattr(one, part.name) for one in results]
        else:
            times[name] = results
    return times


def answering(
    models: Mapping[str, Any], setting: Setting, ids: torch.Tensor, **inputs: Any
) -> Runs:
    """Greedy answers to a prompt of ids [B, T]; their times are "NAME prefill", "NAME decode"."""
    inputs, new_tokens = {"input_ids": ids, **inputs}, setting.size.new_tokens
    return {
        name: lambda model=model: time_generate(model, inputs, new_tokens)
        for name, model in models.items()
    }


def answered(
    models: Mapping[str, Any],
    cases: Sequence[Case],
    setting: Setting,
    rounds: int,
    *,
    shapes: Sequence[tuple[int, int]],
    memory_of: str | None = None,
) -> list[Row]:
    """The rows of cases for prompts of several shapes, (rows, tokens).

    `memory_of`: the model whose most memory held on a GPU is a row as well.
    """
    rows: list[Row] = []
    for shape in shapes:
        times = measured(answering(models, setting, setting.ids(*shape)), rounds)
        rows += [case.row(times, setting, shape) for case in cases]
        held = {name: max(one or 0 for one in times[f"{name} peak_bytes"]) for name in models}
        if memory_of is not None and held[memory_of]:
            case, share = f"{memory_of} peak memory", held[memory_of] / held["bare"]
            row = figure(f"{case} b{shape[0]} t{shape[1]}", share, "the bare host's peak", None)
            peaks = {"baseline_bytes": held["bare"], "measured_bytes": held[memory_of]}
            rows.append({**row, **peaks})
    return rows


def reading(models: Mapping[str, Any], ids: torch.Tensor, place: object) -> Runs:
    """One pass of the decoder over ids [B, T] for each model; its times are "NAME PLACE"."""
    return {
        f"{name} {place}": lambda model=model: time_forward(model, ids)
        for name, model in models.items()
    }


def visits(at: object, counts: Mapping[Any, float], layers: int) -> FromTimes:
    """The limit, from the runs "bare PLACE" and "fixed PLACE".

    Args:
        at: the place at which the fixed part is paid.
        counts: place -> how many layer visits are made there.
        layers: of the bare host.
    """

    def limits(times: Times) -> list[float]:
        total = list(times[f"fixed {at}"])
        for place, count in counts.items():
            rounds = zip(total, times[f"bare {place}"], times[f"fixed {place}"], strict=True)
            # Where a hiccup hit the fixed part, a layer takes nothing rather than less.
            total = [sum_ + count * max(bare - fixed, 0) / layers for sum_, bare, fixed in rounds]
        return total

    return limits


FLOOR = 0.02
"""Ratios this near each other, as a share of the stored one, are taken for equal."""

SAME = ("size", "dtype", "device", "threads")
"""What must be the same for ratios to be comparable."""


@dataclass(frozen=True)
class Comparison:
    """One suite's ratios against the stored ones."""

    slower: list[str] = field(default_factory=list)
    """Rows whose ratio rose by more than both spreads and the floor together."""
    unsure: list[str] = field(default_factory=list)
    """Rows that look slower, where one of the two measurements is noisy."""
    lacking: list[str] = field(default_factory=list)
    """Stored rows that were not measured now."""


def compare(result: Mapping[str, Any], stored: Mapping[str, Any]) -> Comparison:
    """Slower means: ratio - stored ratio > spread + stored spread + 2 % of the stored ratio.

    Raises:
        UsageError: the two are not of one suite, or were measured on hosts of different size, type,
            device or threads.
    """
    suite = result["suite"]
    if stored["suite"] != suite:
        raise UsageError(
            f"the stored results are of the suite {stored['suite']!r}, and these of "
            f"{suite!r}; give the file, or the folder, that `--out` wrote for it."
        )
    for key in SAME:
        if key in stored and stored[key] != result[key]:
            raise UsageError(
                f"the stored results of {suite} have {key} {stored[key]!r}, and these "
                f"{result[key]!r}; measure with the same --{key}."
            )
    rows = {row["case"]: row for row in result["rows"]}
    comparison = Comparison()
    for old in stored["rows"]:
        new = rows.get(old["case"])
        if new is None:
            comparison.lacking.append(f"{suite}: {old['case']}")
            continue
        tolerance = new["spread"] + old["spread"] + FLOOR * abs(old["ratio"])
        if new["ratio"] - old["ratio"] > tolerance:
            was, now = (f"{row['ratio']:.3f} ± {row['spread']:.3f}" for row in (old, new))
            noisy = new["noisy"] or old.get("noisy", False)
            lines = comparison.unsure if noisy else comparison.slower
            lines.append(f"{suite}: {new['case']}: {now}, was {was}")
    return comparison


def read_stored(against: Path, name: str) -> dict[str, Any] | None:
    """A stored result: the file itself, or `name`.json in a folder; None where it is not there.

    Raises:
        DataError: the file is no result of `trol bench`.
    """
    file = against / f"{name}.json" if against.is_dir() else against
    if not file.is_file():
        return None
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{file} is no JSON ({error}); give what `trol bench --out` wrote.") from (
            error
        )
    if not isinstance(stored, dict) or not {"suite", "rows"} <= stored.keys():
        raise DataError(f"{file} is no result of a suite; give what `trol bench --out` wrote.")
    return stored
