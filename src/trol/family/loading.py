"""Opening a model by preset name, folder or hub name."""

from __future__ import annotations

import json
from collections.abc import Generator
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
from transformers.utils.hub import cached_file

from trol.depth import attach
from trol.depth.host import check_by_probe
from trol.depth.registry import from_settings
from trol.errors import HostError, TrolError
from trol.family import TrolForConditionalGeneration  # registers the family's classes as well
from trol.family.memory import check_opening
from trol.family.published.files import CONFIG
from trol.family.published.naming import check_source
from trol.family.published.opening import open_published
from trol.family.published.quantisation import check_blocks, quantised
from trol.family.published.reading import open_published_processor
from trol.host.classes import tied_names
from trol.host.saving import marks

SHIPPED = ("trol-tiny",)
"""Models that lie inside the package."""


def load_model(name: str | Path, *, bits: int | None = None, **settings: Any) -> tuple[Any, Any]:
    """A model, in evaluation mode, and its processor (of a text model: its tokenizer).

    Args:
        name: a shipped model's name, a folder (of a saved model, or of a published TroL
            checkpoint), or a hub name.
        bits: 4 or 8 for quantised weights (then float16 is the type of the others, unless
            `dtype` says otherwise); None for the weights as they are.
        settings: passed on to `from_pretrained`, such as `dtype` or `device_map`.

    Raises:
        UsageError: the name is neither a folder's nor can it be a hub name; or other bits.
        HostError: nothing of that name can be opened, what lies there is no model, its widths do
            not fit 4 bits, or it does not fit the memory at hand.
        DataError: a published checkpoint is damaged.
    """
    if bits is not None:
        settings = {"dtype": torch.float16, **settings, "quantization_config": quantised(bits)}
    with _opening(name) as source:
        model = _open(source, bits, settings)
        if bits == 4:
            check_blocks(model, str(name))
        return model.eval(), _reader(source, model, settings)


def load_host(name: str | Path) -> Any:
    """The model of `load_model` alone, for those who put no text in; its folder needs no tokenizer.

    Raises as `load_model`.
    """
    with _opening(name) as source:
        return _open(source, None, {}).eval()


@contextmanager
def _opening(name: str | Path) -> Generator[str]:
    """Where a model lies; whatever cannot be opened there is a `HostError` of one line."""
    source = shipped_folder(str(name)) if str(name) in SHIPPED else str(name)
    check_source(source, SHIPPED)
    try:
        yield source
    except TrolError:  # some of which are ValueErrors
        raise
    except (OSError, ValueError, SafetensorError, StrictDataclassError) as error:
        why = " ".join(str(error).split())
        raise HostError(
            f"no model can be opened from {str(name)!r}: {why:.400} Give a shipped model "
            f"({', '.join(SHIPPED)}), the folder of a saved model, or a hub name."
        ) from error


def shipped_folder(name: str) -> str:
    """Where a shipped model lies."""
    return str(files("trol") / "models" / name)


def config_file(source: str) -> Path:
    """Where the configuration of a folder or hub name lies here; fetched if it must be.

    Raises:
        HostError: the folder has none.
        OSError: it cannot be fetched.
    """
    found = cached_file(source, CONFIG)
    if found is None:
        raise HostError(f"{Path(source) / CONFIG} is missing; give the folder that a model is in.")
    return Path(found)


def _open(source: str, bits: int | None, settings: dict[str, Any]) -> Any:
    """A model, whatever kind lies there."""
    model = open_published(TrolForConditionalGeneration, source, **settings)
    if model is not None:
        return model
    found = config_file(source)
    config = json.loads(found.read_text(encoding="utf-8"))
    check_opening(source, found.parent, settings, mapped=not marks(config))
    model = _open_marked(config, found.parent, bits) if marks(config) else None
    if model is None:
        auto = AutoModelForImageTextToText if _sees(source) else AutoModelForCausalLM
        model = auto.from_pretrained(source, **settings)
    return model


def _reader(source: str, model: Any, settings: dict[str, Any]) -> Any:
    """The processor that lies with a model, or its tokenizer."""
    if isinstance(model, TrolForConditionalGeneration):
        published = open_published_processor(source, **settings)
        if published is not None:
            return published
    reader = AutoProcessor if type(model.config) in _SEEING else AutoTokenizer
    return reader.from_pretrained(source, config=model.config)


_SEEING = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING


def _sees(source: str) -> bool:
    return type(AutoConfig.from_pretrained(source)) in _SEEING


def _open_marked(config: dict[str, Any], folder: Path, bits: int | None) -> Any:
    """A host that was saved with its policy attached."""
    if bits is not None:
        raise HostError(
            f"{folder} is a host saved with its policy, which opens with its full weights only; "
            "leave the bits out, or quantise the host and attach the policy's adapter."
        )
    host = dict(config["host"])
    made = AutoConfig.for_model(host.pop("model_type"), **host)
    auto = AutoModelForImageTextToText if type(made) in _SEEING else AutoModelForCausalLM
    model = attach(auto.from_config(made), from_settings(config["depth"]), probe=False)
    weights: dict[str, Any] = {}
    for path in sorted(folder.glob("*.safetensors")):
        weights |= load_file(path)
    missing, surplus = model.load_state_dict(weights, strict=False)
    tied = tied_names(model)
    if surplus or set(missing) - tied:
        raise HostError(
            f"the weights in {folder} do not fit: missing {sorted(set(missing) - tied)}, "
            f"surplus {list(surplus)}; save the model again."
        )
    model.tie_weights()
    check_by_probe(model)
    return model
