"""A host's stack: where families keep its layers, what a layer takes, and how its end is read.

`find_decoder` finds the stack, `layer_signature` says where a layer takes its cache and mask, and
`hide_keys` changes a mask in the form that the attention takes. The head reads the state behind
the last layer: final norm, linear map, scale and cap. A family needs a row in `FAMILY_NOTES` only
if it differs from all others; `trol.attach` probes whether it does.
"""

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from trol.errors import HostError
from trol.host.names import (
    AFTER_NORM,
    FINAL_NORMS,
    KNOWN_CACHE_NAMES,
    LAYER_LISTS,
    PER_KEY,
    PER_TOKEN,
    Tree,
    cache_key,
    token_wise_parts,
)

LINEAR = (nn.Linear, Conv1D)
"""Classes of linear maps; `Conv1D` holds its weight transposed."""

NOT_STATES = {*KNOWN_CACHE_NAMES, *PER_TOKEN, *PER_KEY, "use_cache"}
"""What the first argument of a layer is never called."""


@dataclass(frozen=True)
class FamilyNote:
    """How one family differs from all others."""

    refused: str = ""
    """Why trol cannot treat the family rightly at all."""
    no_holes: str = ""
    """Why `skipped_kv="hole"` is refused."""
    no_second_visit: str = ""
    """Why a layer cannot be visited twice."""


_SHARES_KV = "its layers share keys and values with each other, so a second visit overwrites them"
_PURE_RECURRENT = "it has no attention layer, so its cache does not know how long it is"
_TWO_ATTENTIONS = "its layers have two attentions, and two places in the cache"

FAMILY_NOTES: dict[str, FamilyNote] = {
    "gemma3n_text": FamilyNote(refused=_SHARES_KV),
    "gemma4_text": FamilyNote(refused=_SHARES_KV),
    "gpt_neo": FamilyNote(no_holes="its attention builds its own causal mask"),
    "longcat_flash": FamilyNote(refused=_TWO_ATTENTIONS),
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


Arguments = tuple[tuple[Any, ...], dict[str, Any]]
"""What a layer takes beside the hidden states, by place and by keyword."""


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
        if self.cache_name in kwargs:  # asked in every layer: no further call
            return kwargs[self.cache_name]
        return _argument(args, kwargs, cache_key(kwargs) or self.cache_name, self.cache_position)

    def mask_in(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The attention mask among a layer's arguments, or None."""
        return _argument(args, kwargs, "attention_mask", self.mask_position)

    def with_cache(self, args: tuple[Any, ...], kwargs: dict[str, Any], cache: Any) -> Arguments:
        """The same arguments with another cache."""
        if self.cache_name in kwargs:
            return args, {**kwargs, self.cache_name: cache}
        name = cache_key(kwargs) or self.cache_name
        return _replaced(args, kwargs, name, self.cache_position, cache)

    def with_mask(self, args: tuple[Any, ...], kwargs: dict[str, Any], mask: Any) -> Arguments:
        """The same arguments with another attention mask."""
        return _replaced(args, kwargs, "attention_mask", self.mask_position, mask)


def _argument(
    args: tuple[Any, ...], kwargs: dict[str, Any], name: str, position: int | None
) -> Any:
    if name in kwargs:
        return kwargs[name]
    return args[position] if position is not None and position < len(args) else None


def _replaced(
    args: tuple[Any, ...], kwargs: dict[str, Any], name: str, position: int | None, value: Any
) -> Arguments:
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
    """The argument `name` of a call of the method `forward`, by keyword or place, or None."""
    if name in kwargs or not args:
        return kwargs.get(name)
    places = _places.__wrapped__ if torch.compiler.is_compiling() else _places
    return _argument(args, kwargs, name, places(forward).get(name))


def text_positions(position_ids: Tensor | None) -> Tensor | None:
    """Position ids of text, among axes of pictures the first of four: [4, B, T] -> [B, T].

    None where there are none, and where there are axes of pictures alone: transformers cannot tell
    packed sequences by those either.
    """
    if position_ids is None or position_ids.ndim == 2:
        return position_ids
    return position_ids[0] if position_ids.ndim == 3 and len(position_ids) == 4 else None


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
    why = family_note(decoder).refused
    if why:
        raise HostError(f"trol cannot treat {decoder.config.model_type} rightly: {why}.")
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
    family = getattr(getattr(decoder, "config", None), "model_type", "")
    return FAMILY_NOTES.get(str(family), FamilyNote())


TAKE_NO_HOLES = {
    "flash": "takes masks of padding alone",
    "flex": "compiles its mask anew for each form that the holes have",
}
"""Attentions, by a part of their names, whose mask cannot say which keys are holes, and why."""


def hide_keys(
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
        hidden: the further keys that no query may see. Shape: [B, 1, T, S].
        earlier: which keys come no later than a query. Shape: [T, S].
        attention: eager, sdpa, flex_attention, ...
        causal: whether this attention sees no later keys where it gets no mask.
        dtype: of masks that are added.

    Raises:
        HostError: this attention takes no mask that hides single keys.
    """
    for name, why in TAKE_NO_HOLES.items():
        if name in str(attention):
            raise _no_holes(f"{attention} {why}")
    if mask is None and attention not in ("eager", "sdpa"):
        raise _no_holes(f"{attention} was given no mask, so it is not known what it sees")
    if mask is None:
        # Without a mask, sdpa goes by `causal`, and eager sees all keys.
        sees_all = attention == "eager" or not causal
        mask = (torch.ones_like(earlier) if sees_all else earlier)[None, None]
        if attention == "eager":  # which adds it
            mask = torch.zeros_like(mask, dtype=dtype)
    if not isinstance(mask, Tensor) or mask.ndim != 4:
        what = f"{mask.ndim} dimensions" if isinstance(mask, Tensor) else type(mask).__name__
        raise _no_holes(f"holes need a mask of 4 dimensions, {attention} takes {what}")
    if mask.dtype == torch.bool:
        return mask & ~hidden
    return mask.masked_fill(hidden, torch.finfo(mask.dtype).min)


def is_causal(layer: nn.Module, arguments: dict[str, Any]) -> bool:
    """Whether a layer's attention sees no later keys: by an argument, or by its own attribute."""
    argued = arguments.get("is_causal")
    own = (one.is_causal for one in layer.modules() if hasattr(one, "is_causal"))
    return bool(next(own, True) if argued is None else argued)


def _no_holes(why: str) -> HostError:
    return HostError(
        f"holes cannot be hidden: {why}; load the model with "
        'attn_implementation="sdpa" or "eager", or set skipped_kv="project".'
    )


FACTORS = {"lm_head_multiplier": "Falcon-H1", "logit_scale": "Cohere"}
"""Settings by which logits are multiplied, and families that have them."""

DIVISOR = "logits_scaling"
"""The setting by which Granite divides its logits."""

MULTIPLIED_BY_DIVISOR = ("hyperclovax",)
"""Families that multiply by it."""

CAPS = {"final_logit_softcapping": "Gemma 2", "logits_soft_cap": "RecurrentGemma"}
"""Settings c of a cap c tanh(logits / c), and families that have them."""


def head_of(host: Any) -> nn.Module:
    """The linear map to the vocabulary.

    Raises:
        HostError: there is none.
    """
    head = host.get_output_embeddings()
    if head is None:
        raise HostError(
            f"{type(host).__name__} has no head, so nothing can be read before the last "
            "layer; attach to the model with its language modelling head."
        )
    return head


def readers(host: nn.Module, stack: nn.Module, last: nn.Module) -> tuple[nn.Module, ...]:
    """The modules but the host that take or return what leaves the last layer for all tokens."""
    name = next(name for name, module in host.named_modules() if module is stack)
    parts = name.split(".") if name else []
    holders = [host.get_submodule(".".join(parts[: n + 1])) for n in range(len(parts))]
    steps = [getattr(stack, one, None) for one in (*FINAL_NORMS, *AFTER_NORM)]
    return (last, *(one for one in (stack, *holders, *steps) if isinstance(one, nn.Module)))


def final_norm(stack: nn.Module, state: Tensor) -> Tensor:
    """What the head reads: the stack's final norm on a state, and what follows. [..., D] -> same.

    Raises:
        HostError: the stack has no norm of a known name.
    """
    norms = [name for name in FINAL_NORMS if hasattr(stack, name)]
    if not norms:
        raise HostError(
            f"{type(stack).__name__} has no final norm named {', '.join(FINAL_NORMS)}, so nothing "
            "can be read before its last layer."
        )
    for name in (norms[0], *AFTER_NORM):
        step = getattr(stack, name, None)  # some of OPT's sizes say that they have none
        state = state if step is None else step(state)
    return state


def scaled_logits(logits: Tensor, config: Any) -> Tensor:
    """The head's output as the family returns it: multiplied, divided and capped by settings."""
    for name in FACTORS:
        factor = getattr(config, name, None)
        logits = logits if factor is None else logits * factor
    divisor = getattr(config, DIVISOR, None)
    if divisor is not None:
        multiplies = config.model_type in MULTIPLIED_BY_DIVISOR
        logits = logits * divisor if multiplies else logits / divisor
    for name in CAPS:
        cap = getattr(config, name, None)
        logits = logits if cap is None else torch.tanh(logits / cap) * cap
    return logits
