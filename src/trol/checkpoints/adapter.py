"""Adapters: what trol adds to a host, saved as two files without pickle, and loaded again.

Also digests, short texts that identify a model by its configuration or by its weights.
"""

import hashlib
import json
import tempfile
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as as_safetensors
from torch import Tensor, nn

from trol.depth import attach, attached, detach
from trol.depth.attachment import gates_of
from trol.depth.policy import AbstractPolicy, from_settings, names, settings_to_save
from trol.errors import AdapterError, UsageError, unwritable
from trol.files import write_whole
from trol.host.layers import find_decoder
from trol.policies.base import PolicyModule

CONFIG_NAME = "depth_config.json"
WEIGHTS_NAME = "depth.safetensors"
PARTS_NAME = "parts.safetensors"
"""Lies beside an adapter where training changed parts of its host as well."""

ABOUT = ("trol_version", "host_class", "host_digest")
"""Keys of `depth_config.json` that are no settings of the policy."""

COMPARED = 64
"""Numbers of each parameter that go into a digest, spread from the first to the last."""

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

Model = TypeVar("Model", bound=nn.Module)


def host_digest(decoder: Any) -> str:
    """Sixteen hexadecimal digits that identify a decoder's configuration."""
    config = {k: v for k, v in decoder.config.to_dict().items() if k not in _NOT_THE_HOST}
    return text_digest(json.dumps(config, sort_keys=True, default=str))[:16]


def weights_digest(model: nn.Module) -> str:
    """The digest of a model's parameters: names, shapes, types, and some numbers of each."""
    parts = []
    for name, parameter in model.named_parameters():
        step = max(1, parameter.numel() // COMPARED)
        some = parameter.detach().flatten()[::step]
        parts.append(f"{name} {tuple(parameter.shape)} {parameter.dtype} {numbers_digest(some)}")
    return text_digest("\n".join(parts))


def numbers_digest(values: Tensor) -> str:
    """The digest of a tensor: its shape and numbers."""
    raw = values.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return f"{tuple(values.shape)}{hashlib.sha256(raw).hexdigest()}"


def text_digest(text: str) -> str:
    """The digest of a text: thirty-two hexadecimal digits."""
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def is_trained(folder: Path) -> bool:
    """Whether the folder holds what training added to a host: an adapter, and parts."""
    return (folder / PARTS_NAME).is_file() and (folder / CONFIG_NAME).is_file()


def check_adapter_folder(folder: Path, *, beside: tuple[str, ...] = ()) -> None:
    """Raises `UsageError` where a command should not write an adapter.

    An earlier adapter is written over. `beside` names other files that the command writes there.
    """
    check_writable(folder)
    own = (CONFIG_NAME, WEIGHTS_NAME, *beside)
    entries = [path.name for path in folder.iterdir()] if folder.exists() else []
    # An interrupted run may have left a draft of one of its files.
    others = sorted(name for name in entries if not any(one in name for one in own))
    if others:
        more = f" and {len(others) - 3} more" if len(others) > 3 else ""
        raise UsageError(
            f"{folder} holds {', '.join(others[:3])}{more}, which is no adapter of this command; "
            "name a folder that is new or empty."
        )


def check_writable(folder: Path) -> None:
    """Raises `UsageError` where no folder is or can be made; leaves everything as it was."""
    try:
        existing = next(place for place in (folder, *folder.parents) if place.exists())
        tempfile.TemporaryFile(dir=existing).close()
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
    write_whole(folder / WEIGHTS_NAME, as_safetensors(_parameters(stack)))
    write_whole(folder / CONFIG_NAME, json.dumps(config, indent=2) + "\n")
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
    attach(model, _policy({k: v for k, v in config.items() if k not in ABOUT}, folder))
    try:
        _fill(attached(model)[1], weights, folder)
    except AdapterError:
        detach(model)
        raise
    return model


def policy_in(folder: Path) -> AbstractPolicy:
    """The policy of an adapter directory that has no weights, as a calibrated exit has none.

    Raises:
        AdapterError: files are missing or damaged, or there are weights, which belong to a model.
    """
    config, weights = _read(folder)
    if weights:
        raise AdapterError(
            f"{folder} holds gates or heads with weights, which no plan has; attach them with "
            f"trol.load(model, {str(folder)!r}), or give the folder to `trol curve --adapters`."
        )
    return _policy({k: v for k, v in config.items() if k not in ABOUT}, folder)


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
        wrong = next((key for key in settings if _is_wrong(settings, key)), None)
        setting = "" if wrong is None else f"setting {wrong} is {settings[wrong]!r}: "
        name = settings.get("policy")
        unregistered = isinstance(name, str) and name not in names()
        what = "cannot be loaded" if unregistered else "is damaged, save it again"
        raise AdapterError(f"the adapter in {folder} {what}: {setting}{error}") from error


def _is_wrong(settings: dict[str, Any], key: str) -> bool:
    """Whether all settings but this one make a policy."""
    try:
        from_settings({name: value for name, value in settings.items() if name != key})
    except (TypeError, UsageError):
        return False
    return True


def _gates(stack: Any) -> Iterator[tuple[int, nn.Module]]:
    """The modules with parameters of their own, each with its layer: if tied, the first alone."""
    for layer, gate in enumerate(gates_of(stack)):
        if gate is not None and not (stack.depth_policy.tied and layer):
            yield layer, gate


def _parameters(stack: Any) -> dict[str, Tensor]:
    return {
        f"{layer}.{name}": parameter.detach().contiguous()
        for layer, gate in _gates(stack)
        for name, parameter in gate.named_parameters()
    }


def _fill(stack: Any, weights: dict[str, Tensor], folder: str | Path) -> None:
    needed = _parameters(stack)
    if {k: v.shape for k, v in needed.items()} != {k: v.shape for k, v in weights.items()}:
        raise AdapterError(
            f"{folder} holds {sorted(weights)}, its policy needs {sorted(needed)}; the files do "
            "not belong together."
        )
    for layer, gate in _gates(stack):
        for name, parameter in gate.named_parameters():
            parameter.data.copy_(weights[f"{layer}.{name}"])
    for gate in gates_of(stack):  # where they are tied, each layer has a module of its own
        if isinstance(gate, PolicyModule):
            gate.mark_trained()


def _version() -> str:
    try:
        return version("trol-vlm")
    except PackageNotFoundError:  # run from a source tree that was not installed
        return "source"
