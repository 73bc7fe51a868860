"""What training added to a host, as one small folder: opened again, it goes on learning.

adapter_config.json, adapter_model.safetensors   low-rank updates, as PEFT writes them
again/                                           those of second visits alone, if there are any
depth_config.json, depth.safetensors             the policy and its gates, as trol.save
parts.safetensors                                the projector, and other parts that learnt
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from trol.depth import attach, attached, detach, is_attached
from trol.errors import AdapterError
from trol.host.quantised import is_quantised
from trol.policies import adapter
from trol.policies.plain import Plain
from trol.training.low_rank import ADAPTER, merged
from trol.training.parts import part_of
from trol.training.quantised import let_gradients_through
from trol.training.recipe import Recipe
from trol.training.visit_updates import AGAIN, only_again

UPDATES = "adapter_config.json"


def save_trained(model: Any, recipe: Recipe, folder: Path) -> None:
    """Saves what `finished` gave: adapters where updates or weights cannot be merged, else all.

    Raises:
        UsageError: no policy is attached.
    """
    if isinstance(model, PeftModel) or is_quantised(model):
        learnt = {part for stage in recipe.stages.values() for part in stage.train}
        save_adapters(model, folder, parts=learnt)
    elif is_plain_host(model):
        detach(model)  # so that transformers opens it without trol
        model.save_pretrained(folder)
        attach(model, Plain())
    else:
        model.save_pretrained(folder)


def is_plain_host(model: Any) -> bool:
    """Whether a host carries the plain policy, which may give way to any: it has nothing trained.

    A TroL model is none: its own configuration says its policy.
    """
    in_config = getattr(model, "depth_in_config", False)
    return is_attached(model) and not in_config and attached(model)[1].depth_policy == Plain()


def save_adapters(learner: Any, folder: str | Path, *, parts: Collection[str] = ()) -> Path:
    """Writes the low-rank updates, the gates, and the projector and `parts` of a learner.

    Raises:
        UsageError: no policy is attached.
    """
    folder = adapter.save(learner, folder)
    if isinstance(learner, PeftModel):
        learner.save_pretrained(str(folder), save_embedding_layers=False)
    wanted = ({"projector"} | set(parts)) - {"mixers", "decoder"}
    weights = _parts(learner, wanted)
    save_file(
        {name: tensor.detach().contiguous() for name, tensor in weights.items()},
        folder / adapter.PARTS_NAME,
    )
    return folder


def open_adapters(model: Any, folder: str | Path, *, trainable: bool = False) -> Any:
    """Puts a saved folder on the host that it was trained on; `trainable` to go on learning.

    A policy that the model carries gives way to the saved one. Returns the learner: the model
    itself, in a PEFT model where there are low-rank updates.

    Raises:
        AdapterError: the folder is no such folder, is damaged, or belongs to another host.
    """
    folder = Path(folder)
    check_adapters(folder)
    if is_attached(model):
        detach(model)
    adapter.load(model, folder)
    _fill(model, folder / adapter.PARTS_NAME)
    if not (folder / UPDATES).is_file():
        return model
    try:
        learner: Any = PeftModel.from_pretrained(
            model, str(folder), ADAPTER, is_trainable=trainable
        )
        if (folder / AGAIN).is_dir():
            learner.load_adapter(str(folder / AGAIN), AGAIN, is_trainable=trainable)
            learner.base_model.set_adapter([ADAPTER, AGAIN], inference_mode=not trainable)
            only_again(learner)
    except (ValueError, RuntimeError, KeyError, OSError, SafetensorError) as error:
        raise AdapterError(
            f"the low-rank updates in {folder} cannot be put on {type(model).__name__}: {error}"
        ) from error
    let_gradients_through(learner)
    return learner


def merge_adapters(model: Any, folder: str | Path) -> Any:
    """The host with a saved folder's updates merged; raises as `open_adapters` and `merged`."""
    learner = open_adapters(model, folder)
    return merged(learner) if isinstance(learner, PeftModel) else learner


def check_adapters(folder: Path) -> None:
    """Raises `AdapterError` unless `save_adapters` wrote this folder."""
    if not adapter.is_trained(folder):
        raise AdapterError(
            f"{folder} holds no trained adapters ({adapter.CONFIG_NAME} and "
            f"{adapter.PARTS_NAME}); give the folder of a run whose updates were not merged."
        )


def _parts(model: Any, parts: Collection[str]) -> dict[str, Tensor]:
    host, _ = attached(model)
    return {name: p for name, p in host.named_parameters() if part_of(name) in parts}


def _fill(model: Any, file: Path) -> None:
    try:
        weights = load_file(file)
    except (ValueError, SafetensorError) as error:
        raise AdapterError(f"{file} is damaged: {error}; save it again.") from error
    wanted = dict(model.named_parameters())
    for name, tensor in weights.items():
        found = wanted.get(name)
        if found is None or found.shape != tensor.shape:
            has = "no such parameter" if found is None else list(found.shape)
            raise AdapterError(
                f"{file} has {name} {list(tensor.shape)}, this host has {has}; put the adapters "
                "on the model that they were trained on."
            )
        found.data.copy_(tensor)
