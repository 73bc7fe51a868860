"""The parts of a layer that treat each token by itself and hand nothing to other tokens.

What such a part makes of one token is read by that token alone: an MLP or experts, the attention's
output map, its query map where that is a map of its own. A key map is none of them: its output is
read by later tokens. Names propose them, and the probe of `trol.attach` tries whether they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import nn

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
