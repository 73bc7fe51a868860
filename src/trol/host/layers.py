"""Where families keep what trol must find: layers, attention, side inputs; and the few that differ.

A family needs no row here unless it differs: `trol.attach` probes whether it does.

Masks as attentions take them: boolean, added to scores, or none at all; keys hidden in each.

What transformers collects of modules inside layers, such as attentions, brought into order.

It has a hook on each module whose outputs can be asked for, and collects what each run of it
gives: nothing of a layer that is skipped, and more of one that is visited again.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from trol.errors import HostError
from trol.host.names import KNOWN_CACHE_NAMES, Tree, cache_key, token_wise_parts
from trol.host.runtime import CAPTURING

LAYER_LISTS = ("layers", "h", "blocks")
"""What stacks call their list of decoder layers."""

MADE_BEFORE_KEYS = frozenset(
    ("q_proj", "k_proj", "v_proj", "qkv_proj", "query_key_value", "c_attn", "Wqkv", "wqkv")
)
"""What attentions call the linear maps that run before keys and values are stored."""

LINEAR = (nn.Linear, Conv1D)
"""Classes of linear maps; `Conv1D` holds its weight transposed."""

COUNTED = ("eager", "sdpa")
"""Attentions made of operators whose FLOPs torch counts, as far as it counts any."""

PER_TOKEN = {
    "attention_mask": ("rows", "heads", "tokens", "keys"),
    "image_tokens": ("rows", "tokens"),
    "per_layer_input": ("rows", "tokens", "width"),
    "position_embeddings": ("rows", "tokens", "width"),
    "position_ids": ("rows", "tokens"),
}
"""Side inputs of a layer that go with its tokens, and their dimensions. Those of another form are
not known: some releases have three axes of a picture before the rows."""

PER_KEY = ("alibi",)
"""Side inputs that go with rows and keys. Shape: [B * heads, ...]."""

NOT_STATES = {*KNOWN_CACHE_NAMES, *PER_TOKEN, *PER_KEY, "use_cache"}
"""What the first argument of a layer is never called."""


@dataclass(frozen=True)
class FamilyNote:
    """How one family differs from all others."""

    refused: str = ""
    """Why the family cannot be treated rightly at all."""
    no_holes: str = ""
    """Why `skipped_kv="hole"` is refused."""
    no_second_visit: str = ""
    """Why a layer cannot be visited twice."""


_SHARES_KV = "its layers share keys and values with each other, so a second visit overwrites them"
_PURE_RECURRENT = "it has no attention layer, so its cache does not know how long it is"

FAMILY_NOTES: dict[str, FamilyNote] = {
    "gemma3n_text": FamilyNote(refused=_SHARES_KV),
    "gemma4_text": FamilyNote(refused=_SHARES_KV),
    "gpt_neo": FamilyNote(no_holes="its attention builds its own causal mask"),
    "longcat_flash": FamilyNote(
        refused="its layers have two attentions, and two places in the cache"
    ),
    "mamba": FamilyNote(refused=_PURE_RECURRENT),
    "mamba2": FamilyNote(refused=_PURE_RECURRENT),
    "falcon_mamba": FamilyNote(refused=_PURE_RECURRENT),
    "recurrent_gemma": FamilyNote(
        no_second_visit="its layers keep their recurrent state in themselves, not in the cache"
    ),
    "minimax": FamilyNote(refused="its lightning attention keeps a cache of its own kind"),
    "mpt": FamilyNote(no_holes="its mask marks what is hidden, not what is seen"),
    "bloom": FamilyNote(no_holes="its alibi slopes are added where the mask would be"),
}
"""Families by `model_type` of the text configuration."""


@dataclass(frozen=True)
class LayerSignature:
    """Where a family's layer takes its cache and its mask."""

    cache_name: str
    cache_position: int
    """Counted after the hidden states."""
    mask_position: int | None
    """None where the mask can be given by keyword alone."""
    names: tuple[str, ...]
    """The layer's parameters after the hidden states, as far as they have a position."""
    parts: Tree
    """Its token-wise parts."""

    def cache_in(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The cache among a layer's arguments, or None."""
        if self.cache_name in kwargs:
            return kwargs[self.cache_name]
        return _taken(args, kwargs, cache_key(kwargs) or self.cache_name, self.cache_position)

    def mask_in(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The attention mask among a layer's arguments, or None."""
        return _taken(args, kwargs, "attention_mask", self.mask_position)

    def with_cache(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], cache: Any
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The same arguments with another cache."""
        if self.cache_name in kwargs:
            return args, {**kwargs, self.cache_name: cache}
        name = cache_key(kwargs) or self.cache_name
        return _replaced(args, kwargs, name, self.cache_position, cache)

    def with_mask(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], mask: Any
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The same arguments with another attention mask."""
        return _replaced(args, kwargs, "attention_mask", self.mask_position, mask)


def _taken(args: tuple[Any, ...], kwargs: dict[str, Any], name: str, position: int | None) -> Any:
    if name in kwargs:
        return kwargs[name]
    return args[position] if position is not None and position < len(args) else None


def _replaced(
    args: tuple[Any, ...], kwargs: dict[str, Any], name: str, position: int | None, value: Any
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if position is not None and position < len(args):
        return (*args[:position], value, *args[position + 1 :]), kwargs
    return args, {**kwargs, name: value}


def layer_signature(layer: nn.Module) -> LayerSignature:
    """Reads off the signature of a layer where its cache and mask go.

    Raises:
        HostError: the layer takes no hidden states, no cache or no mask under a known name.
    """
    kind = type(layer).__name__
    parameters = list(inspect.signature(type(layer).forward).parameters.values())[1:]
    names = [one.name for one in parameters]
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    if not names or names[0] in NOT_STATES or parameters[0].kind in variadic:
        raise HostError(
            f"{kind} does not take the hidden states first, but {names}; trol attaches to "
            "transformers decoder layers."
        )
    names = names[1:]
    cache = next((name for name in KNOWN_CACHE_NAMES if name in names), None)
    if cache is None:
        raise HostError(
            f"{kind} takes no cache ({', '.join(KNOWN_CACHE_NAMES)}) but {names}; trol "
            "attaches to transformers decoder layers."
        )
    open_ended = any(one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters)
    if "attention_mask" not in names and not open_ended:
        raise HostError(
            f"{kind} takes no attention_mask but {names}, so trol cannot tell what its tokens "
            "see; it attaches to transformers decoder layers."
        )
    mask = names.index("attention_mask") if "attention_mask" in names else None
    return LayerSignature(cache, names.index(cache), mask, tuple(names), token_wise_parts(layer))


def check_stack(stack: nn.Module) -> None:
    """Raises `HostError` unless a stack takes its cache and its mask under known names."""
    names = list(inspect.signature(type(stack).forward).parameters)
    if not set(KNOWN_CACHE_NAMES) & set(names) or "attention_mask" not in names:
        raise HostError(
            f"{type(stack).__name__} takes {names[1:]}, among them no attention_mask or no cache "
            f"of a known name ({', '.join(KNOWN_CACHE_NAMES)}), so trol cannot tell what its "
            "tokens see; it attaches to transformers decoders."
        )


def argument(
    forward: Callable[..., Any], name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """What a call of the method `forward` hands over as `name`, by keyword or place, or None."""
    if name in kwargs or not args:
        return kwargs.get(name)
    places = _places.__wrapped__ if torch.compiler.is_compiling() else _places
    where = places(forward).get(name, len(args))
    return args[where] if where < len(args) else None


@functools.cache
def _places(method: Callable[..., Any]) -> dict[str, int]:
    """Where a method takes each of its parameters, counted after the object."""
    names = list(inspect.signature(method).parameters)[1:]
    return {name: place for place, name in enumerate(names)}


def attention_of(config: Any) -> str | None:
    """Which attention a model of this configuration runs: eager, sdpa, flash_attention_2, ..."""
    return config._attn_implementation


def with_attention(config: Any, attention: str | None) -> Any:
    """The configuration, which now runs this attention."""
    config._attn_implementation = attention
    return config


def find_decoder(model: nn.Module) -> nn.Module:
    """The module that owns the stack of decoder layers, inside a causal or vision-language model.

    Raises:
        HostError: there is none, or the family is refused.
    """
    config = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        raise HostError(
            f"{type(model).__name__} is an encoder-decoder; trol treats decoder-only stacks."
        )
    host: Any = model
    decoder: Any = host.get_decoder() if hasattr(host, "get_decoder") else host
    if decoder is None or layer_list(decoder) is None:  # Llama 4 says that it is its own decoder
        own = (child for child in host.children() if layer_list(child) is not None)
        decoder = host if layer_list(host) is not None else next(own, host)
    if layer_list(decoder) is None:
        raise HostError(
            f"{type(model).__name__} has no list of decoder layers named "
            f"{' or '.join(LAYER_LISTS)}; attach to a transformers decoder-only model."
        )
    quirk = family_note(decoder)
    if quirk.refused:
        raise HostError(f"trol cannot treat {decoder.config.model_type} rightly: {quirk.refused}.")
    return decoder


def layer_list(decoder: nn.Module) -> nn.ModuleList | None:
    """The ModuleList of decoder layers, or None."""
    for name in LAYER_LISTS:
        layers = getattr(decoder, name, None)
        if isinstance(layers, nn.ModuleList):
            return layers
    return None


def family_note(decoder: nn.Module) -> FamilyNote:
    """How this decoder's family differs."""
    return FAMILY_NOTES.get(
        str(getattr(getattr(decoder, "config", None), "model_type", "")), FamilyNote()
    )


TAKE_NO_HOLES = {
    "flash": "takes masks of padding alone",
    "flex": "compiles its mask anew for each form that the holes have",
}
"""Attentions, by a part of their names, that cannot be told which keys are holes, and why."""


def hiding(
    mask: Any,
    hidden: Tensor,
    earlier: Tensor,
    *,
    attention: str | None,
    causal: bool,
    dtype: torch.dtype,
) -> Any:
    """The mask in the form that it had, or that its attention takes, which hides more keys.

    Args:
        mask: the mask of a layer, or None.
        hidden: what else is not seen. Shape: [B, 1, T, S].
        earlier: which keys come no later than a query. Shape: [T, S].
        attention: eager, sdpa, flex_attention, ...
        causal: whether this attention sees no later keys where it is given no mask.
        dtype: of masks that are added.

    Raises:
        HostError: this attention cannot be told.
    """
    for name, why in TAKE_NO_HOLES.items():
        if name in str(attention):
            raise _refusal(f"{attention} {why}")
    if mask is None and attention not in ("eager", "sdpa"):
        raise _refusal(f"{attention} was given no mask, so it is not known what it sees")
    if mask is None:
        # sdpa then goes by causal, eager hides nothing: whoever wants it to gives it a mask.
        all_seen = attention == "eager" or not causal
        mask = (torch.ones_like(earlier) if all_seen else earlier)[None, None]
        if attention == "eager":  # which adds it
            mask = torch.zeros_like(mask, dtype=dtype)
    if not isinstance(mask, Tensor) or mask.ndim != 4:
        what = f"{mask.ndim} dimensions" if isinstance(mask, Tensor) else type(mask).__name__
        raise _refusal(f"holes need a mask of 4 dimensions, {attention} takes {what}")
    if mask.dtype == torch.bool:
        return mask & ~hidden
    return mask.masked_fill(hidden, torch.finfo(mask.dtype).min)


def is_causal(layer: nn.Module, arguments: dict[str, Any]) -> bool:
    """Whether a layer's attention sees no later keys by itself: as it is told, or says."""
    told = arguments.get("is_causal")
    own = (one.is_causal for one in layer.modules() if hasattr(one, "is_causal"))
    return bool(next(own, True) if told is None else told)


def _refusal(why: str) -> HostError:
    return HostError(
        f"holes cannot be hidden: {why}; load the model with "
        'attn_implementation="sdpa" or "eager", or set skipped_kv="project".'
    )


def by_layer(
    values: Sequence[Any], layers: Sequence[nn.Module], runs: Sequence[int | None], key: str
) -> tuple[Any, ...]:
    """Those of first runs, and None for a layer that was skipped: an index keeps its meaning.

    Args:
        values: what was collected, in order.
        layers: the layers that hold the modules.
        runs: how often each ran; None for one that the host did not call.
        key: under which name it was collected.
    """
    each = [
        0 if count is None else _collecting(layer, key)
        for layer, count in zip(layers, runs, strict=True)
    ]
    if len(values) != sum(one * (count or 0) for one, count in zip(each, runs, strict=True)):
        return tuple(values)  # the family gathers them in a way of its own
    kept: list[Any] = []
    rest = list(values)
    for one, count in zip(each, runs, strict=True):
        kept += rest[:one] if count else [None] * one
        del rest[: one * (count or 0)]
    return tuple(kept)


def _collecting(layer: nn.Module, key: str) -> int:
    """How many modules of a layer are watched under this name."""
    hooks = (hook for module in layer.modules() for hook in module._forward_hooks.values())
    return sum(getattr(h, "__module__", None) == CAPTURING and _key(h) == key for h in hooks)


def _key(hook: Any) -> Any:
    return inspect.getclosurevars(hook).nonlocals.get("key")
