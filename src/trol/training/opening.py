"""Opens the model of a recipe: a new one, an existing host, or the result of an earlier run."""

import inspect
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import LlamaForCausalLM

from trol.checkpoints.adapter import is_trained
from trol.data.boards import NOTHING, WORDS
from trol.data.conversations import give_template, read_template
from trol.data.pairs import docstring_pairs
from trol.depth import attach, attached, detach, is_attached
from trol.depth.policy import AbstractPolicy, from_settings, to_settings
from trol.errors import HostError, UsageError, unknown
from trol.family import (
    TrolConfig,
    TrolForConditionalGeneration,
    TrolProcessor,
    tiny,
    tiny_processor,
)
from trol.family.composition import composed
from trol.family.loading import load_model
from trol.family.presets import TEMPLATES, byte_level_tokenizer, separate, text_decoder
from trol.family.published.files import CONFIG, read_json
from trol.host.trainer import checkpoint_activations
from trol.training.adapters import is_plain_host, open_adapters
from trol.training.recipe import Recipe, resolve
from trol.training.trainable import check_quantised, quantisation

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
"""Precision of a recipe -> type of the weights that do not learn."""


def opened(recipe: Recipe, start: Path | None) -> tuple[Any, Any]:
    """The model, its policy attached, and its processor (of a text decoder: its tokenizer).

    Args:
        recipe: names the model, its policy, precision and bits.
        start: the folder that an earlier run saved: a model, in place of the recipe's, or
            adapters, which are put on the recipe's.

    Raises:
        UsageError: no model can be made of the recipe's sizes, or policies contradict each other.
        HostError: the host cannot be opened, has no decoder, or cannot be treated rightly.
        AdapterError: the adapters belong to another host.
    """
    if start is None:
        model, processor = _first(recipe)
    elif is_trained(start):
        model, processor = _first(recipe)
        model = open_adapters(model, start)
        _check_policy(model, recipe, str(start))
    else:
        model, processor = _saved(recipe, start)
    if recipe.bits:
        check_quantised(model)
    if recipe.checkpointing:
        checkpoint_activations(model)
    return model, processor


def reopened(folder: str | Path) -> tuple[Any, Any]:
    """The model and processor that a run saved in `folder`, free to learn on.

    Raises as `opened`, and `UsageError` where no recipe lies in the folder.
    """
    folder = Path(folder)
    return opened(resolve(folder / "recipe.yaml"), folder)


def open_trained(
    folder: str | Path, *, chat_template: str | None = None, **settings: Any
) -> tuple[Any, Any]:
    """As `reopened`, but in evaluation mode: what is named where a model could be.

    Args:
        folder: adapters that `trol train` wrote.
        chat_template: a template, its text or its file, in place of the processor's own.
        settings: none; those of `trol.load_model` stand in the recipe.

    Raises:
        UsageError: settings are given, or `chat_template` is none, which is found out before the
            model is opened.
    """
    if settings:
        raise UsageError(
            f"{folder} holds adapters, whose recipe.yaml says how their model is opened; leave "
            f"{', '.join(settings)} out."
        )
    template = None if chat_template is None else read_template(chat_template)
    model, processor = reopened(folder)
    if template is not None:
        give_template(processor, template)
    return model.eval(), processor


def _first(recipe: Recipe) -> tuple[Any, Any]:
    """The model and processor that the recipe itself names."""
    if recipe.host:
        return _host(recipe, recipe.host)
    if recipe.decoder:
        return _new_decoder(recipe)
    if {"name", "vision", "text"} & recipe.preset.keys():
        model, processor = composed(recipe.preset, recipe.policy, [NOTHING, *WORDS])
    else:
        processor = tiny_processor([NOTHING, *WORDS])
        model = _tiny(recipe, len(processor.tokenizer))
    dtype = DTYPES[recipe.precision]
    if recipe.bits:
        # from_pretrained is what quantises; it reads the weights from the model in memory.
        model = TrolForConditionalGeneration.from_pretrained(
            None, config=model.config, state_dict=model.state_dict(), **_settings(recipe)
        )
    elif dtype != torch.float32:
        _to(model, dtype)
    return model, processor


def _tiny(recipe: Recipe, vocabulary: int) -> Any:
    sizes = set(inspect.signature(tiny).parameters) - {"vocab_size", "depth"}
    for key in recipe.preset:
        if key not in sizes:
            raise unknown("key in recipe.preset", key, {*sizes, "name", "vision", "text"})
    try:
        config = tiny(vocabulary, **recipe.preset, depth=recipe.policy)
        return TrolForConditionalGeneration(config)
    except (StrictDataclassError, TypeError, ValueError, ZeroDivisionError) as error:
        raise UsageError(f"no model can be made from preset {recipe.preset}: {error}") from error


def _new_decoder(recipe: Recipe) -> tuple[Any, Any]:
    """A new text decoder, its tokenizer learnt from docstrings of the train split."""
    sizes = set(inspect.signature(text_decoder).parameters) - {"tokenizer"}
    settings = dict(recipe.decoder)
    for key, value in settings.items():
        if key not in {*sizes, "vocabulary"}:
            raise unknown("key in recipe.decoder", key, {*sizes, "vocabulary"})
        if not isinstance(value, int) or isinstance(value, bool):
            raise UsageError(f"recipe.decoder.{key} is {value!r}, but must be a whole number.")
    texts = (text for p in docstring_pairs("train") for text in (p.question, p.answer))
    tokens = {"vocabulary": settings.pop("vocabulary")} if "vocabulary" in settings else {}
    tokenizer = byte_level_tokenizer(texts, **tokens)
    model = LlamaForCausalLM(text_decoder(tokenizer, **settings))
    attach(model, from_settings(recipe.policy))
    _to(model, DTYPES[recipe.precision])
    return model, tokenizer


def _host(recipe: Recipe, name: str) -> tuple[Any, Any]:
    """An existing model with the recipe's policy."""
    try:
        model, processor = load_model(name, **_settings(recipe))
    except ImportError as error:  # some hosts' processors need packages that trol does not
        reason = " ".join(str(error).split())
        raise HostError(f"{name} needs a package that is not installed: {reason}") from error
    if is_plain_host(model):
        detach(model)
    if recipe.chat_template in TEMPLATES:
        separate(model, processor)
    elif recipe.chat_template:
        give_template(processor, recipe.chat_template)
    if is_attached(model):
        _check_policy(model, recipe, name)
    else:
        attach(model, from_settings(recipe.policy))
    if not recipe.bits:
        _to(model, DTYPES[recipe.precision])  # a host saved with its policy opens in its own type
    return model, processor


def _saved(recipe: Recipe, start: Path) -> tuple[Any, Any]:
    """A whole model of an earlier run, with the recipe's policy in place of its own."""
    file = start / CONFIG
    if not file.is_file() or read_json(file).get("model_type") != TrolConfig.model_type:
        return _host(recipe, str(start))
    model = TrolForConditionalGeneration.from_pretrained(
        start, depth=recipe.policy, **_settings(recipe)
    )
    return model, TrolProcessor.from_pretrained(start)


def _settings(recipe: Recipe) -> dict[str, Any]:
    """The recipe's precision and bits, as `from_pretrained` takes them."""
    dtype = DTYPES[recipe.precision]
    if not recipe.bits:
        return {"dtype": dtype}
    return {"dtype": dtype, "quantization_config": quantisation(recipe.bits, dtype)}


def _to(model: Any, dtype: torch.dtype) -> None:
    model.to(dtype)
    model.config.dtype = dtype


def _check_policy(model: Any, recipe: Recipe, name: str) -> None:
    """Raises `UsageError` where the recipe would replace a policy that is trained already."""
    policy, wanted = attached(model)[1].depth_policy, from_settings(recipe.policy)
    if _trained(policy) != _trained(wanted):
        raise UsageError(
            f"{name} comes with the policy {policy}, the recipe says {wanted}; write the first "
            "into the recipe, or give a host without a policy."
        )


def _trained(policy: AbstractPolicy) -> dict[str, Any]:
    """The settings of a policy without what its parameters were before they were trained."""
    return {key: value for key, value in to_settings(policy).items() if key != "initial_gate"}
