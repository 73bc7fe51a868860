"""Saving what trol adds to a host, and putting it on again: two files, no pickle.

What a model is known by, in a few characters: its configuration, and its weights.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from trol.depth import attach, attached, detach
from trol.depth.attachment import gates_of
from trol.depth.policy import AbstractPolicy, from_settings, names, settings_to_save
from trol.errors import AdapterError, UsageError, unwritable
from trol.host.layers import find_decoder
from trol.policies.base import PolicyModule

LOOKED_AT = 64
"""Numbers of a parameter that are looked at, from the first to the last."""

_NOT_THE_HOST = {
    "quantization_config",
    "_name_or_path",
    "dtype",
    "torch_dtype",
    "transformers_version",
    "use_cache",
    "architectures",
    "_attn_implementation",
    "attn_implementation",
}
"""Configuration entries that do not change what the layers compute."""


def host_digest(decoder: Any) -> str:
    """Sixteen hexadecimal digits that name a decoder's configuration."""
    config = {k: v for k, v in decoder.config.to_dict().items() if k not in _NOT_THE_HOST}
    return text_digest(json.dumps(config, sort_keys=True, default=str))[:16]


def weights_digest(model: nn.Module) -> str:
    """Of a model: names and shapes of its parameters, and some numbers of each."""
    parts = []
    for name, parameter in model.named_parameters():
        step = max(1, parameter.numel() // LOOKED_AT)
        some = parameter.detach().flatten()[::step]
        parts.append(f"{name} {tuple(parameter.shape)} {parameter.dtype} {numbers_digest(some)}")
    return text_digest("\n".join(parts))


def numbers_digest(values: Tensor) -> str:
    """Of a tensor's shape and numbers."""
    raw = values.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return f"{tuple(values.shape)}{hashlib.sha256(raw).hexdigest()}"


def text_digest(text: str) -> str:
    """Thirty-two hexadecimal digits of a text."""
    return hashlib.sha256(text.encode()).hexdigest()[:32]


CONFIG_NAME = "depth_config.json"
WEIGHTS_NAME = "depth.safetensors"
PARTS_NAME = "parts.safetensors"
"""What lies beside an adapter where training changed parts of its host as well."""

Model = TypeVar("Model", bound=nn.Module)


def is_trained(folder: Path) -> bool:
    """Whether the folder holds what training added to a host: an adapter, and parts."""
    return (folder / PARTS_NAME).is_file() and (folder / CONFIG_NAME).is_file()


def check_adapter_folder(folder: Path, *, beside: tuple[str, ...] = ()) -> None:
    """Raises `UsageError` where a command should not write an adapter.

    An earlier adapter is written over; beside it may lie what the command itself writes there.
    """
    check_writable(folder)
    own = (CONFIG_NAME, WEIGHTS_NAME, *beside)
    there = folder.iterdir() if folder.exists() else ()
    others = sorted(path.name for path in there if path.name.removesuffix(".partial") not in own)
    if others:
        more = f" and {len(others) - 3} more" if len(others) > 3 else ""
        raise UsageError(
            f"{folder} holds {', '.join(others[:3])}{more}, which is no adapter of this command; "
            "name a folder that is new or empty."
        )


def check_writable(folder: Path) -> None:
    """Raises `UsageError` where no folder is or can be made; leaves everything as it was."""
    try:
        there = next(place for place in (folder, *folder.parents) if place.exists())
        tempfile.TemporaryFile(dir=there).close()
    except OSError as error:
        raise unwritable(folder, error) from error


def save(model: nn.Module, folder: str | Path) -> Path:
    """Writes the attached policy: `depth_config.json` and `depth.safetensors`.

    Raises:
        UsageError: no policy is attached, or it could not be opened again.
    """
    _, stack = attached(model)
    settings, folder = settings_to_save(stack.depth_policy), Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "trol_version": _version(),
        "host_class": type(stack).__name__,
        "host_digest": host_digest(stack),
        **settings,
    }
    _write_whole(folder / WEIGHTS_NAME, lambda path: save_file(_parameters(stack), path))
    text = json.dumps(config, indent=2) + "\n"
    _write_whole(folder / CONFIG_NAME, lambda path: path.write_text(text, encoding="utf-8"))
    return folder


def load(model: Model, folder: str | Path) -> Model:
    """Attaches the policy of an adapter directory to `model`, in place; returns the model.

    Raises:
        AdapterError: files are missing or damaged, or were saved from another host.
        UsageError: a policy is attached already.
    """
    config, weights = _read(Path(folder))
    decoder = find_decoder(model)
    digest = host_digest(decoder)
    if config.get("host_digest") != digest:
        raise AdapterError(
            f"the adapter in {folder} was saved from {config.get('host_class')} "
            f"{config.get('host_digest')}, this host is {type(decoder).__name__} {digest}; load "
            "it onto the model it was trained on."
        )
    about = ("trol_version", "host_class", "host_digest")
    attach(model, _policy({k: v for k, v in config.items() if k not in about}, folder))
    try:
        _fill(attached(model)[1], weights, folder)
    except AdapterError:
        detach(model)
        raise
    return model


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        if not (folder / name).is_file():
            raise AdapterError(
                f"{folder} has no {name}; give the folder that trol.save(model, folder) wrote."
            )
    try:
        config = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
        weights = load_file(folder / WEIGHTS_NAME)
    except (ValueError, SafetensorError) as error:
        raise AdapterError(
            f"the adapter in {folder} is damaged: {error}; save it again."
        ) from error
    if not isinstance(config, dict):
        raise AdapterError(f"the adapter in {folder} is damaged: no settings; save it again.")
    return config, weights


def _policy(settings: dict[str, Any], folder: str | Path) -> AbstractPolicy:
    try:
        return from_settings(settings)
    except (TypeError, UsageError) as error:
        wrong = [
            f"setting {key} is {settings[key]!r}: " for key in settings if _alone(settings, key)
        ]
        whole = isinstance(settings.get("policy"), str) and settings["policy"] not in names()
        what = "cannot be loaded" if whole else "is damaged, save it again"
        raise AdapterError(
            f"the adapter in {folder} {what}: {''.join(wrong[:1])}{error}"
        ) from error


def _alone(settings: dict[str, Any], key: str) -> bool:
    """Whether all settings but this one make a policy, so that this one is wrong."""
    try:
        from_settings({name: value for name, value in settings.items() if name != key})
    except (TypeError, UsageError):
        return False
    return True


def _parameters(stack: Any) -> dict[str, Tensor]:
    tied = stack.depth_policy.tied
    return {
        f"{layer}.{name}": parameter.detach().contiguous()
        for layer, gate in enumerate(gates_of(stack))
        if gate is not None and not (tied and layer)
        for name, parameter in gate.named_parameters()
    }


def _fill(stack: Any, weights: dict[str, Tensor], folder: str | Path) -> None:
    wanted = _parameters(stack)
    if {k: v.shape for k, v in wanted.items()} != {k: v.shape for k, v in weights.items()}:
        raise AdapterError(
            f"{folder} holds {sorted(weights)}, its policy needs {sorted(wanted)}; the files do "
            "not belong together."
        )
    for layer, gate in enumerate(gates_of(stack)):
        if gate is None or (stack.depth_policy.tied and layer):
            continue
        for name, parameter in gate.named_parameters():
            parameter.data.copy_(weights[f"{layer}.{name}"])
        if isinstance(gate, PolicyModule):
            gate.mark_trained()


def _write_whole(path: Path, write: Any) -> None:
    partial = path.with_name(path.name + ".partial")
    write(partial)
    partial.replace(path)


def _version() -> str:
    try:
        return version("trol-vlm")
    except PackageNotFoundError:  # run from a source tree that was not installed
        return "source"
