"""Which parameters of a model learn in a stage: its parts, and what quantised weights allow."""

import re
from collections import Counter
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig

from trol.depth import attached
from trol.errors import HostError
from trol.family.memory import quantised
from trol.host.layers import find_decoder, layer_list
from trol.host.weights import four_bit_maps, keep_differentiable

PART_MODULES: dict[str, tuple[str, ...]] = {
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

NOT_DECODER = tuple(name for part in ("projector", "vision") for name in PART_MODULES[part])
"""Names of all modules that hold a projector or a vision tower."""


def part_of(name: str) -> str:
    """The part that a parameter of this name belongs to."""
    for part, modules in PART_MODULES.items():
        if any(f".{module}." in f".{name}" for module in modules):
            return part
    return "decoder"


def set_trainable(model: nn.Module, parts: tuple[str, ...], *, low_rank: bool = False) -> None:
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


def units_of(learner: nn.Module, reader: nn.Module) -> list[nn.Module]:
    """The decoder's layers, as far as they are in `reader`: what FSDP gathers one at a time."""
    inside = {id(module) for module in reader.modules()}
    return [one for one in layer_list(attached(learner)[1]) or () if id(one) in inside]


def restore_dtypes(model: Any, parts: tuple[str, ...]) -> None:
    """Undoes `set_trainable`: all may learn, and these parts have the model's own type again.

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
            "family whose parts have such names, or add its name to PART_MODULES."
        )


def _check_parts(model: nn.Module, parts: tuple[str, ...]) -> None:
    counts = Counter(part_of(name) for name, _ in model.named_parameters())
    missing = [part for part in parts if part not in counts]
    if missing:
        listed = ", ".join(f"{part} ({count} parameters)" for part, count in counts.items())
        raise HostError(
            f"{type(model).__name__} has no {' and no '.join(missing)} to train; it has: {listed}. "
            "Take the part out of `train`, or name a model or policy that has it."
        )


def quantisation(bits: int, dtype: torch.dtype) -> BitsAndBytesConfig:
    """nf4 with double quantisation (4) or int8 (8) for the decoder of any host.

    Projector, vision tower, head and gates keep their type. Raises as `quantised`.
    """
    config = quantised(bits, compute_dtype=dtype)
    # transformers reads an entry as a regular expression for a beginning of the module's name.
    others = [rf"(?:.*\.)?{re.escape(name)}" for name in NOT_DECODER]
    config.llm_int8_skip_modules = [*(config.llm_int8_skip_modules or []), *others]
    return config


def check_quantised(model: nn.Module) -> None:
    """Raises `HostError` unless exactly the decoder has quantised weights."""
    parts = {part_of(n) for n, p in model.named_parameters() if not p.is_floating_point()}
    if parts != {"decoder"}:
        raise HostError(
            f"{type(model).__name__} was to have a quantised decoder and nothing else quantised, "
            f"but quantised are: {sorted(parts) or 'none'}; train it with bits=0."
        )


def let_gradients_through(model: nn.Module) -> None:
    """Makes 4-bit linear maps on a CPU differentiable, even after an evaluation."""
    for four_bit in four_bit_maps(model):
        keep_differentiable(four_bit)
