"""What a layer takes beside the hidden states, for some tokens of a call only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import Cache

from trol.depth.pace import SPARING, pace_of
from trol.depth.selection import Group
from trol.depth.spared import ReachMask
from trol.errors import HostError
from trol.host.cache import GROWING, is_static
from trol.host.layers import PER_KEY, PER_TOKEN, LayerSite

if TYPE_CHECKING:  # which holds these inputs
    from trol.depth.layer_run import LayerRun

Inputs = tuple[tuple[Any, ...], dict[str, Any]]
"""What a layer takes beside the hidden states."""


def understood(run: LayerRun, rows: int, tokens: int) -> bool:
    """Whether every side input of a layer is known, so that some tokens can go alone."""
    return all(
        _known(value, name, rows, tokens) for name, value in _given(run.args, run.kwargs, run.site)
    )


def masked(run: LayerRun, slot: Any) -> bool:
    """Whether the mask is there, or is not needed to tell which keys are written."""
    if run.site.mask_in(run.args, run.kwargs) is not None:
        return True
    return run.site.causal is not None and not is_static(slot)


@dataclass(frozen=True)
class Asking:
    """One packed visit, as far as a layer's arguments hang on it."""

    site: LayerSite
    inputs: Inputs
    """Those for all tokens."""
    slot: Any
    """The keys and values before this step."""
    state: Tensor
    """The hidden states of all tokens. Shape: [B, T, D]."""
    among: bool
    """Whether those that go see each other alone."""

    def of(self, group: Group, *, attends: bool) -> Inputs:
        """The arguments for one group; who leaves at the cache never comes to attend."""
        args, kwargs = self.inputs
        if group.rows is None and group.tokens is None:
            return self.inputs
        given = dict(_given(args, kwargs, self.site))
        mask = given.pop("attention_mask", None)
        taken = {name: _taken(value, name, group, len(self.state)) for name, value in given.items()}
        taken["attention_mask"] = self._mask(mask, group) if attends else None
        return tuple(taken.pop(name) for name in self.site.names[: len(args)]), taken

    def _mask(self, mask: Tensor | None, group: Group) -> Tensor | None:
        """What the group's tokens see: keys of all positions, or their own."""
        if mask is not None:
            mask = group.take(mask, -2)
            return group.take_keys(mask) if self.among else mask
        if self.among or group.tokens is None or not self.site.causal:
            return None
        # Without a mask, fewer queries than keys would be taken for the first ones.
        mask = _causal(group.tokens, self.slot, self.state.shape[1])
        return self._within_reach(mask, group)

    def _within_reach(self, mask: Tensor, group: Group) -> Tensor:
        """A mask that leaves out the keys behind each stretch of tokens, where that saves time."""
        if not group.reach or type(self.slot) not in GROWING:
            return mask
        rows, (_, step, width) = group.size // len(group.reach), self.state.shape
        saved = 4 * width * rows * sum(step - end for end in group.reach)
        pace = pace_of(self.state.device, self.state.dtype)
        if not pace.pays(saved, SPARING * len(group.reach)):
            return mask
        return ReachMask.of(mask, group.reach, step)


def _given(args: tuple[Any, ...], kwargs: dict[str, Any], site: LayerSite) -> list[tuple[str, Any]]:
    names = site.names[: len(args)]
    return [*zip(names, args, strict=True), *kwargs.items()]


def _known(value: Any, name: str, rows: int, tokens: int) -> bool:
    if isinstance(value, tuple | list):
        return all(_known(part, name, rows, tokens) for part in value)
    if not isinstance(value, Tensor):
        return value is None or isinstance(value, bool | int | float | str | Cache)
    if name in PER_KEY:
        return len(value) % rows == 0
    dims = PER_TOKEN.get(name, ())
    if value.ndim != len(dims) or len(value) not in (1, rows):
        return False
    return value.shape[dims.index("tokens")] == tokens


def _taken(value: Any, name: str, group: Group, rows: int) -> Any:
    if isinstance(value, tuple | list):
        return tuple(_taken(part, name, group, rows) for part in value)
    if not isinstance(value, Tensor):
        return value
    if name in PER_KEY:
        return group.rows_in(value.view(rows, -1, *value.shape[1:])).flatten(0, 1)
    dims = PER_TOKEN.get(name, ())
    if value.ndim != len(dims):
        raise HostError(
            f"a layer takes {name} of shape {list(value.shape)}, of which trol does not know what "
            "belongs to which row, and its cache holds some rows alone; start a new one under "
            "trol.depth.executor(model, 'dense')."
        )
    return group.take(value, dims.index("tokens") - len(dims))


def _causal(tokens: Tensor, slot: Any, step: int) -> Tensor:
    """True where a key is no later than the query. Shape: [b, 1, m, S]."""
    length, offset = slot.get_mask_sizes(step)
    keys = torch.arange(offset, offset + length, device=tokens.device)
    return keys <= (int(slot.get_seq_length()) + tokens)[:, None, :, None]
