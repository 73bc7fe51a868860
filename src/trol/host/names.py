"""The one table of names: what families and releases of transformers call the things trol needs.

Here are their names of the cache, of lists of layers, of norms, of side inputs and of the parts
of a layer, and what finds a cache or a part by its name. A family whose names stand in these
tables needs nothing else, unless `trol.host.layers.FAMILY_NOTES` says how it differs.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

from torch import nn
from transformers import LlamaForCausalLM, LlamaModel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from trol.errors import HostError

KNOWN_CACHE_NAMES = ("cache", "past_key_values", "layer_past", "cache_params", "past_key_value")
"""All names under which families and releases hand on the cache, newest first."""

LAYER_LISTS = ("layers", "h", "blocks")
"""A stack's list of decoder layers."""

FINAL_NORMS = (
    "norm",
    "final_layer_norm",
    "final_layernorm",
    "ln_f",
    "norm_f",
    "final_norm",
    "embedding_norm",  # LFM2
    "layer_norm",  # XGLM, BioGPT
    "layernorm",  # CTRL
)
"""The norm behind the last layer."""

AFTER_NORM = ("project_out",)
"""What some families have between that norm and the head."""

TOKEN_WISE = frozenset(
    (
        *("mlp", "feed_forward", "ffn", "moe", "block_sparse_moe"),
        *("o_proj", "out_proj", "dense", "c_proj", "q_proj", "q_b_proj"),
        *("fc1", "fc2", "dense_h_to_4h", "dense_4h_to_h"),
    )
)
"""Parts of a layer that treat each token by itself, and whose output for a token is read by that
token alone: an MLP or experts, the attention's output map, its query map where that is a map of
its own. A key map is none of them: later tokens read its output. Whether a part of such a name
really is one, the probe of `trol.attach` tries."""

COMPUTED_BEFORE_KEYS = frozenset(
    ("q_proj", "k_proj", "v_proj", "qkv_proj", "query_key_value", "c_attn", "Wqkv", "wqkv")
)
"""Linear maps of an attention that run before keys and values are stored."""

PER_TOKEN = {
    "attention_mask": ("rows", "heads", "tokens", "keys"),
    "image_tokens": ("rows", "tokens"),
    "per_layer_input": ("rows", "tokens", "width"),
    "position_embeddings": ("rows", "tokens", "width"),
    "position_ids": ("rows", "tokens"),
}
"""Side inputs of a layer that belong to its tokens, and their dimensions. With other dimensions
they are not known: some releases have three axes of a picture before the rows."""

PER_KEY = ("alibi",)
"""Side inputs that belong to rows and keys. Shape: [B * heads, ...]."""


def first_of(names: Sequence[str], *functions: Callable[..., Any]) -> str:
    """The first of `names` that every function has as a parameter.

    Raises:
        HostError: there is none that all of them have.
    """
    parameters = [inspect.signature(function).parameters for function in functions]
    for name in names:
        if all(name in one for one in parameters):
            return name
    raise HostError(
        f"none of {', '.join(names)} is a parameter of "
        f"{', '.join(function.__qualname__ for function in functions)} alike; this transformers is "
        "not one that trol knows: run `trol info`, which says which are."
    )


CACHE = first_of(
    KNOWN_CACHE_NAMES,
    LlamaDecoderLayer.forward,
    LlamaModel.forward,
    cast(Any, LlamaForCausalLM).prepare_inputs_for_generation,
)
"""The keyword for the cache, in models, in `generate`, and in what they return."""


def takes_cache(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the cache, which a model's forward takes among its `**kwargs`, to its signature.

    `generate` refuses arguments that the signature of forward does not name.
    """
    signature = inspect.signature(forward)
    *named, rest = signature.parameters.values()
    cache = inspect.Parameter(CACHE, inspect.Parameter.KEYWORD_ONLY, default=None)
    cast(Any, forward).__signature__ = signature.replace(parameters=[*named, cache, rest])
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
    """The cache among the arguments of a pass of `generate`; None where it decodes without one.

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


Tree = Mapping[str, "Tree | None"]
"""Names of a module's children that are token-wise parts (None), or hold some (their tree)."""


def token_wise_parts(layer: nn.Module) -> Tree:
    """Where the token-wise parts of a layer are; of one inside another, the outer one."""
    tree: dict[str, Tree | None] = {}
    for name, child in layer.named_children():
        if name in TOKEN_WISE and any(p.ndim > 1 for p in child.parameters()):
            tree[name] = None
        elif below := token_wise_parts(child):
            tree[name] = below
    return tree


def parts_in(layer: nn.Module, tree: Tree) -> Iterator[nn.Module]:
    """The modules that a tree names."""
    for name, below in tree.items():
        child = layer._modules[name]
        assert child is not None
        if below is None:
            yield child
        else:
            yield from parts_in(child, below)


def with_parts(module: nn.Module, tree: Tree, replace: Callable[[nn.Module], Any]) -> nn.Module:
    """A copy of the module with `replace(part)` in the place of each part; all else is shared.

    The module itself is left as it is, so that other threads run it meanwhile.
    """
    twin: Any = object.__new__(type(module))
    children: dict[str, Any] = dict(module._modules)
    for name, below in tree.items():
        child = children.get(name)
        if child is None:  # it was taken out after the tree was made, and replaced by other means
            continue
        children[name] = replace(child) if below is None else with_parts(child, below, replace)
    vars(twin).update(vars(module), _modules=children)
    return twin
