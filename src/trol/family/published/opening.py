"""Opening a published checkpoint, from a folder or by its hub name, as a TroL model."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from transformers import CONFIG_MAPPING, GenerationConfig
from transformers.utils.hub import cached_file

from trol.errors import DataError, HostError
from trol.family.configuration import TrolConfig
from trol.family.memory import check_opening
from trol.family.published.configs import trol_config
from trol.family.published.files import CONFIG, GATING, MARKER, STEMS, Checkpoint, read_json
from trol.family.published.gates import check_gates, gate_tensors, read_gates, sharing_of
from trol.family.published.layouts import SIGNATURES
from trol.family.published.naming import check_source, unreachable
from trol.family.published.stated import added_tokens, end_token
from trol.family.published.templates import MARKS
from trol.family.published.weights import Weights, mapped

HUB_SETTINGS = ("revision", "cache_dir", "token", "local_files_only", "force_download")
"""What `from_pretrained` takes and only fetching reads."""

SMALL_FILES = ("*.json", "*.pt", "*.model")
"""All that is fetched besides the weights."""


@dataclass(frozen=True)
class Published:
    """A published checkpoint that lies in a folder; its weights are read when they are needed."""

    source: str
    """The folder or hub name that was asked for."""
    checkpoint: Checkpoint
    family: str
    """"internlm2" or "phi3"."""

    @property
    def folder(self) -> Path:
        """Where its files lie."""
        return self.checkpoint.folder

    @cached_property
    def config(self) -> TrolConfig:
        """The TroL configuration; raises `DataError` as `trol_config` does."""
        return self._parts[0]

    @cached_property
    def weights(self) -> Weights:
        """All weights by their names in the model; raises `DataError` as `mapped` does."""
        config, gates = self._parts
        return {**mapped(self.checkpoint, self.family, config), **gates}

    @cached_property
    def _parts(self) -> tuple[TrolConfig, dict[str, torch.Tensor]]:
        entries = read_gates(self.checkpoint, self.family)
        config = trol_config(self.family, self.checkpoint)
        file, text = self.folder / GATING, config.text_config
        where, layers = str(file if file.is_file() else self.folder), text.num_hidden_layers
        check_gates(entries, where, layers, text.hidden_size)
        sharing = sharing_of(entries, layers, where)
        config.depth = {"policy": "trol_mixer", "sharing": sharing}
        return config, gate_tensors(entries, layers, sharing)

    def stop_with(self, made: GenerationConfig) -> None:
        """Makes generation stop where the checkpoint's own files say that an answer ends.

        That is at the end token of its `generation_config.json`, at its tokenizer's, and at the
        mark that ends a turn.
        """
        file = self.folder / "generation_config.json"
        listed = read_json(file).get("eos_token_id") if file.is_file() else made.eos_token_id
        stops = [] if listed is None else listed if isinstance(listed, list) else [listed]
        known = added_tokens(self.folder)
        ends = (end_token(self.folder), MARKS[self.family].end)
        stops = list(dict.fromkeys([*stops, *(known[end] for end in ends if end in known)]))
        made.eos_token_id = stops[0] if len(stops) == 1 else stops


def find_published(source: str | Path, **hub: Any) -> Published | None:
    """The published checkpoint that lies in a folder or has this hub name; None for others.

    Raises:
        UsageError: it is neither a folder nor a hub name.
        DataError: it is one, but damaged; the message names file, tensor and cure.
        HostError: it cannot be fetched.
    """
    check_source(source)
    if not Path(source).is_dir():
        folder = _fetched(str(source), hub)
    else:
        folder = Path(source) if _may_be(Path(source)) else None
    if folder is None:
        return None
    checkpoint = Checkpoint(folder)
    for family, tensors in SIGNATURES.items():
        if all(name in checkpoint for name in tensors):
            return Published(str(source), checkpoint, family)
    if not (folder / GATING).is_file():
        return None
    known = "; ".join(f"{family}: {', '.join(t)}" for family, t in SIGNATURES.items())
    raise DataError(
        f"{folder} has a {GATING}, but its tensors ({checkpoint.names()[0]!r}, ...) are of no "
        f"published TroL ({known}); put the weights beside it that were published with it."
    )


def open_published(cls: Any, source: str | Path | None, **settings: Any) -> Any:
    """What `cls.from_pretrained(source, **settings)` gives for a published checkpoint, or None.

    Each tensor is read when its turn comes, so that a quantised model never lies in memory whole.

    Raises:
        DataError: the checkpoint is damaged.
        HostError: it cannot be fetched, or the folder holds the half of a conversion.
    """
    elsewhere = ("config", "state_dict", "gguf_file", "subfolder")
    if source is None or any(settings.get(name) for name in elsewhere):
        return None
    if (Path(source) / MARKER).is_file():
        raise HostError(
            f"{source} holds a conversion that was not finished; run the same `trol convert` "
            "again, which goes on where it was."
        )
    hub = {name: settings.pop(name) for name in HUB_SETTINGS if name in settings}
    published = find_published(source, **hub)
    if published is None:
        return None
    check_opening(published.source, published.folder, settings)
    opened = cls.from_pretrained(
        None, config=published.config, state_dict=dict(published.weights), **settings
    )
    model = opened[0] if isinstance(opened, tuple) else opened
    model.config.name_or_path = model.name_or_path = published.source
    published.stop_with(model.generation_config)
    return opened


def _may_be(folder: Path) -> bool:
    """Whether this folder can hold a published checkpoint: transformers cannot open those."""
    if (folder / GATING).is_file():
        return True
    if not (folder / CONFIG).is_file():
        return False
    return read_json(folder / CONFIG).get("model_type") not in {*CONFIG_MAPPING.keys(), None}


def _fetched(name: str, hub: dict[str, Any]) -> Path | None:
    """The files of a hub name, downloaded or from the cache; None where no gates lie there."""
    quietly = dict.fromkeys(
        ("_raise_exceptions_for_missing_entries", "_raise_exceptions_for_connection_errors"), False
    )
    reason = None
    try:
        reason = unreachable(name, hub)
        if reason is not None:
            hub = {**hub, "local_files_only": True}  # what was fetched before can still be opened
        config = cached_file(name, CONFIG, **hub)  # raises for an unknown name
        saved = config and read_json(Path(config)).get("model_type") == TrolConfig.model_type
        if saved or cached_file(name, GATING, **hub, **quietly) is None:
            return None
        for kind, stem in STEMS.items():
            wanted = [*SMALL_FILES, f"{stem}*{kind}"]
            folder = Path(snapshot_download(name, allow_patterns=wanted, **hub))
            if any(folder.glob(f"{stem}*{kind}")):
                break
        return folder
    except (OSError, ValueError) as error:
        raise HostError(
            f"{name!r} is no folder here and cannot be fetched from the hub "
            f"({reason or _first_line(error)}); check the name and the network, or give the folder "
            f"of a saved model or of a published checkpoint: {CONFIG}, {GATING}, the weights and "
            "the tokenizer's files."
        ) from error


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
