"""Opening a published checkpoint, from a folder or by its hub name, as a TroL model.

A published checkpoint's tensors under a TroL model's names, made when asked for.

The gates of a published checkpoint: L entries, which may all be the same one.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from torch import Tensor
from transformers import CONFIG_MAPPING, GenerationConfig
from transformers.utils.hub import cached_file

from trol.errors import DataError, HostError
from trol.family.configuration import TrolConfig
from trol.family.memory import check_opening
from trol.family.published.configs import position_grid, trol_config
from trol.family.published.files import (
    CONFIG,
    CURE,
    GATING,
    MARKER,
    STEMS,
    Checkpoint,
    added_tokens,
    check_source,
    end_token,
    read_json,
    read_pickled,
    unreachable,
)
from trol.family.published.layouts import GATES, IGNORED, SIGNATURES, Part, Source, sources
from trol.family.published.templates import MARKS


@dataclass(frozen=True)
class Lazy:
    """A tensor of the model that is read from its file when `[...]` is asked of it.

    transformers asks just this of the values of a state dict, one after the other.
    """

    checkpoint: Checkpoint
    name: str
    part: Part

    def __getitem__(self, index: Any) -> Tensor:
        return self.part(self.checkpoint.read(self.name))[index]


Weights = Mapping[str, Lazy | Tensor]
"""Name in the model -> the tensor, or what reads it."""


def mapped(checkpoint: Checkpoint, family: str, config: TrolConfig) -> dict[str, Lazy]:
    """All weights but the gates.

    Raises:
        DataError: a tensor is missing, has another shape, or does not belong there.
    """
    positions = position_grid(checkpoint, family) ** 2 + 1
    expected = list(sources(family, config, positions))
    _check_names(checkpoint, family, expected)
    for source in expected:
        if (found := checkpoint.shape(source.name)) != source.shape:
            raise DataError(
                f"{checkpoint.file(source.name)}: {source.name!r} has the shape {found}, expected "
                f"{source.shape} by config.json and the other tensors; {CURE}."
            )
    return {
        target: Lazy(checkpoint, source.name, part)
        for source in expected
        for target, part in source.targets.items()
    }


def _check_names(checkpoint: Checkpoint, family: str, expected: list[Source]) -> None:
    wanted = {source.name for source in expected}
    missing = [source.name for source in expected if source.name not in checkpoint]
    if missing:
        files = ", ".join(file.name for file in checkpoint.files())
        raise DataError(
            f"{checkpoint.folder} lacks {len(missing)} of the {len(wanted)} tensors of a {family} "
            f"checkpoint, first {missing[0]!r}: in none of {files}; {CURE}."
        )
    surplus = [
        name
        for name in checkpoint.names()
        if name not in wanted and not name.startswith(GATES[family]) and not name.endswith(IGNORED)
    ]
    if surplus:
        raise DataError(
            f"{checkpoint.file(surplus[0])} holds {surplus[0]!r}, one of {len(surplus)} tensors "
            f"that a {family} checkpoint of this size does not have; check that config.json and "
            "the weight files come from the same checkpoint."
        )


Entries = dict[str, Tensor]
"""'{layer}.weight' [1, D] and '{layer}.bias' [1] for each layer."""


def read_gates(checkpoint: Checkpoint, family: str) -> Entries:
    """The gates, from their own file, or from among the weights where there is no such file.

    Raises:
        DataError: there are none, or the file is damaged.
    """
    file, prefix = checkpoint.folder / GATING, GATES[family]
    if file.is_file():
        return read_pickled(file, mmap=False)
    among = [name for name in checkpoint.names() if name.startswith(prefix)]
    if not among:
        raise DataError(
            f"{checkpoint.folder} is no TroL checkpoint: it has neither {GATING} nor tensors "
            f"called {prefix}0.weight and so on; put {GATING} beside its weights."
        )
    return {name.removeprefix(prefix): checkpoint.read(name) for name in among}


def check_gates(entries: Entries, where: str, layers: int, width: int) -> None:
    """`DataError` unless there is one gate of that width, and of finite values, for each layer."""
    kinds = {"weight": [1, width], "bias": [1]}
    wanted = {f"{i}.{kind}": shape for i in range(layers) for kind, shape in kinds.items()}
    missing, surplus = wanted.keys() - entries.keys(), entries.keys() - wanted.keys()
    if missing or surplus:
        raise DataError(
            f"{where} holds gates for {len(entries) / 2:g} layers, the decoder has {layers}: "
            f"missing {_few(missing)}, surplus {_few(surplus)}; take the {GATING} that was "
            "published with these weights."
        )
    for name, shape in wanted.items():
        if list(entries[name].shape) != shape:
            raise DataError(
                f"{where}: {name!r} has the shape {list(entries[name].shape)}, expected {shape}, "
                f"the width of the decoder; take the {GATING} that was published with these "
                "weights."
            )
        if not entries[name].isfinite().all():
            raise DataError(
                f"{where}: {name!r} has values that are infinite or no numbers, expected finite "
                f"ones; {CURE}."
            )


def sharing_of(entries: Entries, layers: int, where: str) -> str:
    """'shared' where all entries are equal, or else 'per_layer', with a warning."""
    apart = {layer: _distance(entries, layer) for layer in range(1, layers)}
    others = [layer for layer, distance in apart.items() if distance > 0]
    if not others:
        return "shared"
    warnings.warn(
        f"the gates in {where} differ: those of the layers {_few(others)} are not layer 0's (by up "
        f"to {max(apart.values()):.3g}). Each layer gets its own; the official code would use the "
        f"last one, number {layers - 1}, in all layers.",
        UserWarning,
        stacklevel=_callers_level(),
    )
    return "per_layer"


def gate_tensors(entries: Entries, layers: int, sharing: str) -> Entries:
    """The gates by their names in a TroL model; of shared ones the first layer's."""
    held = range(1 if sharing == "shared" else layers)
    return {
        f"model.language_model.layers.{layer}.depth.{kind}": entries[f"{layer}.{kind}"]
        for layer in held
        for kind in ("weight", "bias")
    }


def _distance(entries: Entries, layer: int) -> float:
    """The largest difference to layer 0's gate; infinite where one of them is not finite."""
    distances = [
        (entries[f"{layer}.{kind}"].float() - entries[f"0.{kind}"].float()).abs().max()
        for kind in ("weight", "bias")
        if not torch.equal(entries[f"{layer}.{kind}"], entries[f"0.{kind}"])
    ]
    return max((float(d.nan_to_num(torch.inf)) for d in distances), default=0.0)


def _callers_level() -> int:
    """The `stacklevel`, for a warning of the calling function, of who called trol."""
    level, frame = 0, inspect.currentframe()
    while frame is not None:
        module = str(frame.f_globals.get("__name__"))
        if module.partition(".")[0] not in ("trol", "functools"):
            return level
        level, frame = level + 1, frame.f_back
    return level


def _few(items: object) -> str:
    """At most four of them, in order."""
    listed = sorted(items)  # type: ignore[call-overload]
    more = f" and {len(listed) - 4} more" if len(listed) > 4 else ""
    return ", ".join(map(str, listed[:4])) + more if listed else "none"


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
