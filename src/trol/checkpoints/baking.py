"""A plain transformers model of a plan's layers, checked against the plan.

It has one layer for each visit: a layer of n visits becomes n copies, a skipped one is gone. Its
weights are the model's own under other names, its configuration is cut to match. That both together
compute what the plan computes is checked, not assumed.

A transformers configuration for other layers than its own: fewer, or some of them twice.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from trol.depth import Plan, depth
from trol.errors import HostError, UsageError
from trol.host.layers import attention_of, find_decoder, layer_list, with_attention
from trol.policies.planned import Planned

INDEX_LISTS = (
    "attn_layer_indices",
    "cross_attention_layers",
    "full_attn_idxs",
    "mlp_only_layers",
    "moe_layers",
)
"""Entries that list the numbers of the layers of one kind."""

FIRSTS = ("first_k_dense_replace", "max_window_layers")
"""Entries that say how many of the first layers are of one kind."""

PER_LAYER = ("layer", "_types")
"""What the names of entries contain that have one value for each layer."""


def cut_config(config: Any, kept: Sequence[int]) -> Any:
    """A copy of a model's configuration whose decoder has the layers `kept`, in this order.

    What has one value for each layer, lists layer numbers or counts the first layers of a kind is
    cut to match. Rules by which a family derives a layer's kind from its number stay as they are:
    `trol.checkpoints.export` finds where they then say something else.
    """
    text = config.get_text_config(decoder=True)
    cut = with_attention(type(text).from_dict(_cut(text, kept)), attention_of(text))
    return _replaced(config, text, cut)


def _cut(text: PreTrainedConfig, kept: Sequence[int]) -> dict[str, Any]:
    layers = text.num_hidden_layers
    entries = text.to_dict()
    for name, value in entries.items():
        if name in INDEX_LISTS and value is not None:
            entries[name] = [new for new, old in enumerate(kept) if old in value]
        elif name in FIRSTS and value is not None:
            entries[name] = sum(old < value for old in kept)
        elif isinstance(value, (list, tuple)) and _is_per_layer(name, value, layers):
            entries[name] = [value[old] for old in kept]
    count = text.attribute_map.get("num_hidden_layers", "num_hidden_layers")
    return entries | {count: len(kept)}


def _is_per_layer(name: str, value: Sequence[Any], layers: int) -> bool:
    return len(value) == layers and any(part in name for part in PER_LAYER)


def _replaced(config: Any, old: Any, new: Any) -> Any:
    """A copy of `config` in which `new` stands where `old` stood."""
    if config is old:
        return new
    made = copy.deepcopy(config)
    for name in config.sub_configs:
        inner = getattr(config, name)
        if isinstance(inner, PreTrainedConfig):
            setattr(made, name, _replaced(inner, old, new))
    return made


TOLERANCE = 8
"""Largest difference of logits, in units of the type's epsilon times the largest logit."""

NO_SETTINGS = ("layer_idx", "layer_id", "layer_number", "training", "gradient_checkpointing")
"""Attributes of modules that may change: their layer's number, and how they are run."""


def bake(
    model: Any, plan: Plan, samples: Sequence[Mapping[str, Tensor]]
) -> tuple[PreTrainedModel, float]:
    """A plain model of the plan's layers, and how far its logits lie from the plan's on `samples`.

    Its weights are the tensors of `model`; only where a layer comes again they are copies.

    Args:
        model: a plain transformers model, in evaluation mode.
        plan: visits of each layer.
        samples: inputs on which both are compared; with pictures where the model sees.

    Raises:
        HostError: weights, settings of layers or outputs would differ.
        UsageError: the plan names a layer that there is not, or none at all.
    """
    path, layers = layers_of(model)
    kept = visited(plan, len(layers))
    _check_deepstack(model, kept)
    made: Any = _built(model, _renamed(model.state_dict(), path, kept), kept)
    _check_settings(layers, layers_of(made)[1], kept, model.config.model_type)
    return made, max(_compared(model, made, plan, sample) for sample in samples)


def visited(plan: Plan, layers: int) -> list[int]:
    """The layers that a token visits, in order, each as often as it is visited.

    Raises:
        UsageError: the plan visits none, or names a layer that there is not.
    """
    kept = [layer for layer, n in enumerate(plan.for_layers(layers)) for _ in range(n)]
    if not kept:
        raise UsageError(f"plan '{plan}' visits no layer; a checkpoint needs at least one.")
    return kept


def layers_of(model: Any) -> tuple[str, nn.ModuleList]:
    """The list of decoder layers, and the name under which the model holds it."""
    layers = layer_list(find_decoder(model))
    assert layers is not None  # or find_decoder had raised
    return next(name for name, module in model.named_modules() if module is layers), layers


def _renamed(weights: dict[str, Tensor], path: str, kept: Sequence[int]) -> dict[str, Tensor]:
    """The weights of the layers `kept` under their new numbers, all others as they are."""
    meta = [name for name, weight in weights.items() if weight.is_meta]
    if meta:
        raise HostError(f"weight {meta[0]} is not in memory; open the model without offloading.")
    made = {name: weight for name, weight in weights.items() if not name.startswith(f"{path}.")}
    for new, old in enumerate(kept):
        start = f"{path}.{old}."
        again = old in kept[:new]  # saving would drop all but one of tensors that are one
        for name, weight in weights.items():
            if name.startswith(start):
                renamed = f"{path}.{new}.{name.removeprefix(start)}"
                made[renamed] = weight.clone() if again else weight
    return made


def _built(model: Any, weights: dict[str, Tensor], kept: Sequence[int]) -> Any:
    try:
        config = cut_config(model.config, kept)
    except StrictDataclassError as error:
        raise HostError(
            f"{model.config.model_type} has no configuration for the plan's layers alone: {error}"
        ) from error
    made, found = type(model).from_pretrained(
        None,
        config=config,
        state_dict=weights,
        dtype=model.dtype,
        ignore_mismatched_sizes=True,
        output_loading_info=True,
    )
    wrong = {what: sorted(map(str, names)) for what, names in found.items() if names}
    if wrong:
        told = "; ".join(f"{what.replace('_', ' ')}: {names[0]}" for what, names in wrong.items())
        raise HostError(
            f"{config.model_type} decides by a layer's number what it is made of, and the plan "
            f"gives layers other numbers ({told}); keep layers so that every kind stays at its "
            "number."
        )
    made.generation_config = copy.deepcopy(model.generation_config)
    return made.to(model.device).eval()


def _check_deepstack(model: Any, kept: Sequence[int]) -> None:
    """Raises `HostError` where the first layers add what a vision tower gives to each of them."""
    vision = getattr(model.config, "vision_config", None)
    fed = len(getattr(vision, "deepstack_visual_indexes", None) or ())
    if list(kept[:fed]) != list(range(fed)):
        raise HostError(
            f"{model.config.model_type} adds features of its vision tower after each of its first "
            f"{fed} layers (deepstack), by number; visit layers 0-{fed - 1} once in the plan."
        )


def _check_settings(
    before: nn.ModuleList, after: nn.ModuleList, kept: Sequence[int], family: str
) -> None:
    """Raises `HostError` where a layer's settings depend on its number."""
    for new, old in enumerate(kept):
        wanted, got = _settings(before[old]), _settings(after[new])
        for name in sorted(wanted.keys() | got.keys()):
            if wanted.get(name) != got.get(name):
                raise HostError(
                    f"{family} sets {name} by the layer's number: {wanted.get(name)} in layer "
                    f"{old}, {got.get(name)} where the checkpoint has it as layer {new}; keep "
                    "layers so that every kind stays at its number."
                )


def _settings(layer: nn.Module) -> dict[str, Any]:
    """Numbers, words and flags of a layer's modules, the layer's own number left out."""
    return {
        f"{path}.{name}".lstrip("."): value
        for path, module in layer.named_modules()
        for name, value in vars(module).items()
        if isinstance(value, (bool, int, float, str))
        and name not in NO_SETTINGS
        and not name.startswith("_")
    } | {path: type(module).__name__ for path, module in layer.named_modules()}


@torch.no_grad()
def _compared(model: Any, made: Any, plan: Plan, sample: Mapping[str, Tensor]) -> float:
    """Largest absolute difference of the logits; raises `HostError` where it is too large."""
    with depth(model, Planned(plan, scope="all")):
        wanted = model(**sample).logits.float()
    try:
        got = made(**sample).logits.float()
    except ValueError as error:  # a cache needs an attention layer, say
        raise HostError(
            f"{model.config.model_type} does not run with the plan's layers alone: {error}"
        ) from error
    difference = (wanted - got).abs().max().item()
    allowed = TOLERANCE * torch.finfo(model.dtype).eps * wanted.abs().max().item()
    if not difference <= allowed:  # NaN as well
        raise HostError(
            f"a {model.config.model_type} of the plan's layers alone does not compute what the "
            f"plan does (logits differ by {difference:.2g}): its stack does something by layer "
            "number; run the plan with trol instead."
        )
    return difference
