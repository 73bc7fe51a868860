"""Where families keep what trol must find: layers, attention, side inputs; and the few that differ.

A family needs no row here unless it differs: `trol.attach` probes whether it does.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from trol.errors import HostError
from trol.host.names import KNOWN_CACHE_NAMES, cache_key
from trol.host.parts import Tree, token_wise_parts

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
class Quirk:
    """How one family differs from all others."""

    refused: str = ""
    """Why the family cannot be treated rightly at all."""
    no_holes: str = ""
    """Why `skipped_kv="hole"` is refused."""
    no_second_visit: str = ""
    """Why a layer cannot be visited twice."""


_SHARES_KV = "its layers share keys and values with each other, so a second visit overwrites them"
_PURE_RECURRENT = "it has no attention layer, so its cache does not know how long it is"

QUIRKS: dict[str, Quirk] = {
    "gemma3n_text": Quirk(refused=_SHARES_KV),
    "gemma4_text": Quirk(refused=_SHARES_KV),
    "gpt_neo": Quirk(no_holes="its attention builds its own causal mask"),
    "longcat_flash": Quirk(refused="its layers have two attentions, and two places in the cache"),
    "mamba": Quirk(refused=_PURE_RECURRENT),
    "mamba2": Quirk(refused=_PURE_RECURRENT),
    "falcon_mamba": Quirk(refused=_PURE_RECURRENT),
    "recurrent_gemma": Quirk(
        no_second_visit="its layers keep their recurrent state in themselves, not in the cache"
    ),
    "minimax": Quirk(refused="its lightning attention keeps a cache of its own kind"),
    "mpt": Quirk(no_holes="its mask marks what is hidden, not what is seen"),
    "bloom": Quirk(no_holes="its alibi slopes are added where the mask would be"),
}
"""Families by `model_type` of the text configuration."""


@dataclass(frozen=True)
class LayerSite:
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


def layer_site(layer: nn.Module) -> LayerSite:
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
    return LayerSite(cache, names.index(cache), mask, tuple(names), token_wise_parts(layer))


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
    quirk = quirk_of(decoder)
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


def quirk_of(decoder: nn.Module) -> Quirk:
    """How this decoder's family differs."""
    return QUIRKS.get(str(getattr(getattr(decoder, "config", None), "model_type", "")), Quirk())
