"""Opening models: `load_model` by name, folder or hub name, and hosts saved with their policy.

Once trol.family is imported, transformers' Auto classes know such hosts too:
`AutoModelForCausalLM.from_pretrained(folder)` opens one as it opens the plain host, generation
config, dtype, attention, device map, quantisation and revision included, its policy attached.
"""

import copy
from collections.abc import Generator
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoProcessor,
    AutoTokenizer,
    PretrainedConfig,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
    MODEL_MAPPING,
)
from transformers.utils.hub import cached_file

from trol.data.conversations import give_template, read_template
from trol.depth import attach, attached, attachment
from trol.depth.attachment import check_by_probe
from trol.depth.policy import from_settings
from trol.errors import HostError, TrolError, UsageError
from trol.family import gguf
from trol.family.memory import check_blocks, check_opening, quantised
from trol.family.modeling import TrolForConditionalGeneration
from trol.family.pretrained import MODELS, TOWERS, located
from trol.family.processing import TrolProcessor
from trol.family.published.files import CONFIG, check_source
from trol.family.published.opening import HUB_SETTINGS, Published, find_published_model
from trol.host.classes import MODEL_TYPE, tied_names, unknown_setting
from trol.host.weights import forget_quantisation, is_quantised
from trol.policies.base import PolicyModule

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

READER_FILES = (
    "token*",
    "*token*.json",
    "vocab*",
    "*.model",
    "*processor_config.json",
    "*.tiktoken",
)
"""What a folder with a tokenizer or a processor holds at least one of."""


def load_model(
    name: str | Path,
    *,
    bits: int | None = None,
    chat_template: str | None = None,
    **settings: Any,
) -> tuple[Any, Any]:
    """A model, in evaluation mode, and its processor (of a text model: its tokenizer).

    A host that was saved with its policy is opened as a plain one, by `from_pretrained`.

    Args:
        name: a shipped model's name, a folder (of a saved model, or of a published TroL
            checkpoint), a GGUF file or a folder with one, the short name of a pretrained model
            (`smollm2`), or a hub name, in this order.
        bits: 4 or 8 for quantised weights (then float16 is the type of the others, unless
            `dtype` says otherwise); None for the weights as they are.
        chat_template: a template, its text or its file, in place of the processor's own.
        settings: passed on to `from_pretrained`, such as `dtype`, `device_map`, `revision`,
            `attn_implementation` or `gguf_file`.

    Raises:
        UsageError: the name is neither a folder's nor can it be a hub name; other bits; a setting
            that `from_pretrained` does not know; or a `chat_template` that is none, which is found
            out before the model is opened.
        HostError: nothing of that name can be opened, what lies there is no model, it has no
            tokenizer, its widths do not fit 4 bits, or it does not fit the memory at hand.
        DataError: a published checkpoint is damaged, or a file is no GGUF file.
    """
    template = None if chat_template is None else read_template(chat_template)
    if bits is not None:
        settings = {"dtype": torch.float16, **settings, "quantization_config": quantised(bits)}
    with _opening(name, settings) as source:
        if bits is not None and settings.get("gguf_file"):
            raise UsageError("a GGUF file opens with its full weights; leave bits out.")
        model, published = _open(source, settings)
        if bits == 4:
            check_blocks(model, str(name))
        if published is not None:
            processor = published.open_processor(TrolProcessor)
        else:
            processor = _reader(source, model, settings)
    if template is not None:
        give_template(processor, template)
    return model.eval(), processor


def load_host(name: str | Path, **settings: Any) -> Any:
    """The model of `load_model` alone, for uses without text; its folder needs no tokenizer.

    Raises as `load_model`.
    """
    with _opening(name, settings) as source:
        return _open(source, settings)[0].eval()


@contextmanager
def _opening(name: str | Path, settings: dict[str, Any]) -> Generator[str]:
    """Where a model lies; whatever cannot be opened there is an error of one line."""
    for setting in NOT_TAKEN:
        if setting in settings:
            raise UsageError(
                f"{setting} is no setting for opening a model with its processor; leave it out, or "
                "call from_pretrained of the model's own class."
            )
    if str(name) in TOWERS and not Path(name).exists():
        raise UsageError(
            f"{name} is a vision tower, which answers nothing by itself; name it in a recipe "
            f"(preset.vision), or give a model: {', '.join((*SHIPPED, *MODELS))}."
        )
    source = shipped_folder(str(name)) if str(name) in SHIPPED else located(str(name))
    file = gguf.file_of(Path(source), settings)
    if file is not None:
        settings["gguf_file"], source = file.name, str(file.parent)
        settings.pop("subfolder", None)
    check_source(source, (*SHIPPED, *MODELS))
    faults = FAULTS if file is None else (*FAULTS, *gguf.FAULTS)
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
    except faults as error:
        why = " ".join(str(error).split()).rstrip(".")
        text = f"no model can be opened from {str(name)!r}: "
        if file is None:
            names = ", ".join((*SHIPPED, *MODELS))
            text += f"{why:.400}. Give a name ({names}), the folder of a saved model, a GGUF file, "
            raise HostError(f"{text}or a hub name.") from error
        raise HostError(
            f"{text}the file is damaged, or holds what this transformers cannot read; download it "
            f"again, or give another. Its reader says: {why:.400}."
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
    file = cached_file(source, CONFIG, **where)
    if file is None:
        raise HostError(f"{Path(source) / CONFIG} is missing; give the folder of a model.")
    return Path(file)


def _open(source: str, settings: dict[str, Any]) -> tuple[Any, Published | None]:
    """A model of any kind, and the published checkpoint that it comes from, if it does."""
    published = find_published_model(source, settings)
    if published is not None:
        return published.open_model(TrolForConditionalGeneration, settings), published
    shared = _shared(settings)
    if not settings.get("gguf_file"):
        where = {name: value for name, value in shared.items() if name != "trust_remote_code"}
        check_opening(source, config_file(source, **where).parent, settings)
    config = AutoConfig.from_pretrained(source, **shared)
    model = auto_class(config).from_pretrained(source, **settings)
    if not is_quantised(model):
        forget_quantisation(model)  # a GGUF file's, whose weights are full
    return model, None


def _reader(source: str, model: Any, settings: dict[str, Any]) -> Any:
    """The processor that lies with a model, or its tokenizer."""
    shared = _shared(settings)
    sees = type(model.config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    folder = Path(source) / shared.get("subfolder", "")
    there = any(file for names in READER_FILES for file in folder.glob(names))
    if folder.is_dir() and "gguf_file" not in shared and not there:
        raise HostError(
            f"{folder} holds a model, but no tokenizer or processor; save it beside the model "
            f"(tokenizer.save_pretrained({str(source)!r})), or open the model alone: "
            "import trol.family, then AutoModelForCausalLM.from_pretrained."
        )
    reader = AutoProcessor if sees else AutoTokenizer
    return reader.from_pretrained(source, config=model.config, **shared)


def _shared(settings: dict[str, Any]) -> dict[str, Any]:
    return {name: settings[name] for name in SHARED if name in settings}


HEADED: dict[Any, Any] = {
    AutoModelForImageTextToText: MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoModelForCausalLM: MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModelForSequenceClassification: MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoModelForTokenClassification: MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
}
"""Auto class of models with a head -> its table."""


def auto_class(config: PretrainedConfig) -> Any:
    """The Auto class for a model of this configuration: of the class that was saved, if it says.

    Otherwise that of image-text-to-text models, if the host is one, or of causal language models.
    """
    host = config.host if isinstance(config, SavedHostConfig) else config
    fitting = {auto: table[type(host)] for auto, table in HEADED.items() if type(host) in table}
    for auto, known in fitting.items():
        classes = known if isinstance(known, tuple) else (known,)
        if {one.__name__ for one in classes} & set(host.architectures or ()):
            return auto
    sees = AutoModelForImageTextToText in fitting
    return AutoModelForImageTextToText if sees else AutoModelForCausalLM


class SavedHostConfig(PretrainedConfig):
    """The configuration of a host that was saved with its policy: the host's own, and the policy.

    What overrides a setting (`from_pretrained(folder, rope_theta=...)`) overrides the host's.
    """

    model_type = MODEL_TYPE
    host: Any = None
    """The host's own configuration."""
    depth: Any = None
    """The policy: {"policy": name, **settings}."""

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        wants_unused = kwargs.pop("return_unused_kwargs", False)
        host = copy.deepcopy(config_dict["host"])
        config = cls()
        config.depth = config_dict["depth"]
        kind = CONFIG_MAPPING[host["model_type"]]
        config.host, unused = kind.from_dict(host, return_unused_kwargs=True, **kwargs)  # type: ignore[misc]
        return (config, unused) if wants_unused else config

    def to_dict(self) -> dict[str, Any]:
        return {"model_type": MODEL_TYPE, "depth": self.depth, "host": self.host.to_dict()}


class SavedHost:
    """What an Auto class opens such a folder with: the host's own class, a policy on it."""

    config_class = SavedHostConfig
    classes: Any
    """The Auto class's own table: configuration of a host -> its class of models."""

    @classmethod
    def from_pretrained(
        cls, source: Any, *args: Any, config: SavedHostConfig, **kwargs: Any
    ) -> Any:
        """The host with its policy, as its own class opens it.

        Raises:
            HostError: weights are missing or left over, or the family cannot be treated rightly.
            UsageError: the policy is unknown, or does not fit.
        """
        wants_info = kwargs.pop("output_loading_info", False)
        host = cls.classes[type(config.host)]
        model, info = _with_policy(host, config.depth).from_pretrained(
            source, *args, config=config.host, output_loading_info=True, **kwargs
        )
        missing, surplus = set(info["missing_keys"]) - tied_names(model), info["unexpected_keys"]
        if host.__name__ not in (config.host.architectures or ()):  # another head, or none
            gate = f".{attachment.GATE}."  # in the name of each of a policy's parameters
            missing, surplus = ({n for n in names if gate in n} for names in (missing, surplus))
        if missing or surplus:
            raise HostError(
                f"the weights in {source} do not fit: missing {sorted(missing)}, surplus "
                f"{sorted(surplus)}; save the model again."
            )
        for gate in attachment.gates_of(attached(model)[1]):
            if isinstance(gate, PolicyModule):
                gate.mark_trained()
        check_by_probe(model)
        return (model, info) if wants_info else model


def _with_policy(host: type[Any], settings: dict[str, Any]) -> type[Any]:
    """A class that is made as `host`, with the policy on it before weights are read."""

    class Opened(host):  # type: ignore[misc, valid-type]
        def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
            super().__init__(config, *args, **kwargs)
            self.__class__ = host
            attach(self, from_settings(settings), probe=False)

    Opened.__name__, Opened.__qualname__ = host.__name__, host.__qualname__
    Opened.__module__ = host.__module__
    return Opened


def register_saved_hosts() -> None:
    """Tells the Auto classes of models with a decoder how the folder of a saved host is opened."""
    AutoConfig.register(SavedHostConfig.model_type, SavedHostConfig)
    for auto, classes in {AutoModel: MODEL_MAPPING, **HEADED}.items():
        auto.register(SavedHostConfig, type("SavedHost", (SavedHost,), {"classes": classes}))
