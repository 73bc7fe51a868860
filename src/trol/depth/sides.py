"""What a layer takes beside the hidden states, for some tokens of a call only."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, StaticLayer

from trol.depth.selection import Group

if TYPE_CHECKING:  # which hold these inputs, or ask for them
    from trol.depth.layer_run import LayerRun
    from trol.depth.packed import Packing

Inputs = tuple[tuple[Any, ...], dict[str, Any]]
"""What a layer takes beside the hidden states."""

PER_TOKEN = {
    "attention_mask": -2,
    "image_tokens": -1,
    "per_layer_input": -2,
    "position_embeddings": -2,
    "position_ids": -1,
}
"""Side inputs of a layer that go with its tokens, and in which dimension the tokens lie."""

PER_KEY = ("alibi",)
"""Side inputs that go with rows and keys. Shape: [B * heads, ...]."""


def understood(run: LayerRun, rows: int, tokens: int) -> bool:
    """Whether every side input of a layer is known, so that some tokens can go alone."""
    return all(
        _known(value, name, rows, tokens) for name, value in _given(run.args, run.kwargs, run)
    )


def masked(run: LayerRun, slot: Any) -> bool:
    """Whether the mask is there, or is not needed to tell which keys are written."""
    return run.site.mask_in(run.args, run.kwargs) is not None or not isinstance(slot, StaticLayer)


def sides_of(
    run: LayerRun, inputs: Inputs, group: Group, slot: Any, packing: Packing, state: Tensor
) -> Inputs:
    """A layer's arguments for the tokens of one group.

    Args:
        run: the layer.
        inputs: its arguments for all tokens.
        group: who goes, or leaves.
        slot: the keys and values before this step.
        packing: all groups.
        state: the hidden states of all tokens. Shape: [B, T, D].
    """
    args, kwargs = inputs
    if group.rows is None and group.tokens is None:
        return inputs
    names, (rows, step, _) = run.site.names[: len(args)], state.shape
    given = dict(_given(args, kwargs, run))
    mask = given.pop("attention_mask", None)
    taken = {name: _taken(value, name, group, rows) for name, value in given.items()}
    taken["attention_mask"] = None  # who leaves at the cache never comes to attend
    if group in packing.going:
        taken["attention_mask"] = _mask(run, mask, group, slot, step, among=packing.among)
    return tuple(taken.pop(name) for name in names), taken


def _mask(
    run: LayerRun, mask: Tensor | None, group: Group, slot: Any, step: int, *, among: bool
) -> Tensor | None:
    """What the group's tokens see: keys of all positions, or `among` themselves."""
    if mask is not None:
        mask = group.take(mask, -2)
        return group.take_keys(mask) if among else mask
    if among or group.tokens is None or not run.site.causal:
        return None
    # Without a mask, fewer queries than keys would be taken for the first ones.
    return _causal(group.tokens, slot, step)


def _given(args: tuple[Any, ...], kwargs: dict[str, Any], run: LayerRun) -> list[tuple[str, Any]]:
    names = run.site.names[: len(args)]
    return [*zip(names, args, strict=True), *kwargs.items()]


def _known(value: Any, name: str, rows: int, tokens: int) -> bool:
    if isinstance(value, tuple | list):
        return all(_known(part, name, rows, tokens) for part in value)
    if not isinstance(value, Tensor):
        return value is None or isinstance(value, bool | int | float | str | Cache)
    if name in PER_KEY:
        return len(value) % rows == 0
    dim = PER_TOKEN.get(name)
    if dim is None or value.ndim < 2 or len(value) not in (1, rows):
        return False
    return value.ndim > -dim and value.shape[dim] == tokens


def _taken(value: Any, name: str, group: Group, rows: int) -> Any:
    if isinstance(value, tuple | list):
        return tuple(_taken(part, name, group, rows) for part in value)
    if not isinstance(value, Tensor):
        return value
    if name in PER_KEY:
        return group.rows_in(value.view(rows, -1, *value.shape[1:])).flatten(0, 1)
    return group.take(value, PER_TOKEN[name])


def _causal(tokens: Tensor, slot: Any, step: int) -> Tensor:
    """True where a key is no later than the query. Shape: [b, 1, m, S]."""
    length, offset = slot.get_mask_sizes(step)
    keys = torch.arange(offset, offset + length, device=tokens.device)
    return keys <= (int(slot.get_seq_length()) + tokens)[:, None, :, None]
