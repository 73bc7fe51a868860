"""The oracle's curve, as `trol oracle` left it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trol.data.oracle_rows import LOWER_IS_BETTER
from trol.errors import DataError, UsageError

FILE = "oracle.json"
NEEDED = ("task", "split", "scope", "metric", "layers", "curve", "equal_budget", "full", "n")
UNKNOWN = ("flops", "prefill_flops", "ms", "prefill_ms")
"""Costs that an oracle does not tell: it chooses after all levels have answered."""


def read_oracle(folder: Path) -> dict[str, Any]:
    """What a finished oracle found.

    Raises:
        UsageError: the folder holds no finished oracle.
        DataError: its file is damaged.
    """
    path = folder / FILE
    if not path.is_file():
        raise UsageError(
            f"{folder} holds no finished oracle ({FILE}); run `trol oracle MODEL --out {folder}` "
            "to its end."
        )
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is damaged ({error}); run `trol oracle` again.") from error
    if missing := [key for key in NEEDED if key not in found]:
        raise DataError(f"{path} lacks {', '.join(missing)}; run `trol oracle` again.")
    return found


def check_oracle(folder: Path, task: str, scope: str, layers: int) -> dict[str, Any]:
    """What the oracle of this task, scope and number of layers found.

    Raises:
        UsageError: it is of another task, scope or stack; or none is there.
        DataError: its file is damaged.
    """
    found = read_oracle(folder)
    if found["task"] != task:
        raise UsageError(
            f"the oracle in {folder} was asked {found['task']}; name a folder of the task {task} "
            "with --oracle."
        )
    if found["layers"] != layers:
        raise UsageError(
            f"the oracle in {folder} chose among plans of {found['layers']} layers, this model has "
            f"{layers}; name a folder of this model with --oracle."
        )
    if found["scope"] != scope:
        raise UsageError(
            f"the oracle in {folder} was made with scope {found['scope']}, these curves with "
            f"{scope}; give --scope {found['scope']}, or run `trol oracle --scope {scope}`."
        )
    return found


def oracle_points(found: dict[str, Any], folder: Path, keeps: Sequence[float]) -> list[Any]:
    """The oracle's points at these shares, at the one that equals the full model, and at its end.

    One set of questions, so no spread. The budget is a mean over sequences; a share below that of
    the cheapest level has no point.
    """
    curve = sorted(found["curve"], key=lambda point: point["share"])
    wanted = {found["equal_budget"]["share"], *keeps}
    picked = {_last_within(curve, share) for share in sorted(wanted)} | {len(curve) - 1}
    metric, sign = found["metric"], _sign(found)
    return [_point(curve[number], metric, sign, folder) for number in sorted(picked) if number >= 0]


def made_on(found: dict[str, Any]) -> dict[str, Any]:
    """The questions of an oracle, and what the full model scored on them; a loss as it is."""
    told = {key: found[key] for key in ("n", "split", "metric")}
    told["seed"] = found.get("run", {}).get("seed")
    return {**told, "full": _sign(found) * found["full"]}


def _sign(found: dict[str, Any]) -> int:
    return -1 if found["metric"] in LOWER_IS_BETTER else 1


def _last_within(curve: Sequence[dict[str, Any]], share: float) -> int:
    """The dearest point that costs no more, -1 where there is none."""
    return sum(point["share"] <= share + 1e-9 for point in curve) - 1


def _point(point: dict[str, Any], metric: str, sign: int, folder: Path) -> dict[str, Any]:
    def one(value: float) -> dict[str, Any]:
        return {"mean": value, "spread": None, "values": [value]}

    costs = ("visits", "visits_share"), ("layers", "share")
    told: dict[str, Any] = {"keep": point["share"], "settings": {"oracle": str(folder)}}
    told["metrics"] = {metric: one(sign * point["oracle"])}
    told |= {name: one(point[key]) for name, key in zip(*costs, strict=True)}
    for name in UNKNOWN:
        told |= {name: None, f"{name}_{'ratio' if 'ms' in name else 'share'}": None}
    return {**told, "cosines": None}
