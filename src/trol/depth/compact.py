"""Rows that a fixed plan lets visit a layer enter it, and lie in its cache, without the others."""

from __future__ import annotations

import torch
from torch import Tensor

from trol.depth.call import Call
from trol.depth.layer_run import LayerRun
from trol.depth.planes import PlanedCache, adopt
from trol.depth.policy import AbstractPolicy, StackBounds, Visit
from trol.host.cache import is_growing_and_empty
from trol.host.rows_kept import RowsKept, keep_rows
from trol.host.side_inputs import rows_known, rows_taken


def check_rows(
    cache: PlanedCache, policy: AbstractPolicy, bounds: StackBounds, *, everywhere: bool
) -> None:
    """Raises `HostError` where `policy` has other rows visit a layer than those that it holds.

    `everywhere`: whether its scope is `all`.
    """
    places = [((layer, 1), slot) for layer, slot in enumerate(cache.layers)]
    for (layer, plane), slot in [*places, *cache.planes.items()]:
        if "kept" not in vars(slot):  # which only a RowsKept has
            continue
        most = bounds.layers[layer].most
        if most:  # else the layer is left alone
            fixed = policy.rows_going(layer, plane - 1, slot.batch) if everywhere else None
            going = [most >= plane] * slot.batch if fixed is None else fixed
            slot.check([row for row, goes in enumerate(going) if goes])


def rows_alone(run: LayerRun, visit: Visit, call: Call) -> Tensor | None:
    """Rows that make this visit without the others, as a plan settled; None for all. Shape: [b].

    Raises:
        HostError: the cache holds other rows in this layer.
    """
    fixed = call.rows_going(visit)
    if fixed is None:
        return None
    slot = None if run.planes is None else run.planes.slots[visit.number]
    going = [row for row, goes in enumerate(fixed) if goes]
    if isinstance(slot, RowsKept):
        slot.check(going)
        return slot.kept
    fresh = slot is None or is_growing_and_empty(slot)
    if not (call.looks and fresh and _understood(run, len(fixed))):
        return None
    rows, device = torch.tensor(going), visit.state.device
    if slot is not None:
        adopt(run.cache)  # whoever comes next is asked
        keep_rows(slot, rows, len(fixed), device)
    return rows.to(device)


def visit_alone(run: LayerRun, state: Tensor, plane: int, rows: Tensor) -> Tensor:
    """One visit by some rows; the others keep their state. Shape: [B, T, D], rows [b]."""
    args, kwargs = run.inputs(state)
    batch = len(state)
    given = {name: rows_taken(one, name, rows, batch) for name, one in kwargs.items()}
    names = run.site.names[: len(args)]
    placed = [rows_taken(one, name, rows, batch) for name, one in zip(names, args, strict=True)]
    visited = run.apply(state.index_select(0, rows), plane, inputs=(tuple(placed), given))
    return state.index_copy(0, rows, visited)


def _understood(run: LayerRun, batch: int) -> bool:
    """Whether it is known of every side input of a layer what belongs to which row."""
    args, kwargs = run.given
    placed = zip(run.site.names[: len(args)], args, strict=True)
    return all(rows_known(value, name, batch) for name, value in [*placed, *kwargs.items()])
