"""What trol uses of transformers' `generate` and its forward passes, under names of our own."""

import inspect
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

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

from trol.host.names import CACHE, cache_among
from trol.host.torch_internals import watched

SHOWN = tuple(name for name in TransformersKwargs.__annotations__ if name.startswith("output_"))
"""Arguments by which a forward pass returns something of all tokens of each layer."""

CLOSING = ("destroy_cached_continuous_batching_manager",)
"""Methods of continuous batching that only tidy up."""

CONTINUOUS = tuple(
    name
    for name, method in vars(ContinuousMixin).items()
    if inspect.isroutine(method) and not name.startswith("_") and name not in CLOSING
)
"""Its other methods, which write keys and values past a model's own cache."""

STEPWISE = (SynthIDTextWatermarkLogitsProcessor, UnbatchedClassifierFreeGuidanceLogitsProcessor)
"""Logits processors that call the model, or draw by earlier logits, so that drafts mislead them."""

SLICES_LOGITS = "logits_to_keep"
"""The argument K of a host's forward: logits of the last K positions alone; 0 for all."""


def is_stateless(processor: Any) -> bool:
    """Whether the output of a logits processor depends on nothing but the ids that it gets.

    Known of transformers' own. One of another library (a grammar's), or one that calls a function
    of the user's, may keep a state, and must see every token exactly once, in order.
    """
    own = type(processor).__module__.partition(".")[0] == "transformers"
    return own and not isinstance(processor, PrefixConstrainedLogitsProcessor)


def predicts_tokens(model: Any) -> bool:
    """Whether the labels of a model, where it takes any, are the tokens that it should generate.

    Those of a classifier or a reward model are not.
    """
    return not isinstance(model, PreTrainedModel) or model.can_generate()


def shows_all(config: Any, arguments: dict[str, Any]) -> bool:
    """Whether a forward pass with these arguments returns something of all tokens of a layer."""
    # A setting that a configuration lacks is one that its family does not know.
    return any(arguments.get(name, getattr(config, name, False)) for name in SHOWN)


def reads_last_only(config: Any, arguments: dict[str, Any], readers: Sequence[nn.Module]) -> bool:
    """Whether a forward pass with these arguments reads only the last position behind the stack.

    `readers`: the modules that take or return what leaves the last layer; a hook sees all of it.
    """
    positions = arguments.get(SLICES_LOGITS, 0)
    last = isinstance(positions, int) and positions == 1 and not shows_all(config, arguments)
    return last and not watched(readers)


def returns_cache(model: Any, config: Any, arguments: dict[str, Any]) -> bool:
    """Whether the cache of this `generate` call outlives it: it is an argument, or returned."""
    config = config or arguments.get("generation_config") or model.generation_config
    returned = arguments.get("return_dict_in_generate", config.return_dict_in_generate)
    return cache_among(arguments) is not None or bool(returned)


def prefill(model: Any, ids: Tensor, config: Any, kwargs: dict[str, Any]) -> Any:
    """The pass over a prompt [B, T], in chunks where the configuration says so."""
    return model._prefill(ids, config, kwargs, is_first_iteration=not config.is_assistant)


def next_pass(model: Any, ids: Tensor, new: int, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of the forward pass over the last `new` of the ids [B, n]."""
    return model.prepare_inputs_for_generation(ids, next_sequence_length=new, **kwargs)


def extended(model: Any, outputs: Any, kwargs: dict[str, Any], tokens: int) -> dict[str, Any]:
    """`generate`'s keyword arguments, with masks and positions longer by `tokens`."""
    return model._update_model_kwargs_for_generation(outputs, dict(kwargs), num_new_tokens=tokens)


def decoding(model: Any) -> AbstractContextManager[None]:
    """Inside, a model is changed as transformers changes it to decode faster."""
    return model._optimize_model_for_decode()


def padding_token(config: Any) -> Tensor:
    """The id that fills up rows that have ended."""
    return config._pad_token_tensor


def prompt_columns(config: Any, default: int) -> int:
    """Columns of a prompt whose mask of ones alone was left out; `default` if not known."""
    return vars(config).get("_mask_length", default)


def stops_at_tokens(criteria: Any) -> bool:
    """Whether rows end at an end token, and are padded from then on."""
    return any(isinstance(criterion, EosTokenCriteria) for criterion in criteria)


def with_cache(outputs: Any, cache: Any) -> Any:
    """The same outputs of a forward pass with another cache."""
    return type(outputs)(**{**outputs, CACHE: cache})


def generate_output(ids: Tensor, cache: Any, **fields: Any) -> GenerateDecoderOnlyOutput:
    """What `generate` returns as a dictionary: ids [B, n], the cache and further fields."""
    return GenerateDecoderOnlyOutput(sequences=ids, **{CACHE: cache}, **fields)  # type: ignore[arg-type]
