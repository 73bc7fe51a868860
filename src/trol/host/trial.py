"""Trying instead of believing: rows of the table of assumptions, and models on a few ids.

An assumption is looked up on the smallest real model (`tiny_model`). The probe of `trol.attach`
runs a user's own model on random ids (`trial_run`) and leaves it as it was.
"""

import inspect
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from trol.host.cache import new_cache
from trol.host.classes import original_class
from trol.host.names import CACHE
from trol.host.torch_internals import remove_hooks
from trol.host.weights import is_at_hand

Look = Callable[[], str | None]
"""Returns None where an assumption holds, else what is the case instead."""


@dataclass(frozen=True)
class Assumption:
    """One thing that trol takes for granted of another library."""

    name: str
    """A sentence that can be true or false."""
    used_by: str
    """The files that would be wrong without it, and how."""
    look: Look
    at_attach: bool
    """Whether the first `trol.attach` of a process looks it up, because that takes so little."""

    def finding(self) -> str | None:
        """None where it holds; else what is the case instead, which may be an error of the look."""
        try:
            return self.look()
        except Exception as error:
            return f"{type(error).__name__}: {error}"


def row(
    table: list[Assumption], used_by: str, *, at_attach: bool = False
) -> Callable[[Look], Look]:
    """Adds a look to a table of assumptions; its docstring is the name of the assumption."""

    def add(look: Look) -> Look:
        name = " ".join((look.__doc__ or "").split()).rstrip(".")
        table.append(Assumption(name, used_by, look, at_attach))
        return look

    return add


def differs(what: str, value: object, expected: object) -> str | None:
    """None where both are equal, else a sentence that says what the value is."""
    return None if value == expected else f"{what} is {value!r}, not {expected!r}"


def parameters(function: Callable[..., Any]) -> list[str]:
    """The names of a function's parameters."""
    return list(inspect.signature(function).parameters)


def lacks(function: Callable[..., Any], *names: str) -> str | None:
    """None where a function has these parameters, else a sentence that says which it has."""
    taken = parameters(function)
    missing = [name for name in names if name not in taken]
    return f"{function.__qualname__} takes {taken}, not {missing}" if missing else None


SIZES = {
    "vocab_size": 16,
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}


def tiny_config(**settings: Any) -> LlamaConfig:
    """Two layers of eight numbers."""
    return LlamaConfig(**{**SIZES, **settings})


def tiny_model(cls: Any = LlamaForCausalLM, **settings: Any) -> Any:
    """A random Llama of this configuration, in evaluation mode; the caller's seed stays."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return cls(tiny_config(**settings)).eval()


def ids(tokens: int = 4) -> Tensor:
    """Token ids [1, tokens]."""
    return torch.arange(1, tokens + 1)[None]


def layer_kinds(layers: list[nn.Module], config: Any) -> list[tuple[Any, ...]]:
    """What distinguishes layers: their class, their parts' classes, and their place in a cache."""
    places = new_cache(config).layers
    types: Any = getattr(config, "layer_types", None) or [None] * len(layers)
    return [
        (
            original_class(layer),
            tuple(type(part) for part in layer.modules() if part is not layer),
            type(places[index]) if index < len(places) else None,
            types[index],
        )
        for index, layer in enumerate(layers)
    ]


def can_run(host: nn.Module, config: Any, tokens: int) -> bool:
    """Whether so many ids can be passed through a model of this stack here and now."""
    positions = getattr(config, "max_position_embeddings", None) or tokens
    return positions >= tokens and all(is_at_hand(one) for one in host.parameters())


def last_on_cache(stack: Any, ids: Tensor) -> Tensor:
    """What leaves a stack for the last id, on a cache of all others. Shape: [1, D]."""
    cache = {CACHE: new_cache(stack.config), "use_cache": True}
    stack(ids[:, :-1], **cache)
    return stack(ids[:, -1:], **cache)[0][:, -1]


def difference(one: Tensor, other: Tensor) -> float:
    """The largest difference, as a share of the largest number; 0 where both are nan."""
    one, other = one.float().nan_to_num(), other.float().nan_to_num()
    return ((one - other).abs().max() / other.abs().max().clamp(min=1e-30)).item()


def tolerance(logits: Tensor) -> float:
    """A difference above rounding, which is some eps, and below that of a wrong mask or state."""
    return 4 * torch.finfo(logits.dtype).eps ** (2 / 3)


VOCABULARY = 64
"""Ids are drawn below this: low ones are text in every tokenizer, but for those named apart."""


def harmless_ids(config: Any, count: int, device: torch.device) -> Tensor:
    """Random ids that name no picture, sound or end. Shape: [1, count]."""
    special = {
        value
        for part in (config, config.get_text_config())
        for name, value in part.to_dict().items()
        if name.endswith(("_token_id", "_token_index")) and isinstance(value, int)
    }
    size = min(VOCABULARY, config.get_text_config().vocab_size)
    text = torch.tensor([one for one in range(size) if one not in special])
    source = torch.Generator().manual_seed(0)
    return text[torch.randint(len(text), (1, count), generator=source)].to(device)


@contextmanager
def trial_run(host: nn.Module) -> Generator[None]:
    """Inside: evaluation mode, without hooks, and no draws from the caller's random state.

    Afterwards the attributes of all modules are what they were: their mode, their hooks, and what
    some models note of their last inputs.
    """
    attributes = [(module, dict(vars(module))) for module in host.modules()]
    devices = sorted({p.device.index or 0 for p in host.parameters() if p.is_cuda})
    host.eval()
    try:
        with torch.random.fork_rng(devices=devices):
            for module, _ in attributes:
                remove_hooks(module)
            yield
    finally:
        for module, values in attributes:
            for name in set(vars(module)) - set(values):
                delattr(module, name)
            vars(module).update(values)
