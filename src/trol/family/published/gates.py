"""The gates of a published checkpoint: L entries, which may all be the same one."""

from __future__ import annotations

import inspect
import warnings

import torch
from torch import Tensor

from trol.errors import DataError
from trol.family.published.files import CURE, GATING, Checkpoint, read_pickled
from trol.family.published.layouts import GATES

Entries = dict[str, Tensor]
"""'{layer}.weight' [1, D] and '{layer}.bias' [1] for each layer."""


def read_gates(checkpoint: Checkpoint, family: str) -> Entries:
    """The gates, from their own file, or from among the weights where there is no such file.

    Raises:
        DataError: there are none, or the file is damaged.
    """
    file, prefix = checkpoint.folder / GATING, GATES[family]
    if file.is_file():
        return read_pickled(file, mmap=False)
    among = [name for name in checkpoint.names() if name.startswith(prefix)]
    if not among:
        raise DataError(
            f"{checkpoint.folder} is no TroL checkpoint: it has neither {GATING} nor tensors "
            f"called {prefix}0.weight and so on; put {GATING} beside its weights."
        )
    return {name.removeprefix(prefix): checkpoint.read(name) for name in among}


def check_gates(entries: Entries, where: str, layers: int, width: int) -> None:
    """`DataError` unless there is one gate of that width, and of finite values, for each layer."""
    kinds = {"weight": [1, width], "bias": [1]}
    wanted = {f"{i}.{kind}": shape for i in range(layers) for kind, shape in kinds.items()}
    missing, surplus = wanted.keys() - entries.keys(), entries.keys() - wanted.keys()
    if missing or surplus:
        raise DataError(
            f"{where} holds gates for {len(entries) / 2:g} layers, the decoder has {layers}: "
            f"missing {_few(missing)}, surplus {_few(surplus)}; take the {GATING} that was "
            "published with these weights."
        )
    for name, shape in wanted.items():
        if list(entries[name].shape) != shape:
            raise DataError(
                f"{where}: {name!r} has the shape {list(entries[name].shape)}, expected {shape}, "
                f"the width of the decoder; take the {GATING} that was published with these "
                "weights."
            )
        if not entries[name].isfinite().all():
            raise DataError(
                f"{where}: {name!r} has values that are infinite or no numbers, expected finite "
                f"ones; {CURE}."
            )


def sharing_of(entries: Entries, layers: int, where: str) -> str:
    """'shared' where all entries are equal, or else 'per_layer', with a warning."""
    apart = {layer: _distance(entries, layer) for layer in range(1, layers)}
    others = [layer for layer, distance in apart.items() if distance > 0]
    if not others:
        return "shared"
    warnings.warn(
        f"the gates in {where} differ: those of the layers {_few(others)} are not layer 0's (by up "
        f"to {max(apart.values()):.3g}). Each layer gets its own; the official code would use the "
        f"last one, number {layers - 1}, in all layers.",
        UserWarning,
        stacklevel=_callers_level(),
    )
    return "per_layer"


def gate_tensors(entries: Entries, layers: int, sharing: str) -> Entries:
    """The gates by their names in a TroL model; of shared ones the first layer's."""
    held = range(1 if sharing == "shared" else layers)
    return {
        f"model.language_model.layers.{layer}.depth.{kind}": entries[f"{layer}.{kind}"]
        for layer in held
        for kind in ("weight", "bias")
    }


def _distance(entries: Entries, layer: int) -> float:
    """The largest difference to layer 0's gate; infinite where one of them is not finite."""
    distances = [
        (entries[f"{layer}.{kind}"].float() - entries[f"0.{kind}"].float()).abs().max()
        for kind in ("weight", "bias")
        if not torch.equal(entries[f"{layer}.{kind}"], entries[f"0.{kind}"])
    ]
    return max((float(d.nan_to_num(torch.inf)) for d in distances), default=0.0)


def _callers_level() -> int:
    """The `stacklevel`, for a warning of the calling function, of who called trol."""
    level, frame = 0, inspect.currentframe()
    while frame is not None:
        module = str(frame.f_globals.get("__name__"))
        if module.partition(".")[0] not in ("trol", "functools"):
            return level
        level, frame = level + 1, frame.f_back
    return level


def _few(items: object) -> str:
    """At most four of them, in order."""
    listed = sorted(items)  # type: ignore[call-overload]
    more = f" and {len(listed) - 4} more" if len(listed) > 4 else ""
    return ", ".join(map(str, listed[:4])) + more if listed else "none"
