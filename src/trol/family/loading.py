"""Opening a model by preset name, folder or hub name."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoProcessor,
    AutoTokenizer,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
from transformers.utils.hub import cached_file

from trol.errors import HostError, TrolError, UsageError
from trol.family import TrolForConditionalGeneration  # registers the family's classes as well
from trol.family.memory import check_opening
from trol.family.published.configs import check_blocks, quantised
from trol.family.published.files import CONFIG, check_source
from trol.family.published.opening import HUB_SETTINGS, open_published
from trol.family.published.processors import open_published_processor
from trol.family.saved_host import auto_class
from trol.host.classes import unknown_setting
from trol.host.weights import forget_quantisation, is_quantised

SHIPPED = ("trol-tiny",)
"""Models that lie inside the package."""


SHARED = (*HUB_SETTINGS, "subfolder", "trust_remote_code", "gguf_file")
"""Settings of `from_pretrained` that say where a model lies: for its files as for its weights."""

FAULTS = (
    *(OSError, ValueError, SafetensorError, StrictDataclassError, ImportError),
    *(AttributeError, AssertionError),  # an unknown dtype, a device that is not there
)
"""What transformers and torch raise for files and settings that are wrong."""

NOT_TAKEN = ("config", "state_dict", "output_loading_info")
"""Settings of `from_pretrained` by which it would open, or give, something else than the model."""


def load_model(name: str | Path, *, bits: int | None = None, **settings: Any) -> tuple[Any, Any]:
    """A model, in evaluation mode, and its processor (of a text model: its tokenizer).

    A host that was saved with its policy is opened as a plain one, by `from_pretrained`.

    Args:
        name: a shipped model's name, a folder (of a saved model, or of a published TroL
            checkpoint), a GGUF file, or a hub name.
        bits: 4 or 8 for quantised weights (then float16 is the type of the others, unless
            `dtype` says otherwise); None for the weights as they are.
        settings: passed on to `from_pretrained`, such as `dtype`, `device_map`, `revision`,
            `attn_implementation` or `gguf_file`.

    Raises:
        UsageError: the name is neither a folder's nor can it be a hub name; other bits; or a
            setting that `from_pretrained` does not know.
        HostError: nothing of that name can be opened, what lies there is no model, it has no
            tokenizer, its widths do not fit 4 bits, or it does not fit the memory at hand.
        DataError: a published checkpoint is damaged.
    """
    if bits is not None:
        settings = {"dtype": torch.float16, **settings, "quantization_config": quantised(bits)}
    with _opening(name, settings) as source:
        if bits is not None and settings.get("gguf_file"):
            raise UsageError("a GGUF file opens with its full weights; leave bits out.")
        model = _open(source, settings)
        if bits == 4:
            check_blocks(model, str(name))
        return model.eval(), _reader(source, model, settings)


def load_host(name: str | Path, **settings: Any) -> Any:
    """The model of `load_model` alone, for those who put no text in; its folder needs no tokenizer.

    Raises as `load_model`.
    """
    with _opening(name, settings) as source:
        return _open(source, settings).eval()


@contextmanager
def _opening(name: str | Path, settings: dict[str, Any]) -> Generator[str]:
    """Where a model lies; whatever cannot be opened there is an error of one line."""
    for setting in NOT_TAKEN:
        if setting in settings:
            raise UsageError(
                f"{setting} is no setting for opening a model with its processor; leave it out, or "
                "call from_pretrained of the model's own class."
            )
    source = shipped_folder(str(name)) if str(name) in SHIPPED else str(name)
    if Path(source).suffix == ".gguf":
        if not Path(source).is_file():
            raise UsageError(f"there is no GGUF file {source!r} here; check its name.")
        settings.setdefault("gguf_file", Path(source).name)
        source = str(Path(source).parent)
    check_source(source, SHIPPED)
    try:
        yield source
    except TrolError:  # some of which are ValueErrors
        raise
    except TypeError as error:
        if (unknown := unknown_setting(error)) not in settings:
            raise
        raise UsageError(
            f"from_pretrained of {str(name)!r} knows no setting {unknown!r}; check its spelling, "
            "or leave it out."
        ) from error
    except FAULTS as error:
        why = " ".join(str(error).split()).rstrip(".")
        raise HostError(
            f"no model can be opened from {str(name)!r}: {why:.400}. Give a shipped model "
            f"({', '.join(SHIPPED)}), the folder of a saved model, or a hub name."
        ) from error


def shipped_folder(name: str) -> str:
    """Where a shipped model lies."""
    return str(files("trol") / "models" / name)


def config_file(source: str, **where: Any) -> Path:
    """Where the configuration of a folder or hub name lies here; fetched if it must be.

    `where`: settings of `from_pretrained` that only fetching reads, and `subfolder`.

    Raises:
        HostError: the folder has none.
        OSError: it cannot be fetched.
    """
    found = cached_file(source, CONFIG, **where)
    if found is None:
        packed = [file.name for file in Path(source).glob("*.gguf")][:1]
        cure = (
            f"name its file by gguf_file={packed[0]!r}" if packed else "give the folder of a model"
        )
        raise HostError(f"{Path(source) / CONFIG} is missing; {cure}.")
    return Path(found)


def _open(source: str, settings: dict[str, Any]) -> Any:
    """A model, whatever kind lies there."""
    model = open_published(TrolForConditionalGeneration, source, **settings)
    if model is not None:
        return model
    shared = _shared(settings)
    if not settings.get("gguf_file"):
        where = {name: value for name, value in shared.items() if name != "trust_remote_code"}
        check_opening(source, config_file(source, **where).parent, settings)
    config = AutoConfig.from_pretrained(source, **shared)
    model = auto_class(config).from_pretrained(source, **settings)
    if not is_quantised(model):
        forget_quantisation(model)  # a GGUF file's, whose weights are full
    return model


def _reader(source: str, model: Any, settings: dict[str, Any]) -> Any:
    """The processor that lies with a model, or its tokenizer."""
    shared = _shared(settings)
    if isinstance(model, TrolForConditionalGeneration):
        published = open_published_processor(source, **shared)
        if published is not None:
            return published
    reader = AutoProcessor if type(model.config) in _SEEING else AutoTokenizer
    folder = Path(source) / shared.get("subfolder", "")
    there = any(file for names in READER_FILES for file in folder.glob(names))
    if folder.is_dir() and "gguf_file" not in shared and not there:
        raise HostError(
            f"{folder} holds a model, but no tokenizer or processor; save it beside the model "
            f"(tokenizer.save_pretrained({str(source)!r})), or open the model alone: "
            "import trol.family, then AutoModelForCausalLM.from_pretrained."
        )
    return reader.from_pretrained(source, config=model.config, **shared)


READER_FILES = (
    "token*",
    "*token*.json",
    "vocab*",
    "*.model",
    "*processor_config.json",
    "*.tiktoken",
)
"""What a folder with a tokenizer or a processor holds at least one of."""

_SEEING = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING


def _shared(settings: dict[str, Any]) -> dict[str, Any]:
    return {name: settings[name] for name in SHARED if name in settings}
