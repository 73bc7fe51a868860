"""What trol uses of transformers' `generate`, under names of our own.

Trying somebody's model on a few ids, and leaving it as it was.
"""

from __future__ import annotations

import inspect
from collections.abc import Generator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.generation.continuous_batching import ContinuousMixin
from transformers.generation.logits_process import (
    PrefixConstrainedLogitsProcessor,
    SynthIDTextWatermarkLogitsProcessor,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)
from transformers.generation.stopping_criteria import EosTokenCriteria
from transformers.generation.utils import GenerateDecoderOnlyOutput
from transformers.utils.generic import TransformersKwargs

from trol.host.cache import new_cache
from trol.host.classes import original_class
from trol.host.names import CACHE, cache_among
from trol.host.torch_internals import watched, without_hooks
from trol.host.weights import is_at_hand

SHOWN = tuple(name for name in TransformersKwargs.__annotations__ if name.startswith("output_"))
"""What a caller may ask a forward pass to show of all tokens of each layer."""

CLOSING = ("destroy_cached_continuous_batching_manager",)
"""Methods of continuous batching that only tidy up."""

CONTINUOUS = tuple(
    name
    for name, method in vars(ContinuousMixin).items()
    if inspect.isroutine(method) and not name.startswith("_") and name not in CLOSING
)
"""Its other methods, which write keys and values past a model's own cache."""

STEPWISE = (SynthIDTextWatermarkLogitsProcessor, UnbatchedClassifierFreeGuidanceLogitsProcessor)
"""Logits processors that call the model or draw by what they saw, which drafts would mislead."""


def is_stateless(processor: Any) -> bool:
    """Whether what a logits processor says hangs on the ids alone that it is given.

    Known of transformers' own; one of somebody else (a grammar's), or one that asks a function of
    the caller's, may keep a state, and must see every token exactly once, in order.
    """
    own = type(processor).__module__.partition(".")[0] == "transformers"
    return own and not isinstance(processor, PrefixConstrainedLogitsProcessor)


SLICES_LOGITS = "logits_to_keep"
"""The argument K of a host's forward: logits of the last K positions alone; 0 for all."""


def predicts_tokens(model: Any) -> bool:
    """Whether the labels of a model, where it takes any, are the tokens that it should say.

    Those of a classifier or a reward model are not.
    """
    return not isinstance(model, PreTrainedModel) or model.can_generate()


def shows_all(config: Any, arguments: dict[str, Any]) -> bool:
    """Whether a forward pass with these arguments shows something of all tokens of a layer."""
    # A setting that a configuration lacks is one that its family does not know.
    return any(arguments.get(name, getattr(config, name, False)) for name in SHOWN)


def reads_last_only(config: Any, arguments: dict[str, Any], readers: Sequence[nn.Module]) -> bool:
    """Whether of a forward pass with these arguments only the last position is read.

    `readers`: the modules that are handed what leaves the last layer, whose hooks see all of it.
    """
    kept = arguments.get(SLICES_LOGITS, 0)
    last = isinstance(kept, int) and kept == 1 and not shows_all(config, arguments)
    return last and not watched(readers)


def returns_cache(model: Any, config: Any, arguments: dict[str, Any]) -> bool:
    """Whether the cache of this `generate` call lives on after it: given, or returned."""
    config = config or arguments.get("generation_config") or model.generation_config
    returned = arguments.get("return_dict_in_generate", config.return_dict_in_generate)
    return cache_among(arguments) is not None or bool(returned)


def prefill(model: Any, ids: Tensor, config: Any, kwargs: dict[str, Any]) -> Any:
    """The pass over a prompt [B, T], in chunks where the configuration says so."""
    return model._prefill(ids, config, kwargs, is_first_iteration=not config.is_assistant)


def next_pass(model: Any, ids: Tensor, new: int, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of the forward pass over the last `new` of the ids [B, n]."""
    return model.prepare_inputs_for_generation(ids, next_sequence_length=new, **kwargs)


def grown(model: Any, outputs: Any, kwargs: dict[str, Any], tokens: int) -> dict[str, Any]:
    """`generate`'s keyword arguments, with masks and positions longer by `tokens`."""
    return model._update_model_kwargs_for_generation(outputs, dict(kwargs), num_new_tokens=tokens)


def decoding(model: Any) -> AbstractContextManager[None]:
    """Inside, a model decodes: what transformers changes in it for that is changed."""
    return model._optimize_model_for_decode()


def padding_token(config: Any) -> Tensor:
    """The id that fills the rows up that are finished."""
    return config._pad_token_tensor


def prompt_columns(config: Any, default: int) -> int:
    """Columns of a prompt whose mask of nothing but ones was left out; `default` if not known."""
    return vars(config).get("_mask_length", default)


def stops_at_tokens(criteria: Any) -> bool:
    """Whether rows end at an end token, and are padded from then on."""
    return any(isinstance(criterion, EosTokenCriteria) for criterion in criteria)


def with_cache(outputs: Any, cache: Any) -> Any:
    """The same outputs of a forward pass with another cache."""
    return type(outputs)(**{**outputs, CACHE: cache})


def decoded(ids: Tensor, cache: Any, **shown: Any) -> GenerateDecoderOnlyOutput:
    """What `generate` returns as a dictionary: ids [B, n], the cache, and what was asked for."""
    return GenerateDecoderOnlyOutput(sequences=ids, **{CACHE: cache}, **shown)  # type: ignore[arg-type]


VOCABULARY = 64
"""Ids are drawn below this: low ones are text in every tokenizer, but for those named apart."""


def kinds_of(layers: list[nn.Module], config: Any) -> list[tuple[Any, ...]]:
    """What tells layers apart: their class, their parts', and their place in a cache."""
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


def allowed(logits: Tensor) -> float:
    """Above rounding, which is some eps, and below what a wrong mask or state does."""
    return 4 * torch.finfo(logits.dtype).eps ** (2 / 3)


def harmless_ids(config: Any, count: int, device: torch.device) -> Tensor:
    """Random ids that name no picture, sound or end. Shape: [1, count]."""
    apart = {
        value
        for part in (config, config.get_text_config())
        for name, value in part.to_dict().items()
        if name.endswith(("_token_id", "_token_index")) and isinstance(value, int)
    }
    size = min(VOCABULARY, config.get_text_config().vocab_size)
    known = torch.tensor([one for one in range(size) if one not in apart])
    source = torch.Generator().manual_seed(0)
    return known[torch.randint(len(known), (1, count), generator=source)].to(device)


@contextmanager
def at_rest(host: nn.Module, layers: list[nn.Module]) -> Generator[None]:
    """For a while: evaluation mode, no draws from the caller's random state, nobody's hooks."""
    training = [module for module in host.modules() if module.training]
    inside = {part for layer in layers for part in layer.modules()}
    devices = sorted({p.device.index or 0 for p in layers[0].parameters() if p.is_cuda})
    # Some models note what they read last on themselves, above the stack.
    noted = [(module, dict(vars(module))) for module in host.modules() if module not in inside]
    host.eval()
    try:
        with torch.random.fork_rng(devices=devices), without_hooks(host.modules()):
            yield
    finally:
        for module, values in noted:
            vars(module).clear()
            vars(module).update(values)
        for module in training:
            module.training = True
