"""What training added to a host, as one small folder: opened again, it goes on learning.

adapter_config.json, adapter_model.safetensors   low-rank updates, as PEFT writes them
again/                                           those of second visits alone, if there are any
depth_config.json, depth.safetensors             the policy and its gates, as trol.save
parts.safetensors                                the projector, and other parts that learnt

The parts of a model, and who of them learns in a stage.

Quantised weights in training: which parts are, and gradients that pass through them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import BitsAndBytesConfig

from trol.checkpoints import adapter
from trol.depth import attach, attached, detach, is_attached
from trol.depth.policy import Plain
from trol.errors import AdapterError, HostError
from trol.family.memory import quantised
from trol.host.layers import find_decoder, layer_list
from trol.host.weights import four_bit_maps, is_quantised, keep_differentiable
from trol.training.low_rank import ADAPTER, AGAIN, merged, only_again
from trol.training.recipe import Recipe

MARKS: dict[str, tuple[str, ...]] = {
    "mixers": ("depth",),
    "projector": (
        "projector",
        "multi_modal_projector",  # LLaVA, InternVL, Gemma 3, PaliGemma, Mllama
        "connector",  # Idefics3, SmolVLM
        "visual.merger",  # Qwen-VL
        "visual.deepstack_merger_list",
        "visual.merger_list",
        "embed_vision",  # Gemma 3n, Gemma 4
        "qformer",
        "language_projection",
        "aligner",
        "mm_projector",
    ),
    "vision": ("vision_tower", "vision_model", "visual", "vision_encoder", "vision_embed_tokens"),
}
"""Part -> names of modules, of which one stands in the names of its parameters; an earlier part
goes before a later one, and whatever else there is belongs to the decoder. `mixers` are whatever
parameters the policy placed on layers: TroL's mixers, controllers, exit heads, a router; training
them alone is the frozen backbone of Glavas et al. (arXiv 2410.20022)."""

NOT_DECODER = tuple(name for part in ("projector", "vision") for name in MARKS[part])
"""Names of all modules that hold a projector or a vision tower."""


def part_of(name: str) -> str:
    """The part that a parameter of this name belongs to."""
    for part, marks in MARKS.items():
        if any(f".{mark}." in f".{name}" for mark in marks):
            return part
    return "decoder"


def let_learn(model: nn.Module, parts: tuple[str, ...], *, low_rank: bool = False) -> None:
    """Lets these parts learn and freezes the others; what learns is made float32.

    With `low_rank`, the decoder learns through its low-rank updates and nothing else of it does.

    Raises:
        HostError: the model has no such part, has one that is not known by its name, or the
            decoder's weights are quantised.
    """
    _check_parts(model, parts)
    _check_known(model)
    for name, parameter in model.named_parameters():
        part = part_of(name)
        frozen_base = low_rank and part == "decoder" and "lora_" not in name
        learns = part in parts and not frozen_base
        if learns and not parameter.is_floating_point():
            raise HostError(
                f"{name} is quantised and cannot learn; train the decoder by low-rank updates "
                "(lora=64), or open the model with its full weights (bits=0)."
            )
        parameter.requires_grad_(learns)
        if learns and parameter.dtype != torch.float32:
            # A step of 1e-4 would be rounded away in bfloat16.
            parameter.data = parameter.data.float()


def freeze_unvisited(learner: nn.Module) -> None:
    """Freezes the layers that the attached policy lets no token in scope visit.

    They learn nothing from these tokens, and the others pass as before (Glavas et al., arXiv
    2410.20022, whose early exits and skipped layers are frozen so).
    """
    _, stack = attached(learner)
    for number, layer in enumerate(layer_list(stack) or ()):
        if stack.depth_policy.skips(number):
            layer.requires_grad_(False)


def settle(model: Any, parts: tuple[str, ...]) -> None:
    """Undoes `let_learn`: what can learn may, and these parts have the model's own type again.

    Gates and low-rank updates stay float32.
    """
    dtype = getattr(model.config, "dtype", None) or torch.float32
    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point():
            continue
        parameter.requires_grad_(True)
        part = part_of(name)
        if part in parts and part != "mixers" and "lora_" not in name:
            parameter.data = parameter.data.to(dtype)


def _check_known(model: Any) -> None:
    """Raises `HostError` where something beside the decoder would be trained as if it were it."""
    if model.config.get_text_config(decoder=True) is model.config:
        return  # a text model has no other parts
    decoder = find_decoder(model)
    ends = [module for module in (decoder, model.get_output_embeddings()) if module is not None]
    inside = {id(parameter) for module in ends for parameter in module.parameters()}
    strange = [
        name
        for name, parameter in model.named_parameters()
        if part_of(name) == "decoder" and id(parameter) not in inside
    ]
    if strange:
        raise HostError(
            f"{type(model).__name__} has {strange[0]} ({len(strange)} such parameters), which is "
            "neither in its decoder nor in a projector or vision tower of a known name "
            f"({', '.join(NOT_DECODER)}), so trol cannot know whether it is to learn; train a "
            "family whose parts have such names, or add its name to MARKS."
        )


def _check_parts(model: nn.Module, parts: tuple[str, ...]) -> None:
    found = Counter(part_of(name) for name, _ in model.named_parameters())
    missing = [part for part in parts if part not in found]
    if missing:
        listed = ", ".join(f"{part} ({count} parameters)" for part, count in found.items())
        raise HostError(
            f"{type(model).__name__} has no {' and no '.join(missing)} to train; found: {listed}. "
            "Take the part out of `train`, or name a model or policy that has it."
        )


def quantisation(bits: int, dtype: torch.dtype) -> BitsAndBytesConfig:
    """nf4 with double quantisation (4) or int8 (8) for the decoder of any host.

    Projector, vision tower, head and gates keep their type. Raises as `quantised`.
    """
    made = quantised(bits, compute_dtype=dtype)
    # transformers reads an entry as a regular expression for a beginning of the module's name.
    others = [rf"(?:.*\.)?{name.replace('.', chr(92) + '.')}" for name in NOT_DECODER]
    made.llm_int8_skip_modules = [*(made.llm_int8_skip_modules or []), *others]
    return made


def check_quantised(model: nn.Module) -> None:
    """Raises `HostError` unless exactly the decoder has quantised weights."""
    parts = {part_of(n) for n, p in model.named_parameters() if not p.is_floating_point()}
    if parts != {"decoder"}:
        raise HostError(
            f"{type(model).__name__} was to have a quantised decoder and nothing else quantised, "
            f"but quantised are: {sorted(parts) or 'none'}; train it with bits=0."
        )


def let_gradients_through(model: nn.Module) -> None:
    """Makes 4-bit maps on a CPU differentiable, whatever runs before; call it before training."""
    for four_bit in four_bit_maps(model):
        keep_differentiable(four_bit)


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
