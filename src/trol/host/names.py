"""What this transformers calls the cache: in its layers, stacks, outputs and in `generate`.

The parts of a layer that treat each token by itself and hand nothing to other tokens.

What such a part makes of one token is read by that token alone: an MLP or experts, the attention's
output map, its query map where that is a map of its own. A key map is none of them: its output is
read by later tokens. Names propose them, and the probe of `trol.attach` tries whether they are.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

from torch import nn
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


TOKEN_WISE = frozenset(
    (
        *("mlp", "feed_forward", "ffn", "moe", "block_sparse_moe"),
        *("o_proj", "out_proj", "dense", "c_proj", "q_proj", "q_b_proj"),
        *("fc1", "fc2", "dense_h_to_4h", "dense_4h_to_h"),
    )
)
"""What families call them."""

Tree = Mapping[str, "Tree | None"]
"""Names of a module's children that are such parts (None), or hold some (their tree)."""


def token_wise_parts(layer: nn.Module) -> Tree:
    """Where the token-wise parts of a layer are; of one inside another, the outer one."""
    found: dict[str, Tree | None] = {}
    for name, child in layer.named_children():
        if name in TOKEN_WISE and any(p.ndim > 1 for p in child.parameters()):
            found[name] = None
        elif below := token_wise_parts(child):
            found[name] = below
    return found


def parts_in(layer: nn.Module, tree: Tree) -> Iterator[nn.Module]:
    """The modules that a tree names."""
    for name, below in tree.items():
        child = layer._modules[name]
        assert child is not None
        if below is None:
            yield child
        else:
            yield from parts_in(child, below)


def with_parts(module: nn.Module, tree: Tree, instead: Callable[[nn.Module], Any]) -> nn.Module:
    """The same module with something else in the place of its parts; all else is shared.

    The module itself is left as it is, so that other threads run it meanwhile.
    """
    twin: Any = object.__new__(type(module))
    children: dict[str, Any] = dict(module._modules)
    for name, below in tree.items():
        child = children.get(name)
        if child is None:  # whoever took it out since has put something else there
            continue
        children[name] = instead(child) if below is None else with_parts(child, below, instead)
    vars(twin).update(vars(module), _modules=children)
    return twin
