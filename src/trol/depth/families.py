"""What trol must know of a family of models: where its layers are, and the few that differ.

A family needs no row here unless it has a quirk.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

from torch import nn

from trol.errors import HostError

LAYER_LISTS = ("layers", "h", "blocks")
CACHE_NAMES = ("past_key_values", "layer_past", "cache_params", "past_key_value")


@dataclass(frozen=True)
class Quirk:
    """How one family differs from all others."""

    refused: str = ""
    """Why the family cannot be treated rightly at all."""
    no_holes: str = ""
    """Why `skipped_kv="hole"` is refused."""
    dense: str = ""
    """Why its tokens cannot be packed: every visit computes all of them."""


_SHARES_KV = "its layers share keys and values with each other, so a second visit overwrites them"
_PURE_RECURRENT = "it has no attention layer, so its cache does not know how long it is"

QUIRKS: dict[str, Quirk] = {
    "gemma3n_text": Quirk(refused=_SHARES_KV),
    "gemma4_text": Quirk(refused=_SHARES_KV),
    "gpt_neo": Quirk(
        no_holes="its attention builds its own causal mask",
        dense="its attention builds its own causal mask, from lengths",
    ),
    "llama4_text": Quirk(dense="its layers count positions themselves, from 8,192 on"),
    "mamba": Quirk(refused=_PURE_RECURRENT),
    "mamba2": Quirk(refused=_PURE_RECURRENT),
    "falcon_mamba": Quirk(refused=_PURE_RECURRENT),
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
    names: tuple[str, ...] = ()
    """The layer's parameters after the hidden states, as far as they have a position."""
    causal: bool = True
    """Whether its attention, given no mask, lets a token see earlier ones alone."""

    def cache_in(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The cache among a layer's arguments, or None."""
        return _taken(args, kwargs, self.cache_name, self.cache_position)

    def mask_in(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The attention mask among a layer's arguments, or None."""
        return _taken(args, kwargs, "attention_mask", self.mask_position)

    def with_cache(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], cache: Any
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The same arguments with another cache."""
        return _replaced(args, kwargs, self.cache_name, self.cache_position, cache)

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
        HostError: the layer takes no cache under a known name.
    """
    names = list(inspect.signature(type(layer).forward).parameters)[2:]  # self, hidden states
    found = [name for name in CACHE_NAMES if name in names]
    if not found:
        raise HostError(
            f"{type(layer).__name__} takes no cache ({', '.join(CACHE_NAMES)}) but {names}; trol "
            "attaches to transformers decoder layers."
        )
    mask = names.index("attention_mask") if "attention_mask" in names else None
    causal = next((m.is_causal for m in layer.modules() if hasattr(m, "is_causal")), True)
    return LayerSite(found[0], names.index(found[0]), mask, tuple(names), bool(causal))


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
    decoder = host if decoder is None else decoder
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
