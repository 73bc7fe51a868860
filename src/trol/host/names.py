"""What this transformers calls the cache: in its layers, stacks, outputs and in `generate`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

from transformers import LlamaForCausalLM, LlamaModel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from trol.errors import HostError

KNOWN_CACHE_NAMES = ("cache", "past_key_values", "layer_past", "cache_params", "past_key_value")
"""All names under which families and releases hand on the cache, newest first."""


def first_of(names: Sequence[str], *takers: Callable[..., Any]) -> str:
    """The first of `names` that every taker has as a parameter.

    Raises:
        HostError: there is none that all of them have.
    """
    has = [inspect.signature(taker).parameters for taker in takers]
    for name in names:
        if all(name in parameters for parameters in has):
            return name
    raise HostError(
        f"none of {', '.join(names)} is a parameter of "
        f"{', '.join(taker.__qualname__ for taker in takers)} alike; this transformers is not one "
        "that trol knows: run `trol info`, which says which are."
    )


CACHE = first_of(
    KNOWN_CACHE_NAMES,
    LlamaDecoderLayer.forward,
    LlamaModel.forward,
    cast(Any, LlamaForCausalLM).prepare_inputs_for_generation,
)
"""The keyword for the cache, in models, in `generate`, and in what they return."""


def takes_cache(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Has a model's forward, which takes the cache among its `**kwargs`, say so by its signature.

    transformers refuses in `generate` what the signature of forward does not name.
    """
    signature = inspect.signature(forward)
    *named, rest = signature.parameters.values()
    cache = inspect.Parameter(CACHE, inspect.Parameter.KEYWORD_ONLY, default=None)
    takes: Any = forward
    takes.__signature__ = signature.replace(parameters=[*named, cache, rest])
    return forward


def cache_key(arguments: Mapping[str, Any]) -> str | None:
    """Under which of the known names a cache is among keyword arguments, or None."""
    for name in KNOWN_CACHE_NAMES:
        if name in arguments.keys() and arguments[name] is not None:  # noqa: SIM118 - outputs warn
            return name
    return None


def cache_among(arguments: Mapping[str, Any]) -> Any:
    """The cache among keyword arguments, also under a former name; None where there is none."""
    key = cache_key(arguments)
    return None if key is None else arguments[key]


def returned_cache(outputs: object) -> Any:
    """The cache among the outputs of a forward pass; None in a plain tuple, which names nothing."""
    return cache_among(outputs) if isinstance(outputs, Mapping) else None


def generation_cache(arguments: Mapping[str, Any]) -> Any:
    """The cache among what `generate` hands to a pass; None where it decodes without one.

    Raises:
        HostError: `use_cache` is on, and there is no cache under a known name.
    """
    cache = cache_among(arguments)
    if cache is None and arguments.get("use_cache"):
        raise HostError(
            "generate decodes with a cache, but hands none to its passes under a name that trol "
            f"knows ({', '.join(KNOWN_CACHE_NAMES)}) among {sorted(arguments)}; pass "
            "use_cache=False, and report the model's class."
        )
    return cache
