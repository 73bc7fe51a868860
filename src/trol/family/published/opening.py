"""Whether a folder or hub name is a published checkpoint, and opening it as a TroL model.

`find_published` is the one place that answers this. `trol.load_model` asks it once, for the model
and its processor; `from_pretrained` of the model's class and of the processor's ask it when they
are called by themselves.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from torch import Tensor
from transformers import CONFIG_MAPPING, GenerationConfig
from transformers.utils.hub import cached_file

from trol.errors import DataError, HostError
from trol.family.configuration import TrolConfig
from trol.family.memory import check_opening
from trol.family.published import files
from trol.family.published.configs import trol_config
from trol.family.published.layouts import SIGNATURES, Weights, mapped, read_gates
from trol.family.published.processors import MARKS, published_processor
from trol.policies.mixer import from_nothing

HUB_SETTINGS = ("revision", "cache_dir", "token", "local_files_only", "force_download")
"""What `from_pretrained` takes and only fetching reads."""

ELSEWHERE = ("config", "state_dict", "gguf_file", "subfolder")
"""Settings of `from_pretrained` by which it opens something else than a published checkpoint."""

SMALL_FILES = ("*.json", "*.pt", "*.model")
"""All that is fetched besides the weights."""


@dataclass(frozen=True)
class Published:
    """A published checkpoint that lies in a folder; its weights are read when they are needed."""

    source: str
    """The folder or hub name that was asked for."""
    checkpoint: files.Checkpoint
    family: str
    """"internlm2" or "phi3"."""
    config: TrolConfig
    gates: dict[str, Tensor]
    """By their names in the model; of shared ones the first layer's."""

    @property
    def folder(self) -> Path:
        """Where its files lie."""
        return self.checkpoint.folder

    @cached_property
    def weights(self) -> Weights:
        """All weights by their names in the model; raises `DataError` as `mapped` does."""
        return {**mapped(self.checkpoint, self.family, self.config), **self.gates}

    def open_model(self, cls: Any, settings: dict[str, Any]) -> Any:
        """What `cls.from_pretrained` gives with these settings, of the model's class `cls`.

        Each tensor is read when its turn comes, so a quantised model never lies in memory whole.
        """
        settings = {name: v for name, v in settings.items() if name not in HUB_SETTINGS}
        check_opening(self.source, self.folder, settings)
        opened = cls.from_pretrained(
            None, config=self.config, state_dict=dict(self.weights), **settings
        )
        model = opened[0] if isinstance(opened, tuple) else opened
        model.config.name_or_path = model.name_or_path = self.source
        self.set_stops(model.generation_config)
        return opened

    def open_processor(self, cls: Any) -> Any:
        """The processor, of the class `cls`; raises as `published_processor` does."""
        return published_processor(cls, self.folder, self.config)

    def set_stops(self, generation: GenerationConfig) -> None:
        """Makes generation stop where the checkpoint's own files say that an answer ends.

        That is at the end token of its `generation_config.json`, at its tokenizer's, and at the
        mark that ends a turn.
        """
        file = self.folder / "generation_config.json"
        ids = (
            files.read_json(file).get("eos_token_id") if file.is_file() else generation.eos_token_id
        )
        stops = [] if ids is None else ids if isinstance(ids, list) else [ids]
        added = files.added_tokens(self.folder)
        ends = (files.end_token(self.folder), MARKS[self.family].end)
        stops = list(dict.fromkeys([*stops, *(added[end] for end in ends if end in added)]))
        generation.eos_token_id = stops[0] if len(stops) == 1 else stops


def find_published_model(source: str | Path | None, settings: dict[str, Any]) -> Published | None:
    """The published checkpoint that `from_pretrained(source, **settings)` means; None for others.

    Raises as `find_published`, and `HostError` for a folder that holds the half of a conversion.
    """
    if source is None or any(settings.get(name) for name in ELSEWHERE):
        return None
    if (Path(source) / files.MARKER).is_file():
        raise HostError(
            f"{source} holds a conversion that was not finished; run the same `trol convert` "
            "again, which goes on where it was."
        )
    return find_published(source, **settings)


def open_published(cls: Any, source: str | Path | None, **settings: Any) -> Any:
    """The published model of class `cls`; None where the source is no published checkpoint."""
    published = find_published_model(source, settings)
    return None if published is None else published.open_model(cls, settings)


def find_published(source: str | Path, **settings: Any) -> Published | None:
    """The published checkpoint that lies in a folder or has this hub name; None for others.

    Of the settings `HUB_SETTINGS` alone are read.

    Raises:
        UsageError: the source is neither a folder nor a hub name.
        DataError: it is a published checkpoint, but damaged; the message names file, tensor and
            cure.
        HostError: it cannot be fetched.
    """
    files.check_source(source)
    if not Path(source).is_dir():
        hub = {name: settings[name] for name in HUB_SETTINGS if name in settings}
        folder = _fetched(str(source), hub)
    else:
        folder = Path(source) if _may_be_published(Path(source)) else None
    if folder is None:
        return None
    checkpoint = files.Checkpoint(folder)
    for family, names in SIGNATURES.items():
        if all(name in checkpoint for name in names):
            config = trol_config(family, checkpoint)
            text = config.text_config
            layers, width = text.num_hidden_layers, text.hidden_size
            sharing, tensors = read_gates(checkpoint, family, layers, width)
            config.depth = from_nothing({"policy": "trol_mixer", "sharing": sharing})
            return Published(str(source), checkpoint, family, config, tensors)
    if not (folder / files.GATING).is_file():
        return None
    known = "; ".join(f"{family}: {', '.join(t)}" for family, t in SIGNATURES.items())
    raise DataError(
        f"{folder} has a {files.GATING}, but its tensors ({checkpoint.names()[0]!r}, ...) are of "
        f"no published TroL ({known}); put the weights beside it that were published with it."
    )


def _may_be_published(folder: Path) -> bool:
    """Whether the folder has gates, or a model type that transformers does not know."""
    if (folder / files.GATING).is_file():
        return True
    if not (folder / files.CONFIG).is_file():
        return False
    return files.read_json(folder / files.CONFIG).get("model_type") not in {
        *CONFIG_MAPPING.keys(),
        None,
    }


def _fetched(name: str, hub: dict[str, Any]) -> Path | None:
    """The files of a hub name, downloaded or from the cache; None where no gates lie there."""
    quietly = dict.fromkeys(
        ("_raise_exceptions_for_missing_entries", "_raise_exceptions_for_connection_errors"), False
    )
    reason = None
    try:
        reason = files.unreachable(name, hub)
        if reason is not None:
            hub = {**hub, "local_files_only": True}  # what was fetched before can still be opened
        config = cached_file(name, files.CONFIG, **hub)  # raises for an unknown name
        saved = config and files.read_json(Path(config)).get("model_type") == TrolConfig.model_type
        if saved or cached_file(name, files.GATING, **hub, **quietly) is None:
            return None
        for kind, stem in files.STEMS.items():
            patterns = [*SMALL_FILES, f"{stem}*{kind}"]
            folder = Path(snapshot_download(name, allow_patterns=patterns, **hub))
            if any(folder.glob(f"{stem}*{kind}")):
                break
        return folder
    except (OSError, ValueError) as error:
        why = reason or next(iter(str(error).splitlines()), type(error).__name__)
        raise HostError(
            f"{name!r} is no folder here and cannot be fetched from the hub ({why}); check the "
            "name and the network, or give the folder of a saved model or of a published "
            f"checkpoint: {files.CONFIG}, {files.GATING}, the weights and the tokenizer's files."
        ) from error
