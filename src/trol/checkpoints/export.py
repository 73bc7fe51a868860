"""Exporting a plan: a plain transformers checkpoint of its layers, which opens without trol.

The checkpoint has one layer for each visit: a layer of n visits becomes n copies, a skipped one is
gone. Its weights are the model's own under other names, its configuration is cut to match. That
both compute what the plan computes is checked on samples before anything is written.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from PIL import Image
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, ProcessorMixin

from trol.checkpoints.adapter import check_writable
from trol.depth import Plan, attached, depth, detach, is_attached
from trol.errors import HostError, UsageError, unwritable
from trol.files import whole_folder
from trol.host.layers import attention_of, find_decoder, layer_list, with_attention
from trol.host.weights import forget_quantisation, is_quantised
from trol.policies.planned import Planned

CHECKED_TOKENS = 24
"""Length of the random rows on which the baked model is compared with the plan."""

TOLERANCE = 8
"""Largest difference of logits, in units of the type's epsilon times the largest logit."""

INDEX_LISTS = (
    "attn_layer_indices",
    "cross_attention_layers",
    "full_attn_idxs",
    "mlp_only_layers",
    "moe_layers",
)
"""Configuration entries that list the numbers of the layers of one kind."""

FIRSTS = ("first_k_dense_replace", "max_window_layers")
"""Configuration entries that say how many of the first layers are of one kind."""

PER_LAYER = ("layer", "_types")
"""What the names of configuration entries with one value for each layer contain."""

NO_SETTINGS = ("layer_idx", "layer_id", "layer_number", "training", "gradient_checkpointing")
"""Attributes of modules that may change: their layer's number, and how they are run."""


@dataclass(frozen=True)
class Exported:
    """What `export` wrote."""

    destination: str
    layers: int
    """Layers of the model that the plan was made for."""
    kept: list[int]
    """Which of them each layer of the checkpoint is."""
    parameters: int
    difference: float
    """Largest absolute difference of its logits to the plan's, on the inputs compared."""


def export(
    model: Any, processor: Any, plan: Plan, destination: str | Path, *, seed: int = 0
) -> Exported:
    """Writes `plan` baked into `model` as a plain checkpoint, the processor's files beside it.

    The checkpoint applies the plan to every token (scope `all`), whether question or answer.

    Raises:
        HostError: the family cannot be baked; the message says what would differ.
        UsageError: the plan does not fit, or the destination exists and is not empty, or cannot be
            made.
    """
    place = Path(destination)
    check_destination(place)
    plain = plain_host(model)
    samples = [random_rows(plain, seed)]
    if isinstance(processor, ProcessorMixin):
        samples.append(picture_row(plain, processor, seed))
    baked, difference = bake(plain, plan, samples)
    try:
        with whole_folder(place) as folder:
            baked.save_pretrained(folder)
            processor.save_pretrained(folder)
    except OSError as error:
        raise unwritable(place, error) from error
    layers = len(_layers_of(plain)[1])
    count = sum(parameter.numel() for parameter in baked.parameters())
    return Exported(str(place), layers, _visited(plan, layers), count, difference)


def plain_host(model: Any) -> PreTrainedModel:
    """The model without its policy, if that is nothing but a plan.

    Raises:
        HostError: the model carries trained parameters of a policy, adapters or quantised weights.
    """
    if getattr(model, "depth_in_config", False):
        raise HostError(
            f"a {type(model).__name__} needs trol to open, whatever its layers; export the host "
            "that it was made of, or run the plan with trol (--depth)."
        )
    check_policy(model)
    if is_attached(model):
        detach(model)
    if not isinstance(model, PreTrainedModel):
        raise HostError(
            f"{type(model).__name__} is no plain transformers model; merge its adapters into it "
            "first (merge_and_unload)."
        )
    if is_quantised(model):
        raise HostError("the weights are quantised; open the model with its full weights.")
    forget_quantisation(model)
    return model


def check_policy(model: Any) -> None:
    """Raises `HostError` where a model carries a policy that cannot be baked."""
    name = attached(model)[1].depth_policy.name if is_attached(model) else "plain"
    if name not in ("plain", "plan"):
        raise HostError(
            f"this model carries the policy '{name}', which decides while running and cannot be "
            "baked into fewer layers; export the host it was attached to."
        )


def check_destination(destination: str | Path) -> None:
    """Raises `UsageError` where a folder is not empty, or nothing can be written."""
    place = Path(destination)
    if place.exists() and (not place.is_dir() or any(place.iterdir())):
        raise UsageError(f"{place} exists and is not empty; name a folder that is not there yet.")
    check_writable(place)


def random_rows(model: Any, seed: int) -> dict[str, Tensor]:
    """Two rows of random text ids, none of which marks a picture. Shape: [2, T]."""
    text = model.config.get_text_config(decoder=True)
    marks = {
        value
        for name, value in model.config.to_dict().items()
        if name.endswith(("token_id", "token_index")) and isinstance(value, int)
    }
    words = torch.tensor([token for token in range(text.vocab_size) if token not in marks])
    most = getattr(text, "max_position_embeddings", None) or CHECKED_TOKENS
    source = torch.Generator().manual_seed(seed)
    chosen = torch.randint(len(words), (2, min(CHECKED_TOKENS, most)), generator=source)
    ids = words[chosen].to(model.device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def picture_row(model: Any, processor: Any, seed: int) -> dict[str, Tensor]:
    """One row that asks about a random picture, through the processor's chat template."""
    source = torch.Generator().manual_seed(seed)
    pixels = torch.randint(256, (64, 64, 3), generator=source, dtype=torch.uint8)
    picture = Image.fromarray(pixels.numpy())
    parts = [{"type": "image", "image": picture}, {"type": "text", "text": "What is this?"}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": parts}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    return dict(inputs.to(model.device))


def bake(
    model: Any, plan: Plan, samples: Sequence[Mapping[str, Tensor]]
) -> tuple[PreTrainedModel, float]:
    """A plain model of the plan's layers, and how far its logits lie from the plan's on `samples`.

    Its weights are the tensors of `model`; copies only where a layer comes again.

    Args:
        model: a plain transformers model, in evaluation mode.
        plan: visits of each layer.
        samples: inputs on which both are compared; some with pictures if the model takes them.

    Raises:
        HostError: weights, settings of layers or outputs would differ.
        UsageError: the plan names a layer that the model lacks, or visits none.
    """
    path, layers = _layers_of(model)
    kept = _visited(plan, len(layers))
    _check_deepstack(model, kept)
    baked: Any = _built(model, _renamed(model.state_dict(), path, kept), kept)
    _check_settings(layers, _layers_of(baked)[1], kept, model.config.model_type)
    return baked, max(_compared(model, baked, plan, sample) for sample in samples)


def _visited(plan: Plan, layers: int) -> list[int]:
    """The layers that a token visits, in order, each as often as it is visited."""
    kept = [layer for layer, n in enumerate(plan.for_layers(layers)) for _ in range(n)]
    if not kept:
        raise UsageError(f"plan '{plan}' visits no layer; a checkpoint needs at least one.")
    return kept


def _layers_of(model: Any) -> tuple[str, nn.ModuleList]:
    """The list of decoder layers, and the name under which the model holds it."""
    layers = layer_list(find_decoder(model))
    assert layers is not None  # or find_decoder had raised
    return next(name for name, module in model.named_modules() if module is layers), layers


def cut_config(config: Any, kept: Sequence[int]) -> Any:
    """A copy of a model's configuration whose decoder has the layers `kept`, in this order.

    Entries that have one value for each layer, list layer numbers or count the first layers of a
    kind are cut to match. Rules by which a family derives a layer's kind from its number stay as
    they are: `bake` finds where they then say something else.
    """
    text = config.get_text_config(decoder=True)
    layers, entries = text.num_hidden_layers, text.to_dict()
    for name, value in entries.items():
        per_layer = any(part in name for part in PER_LAYER)
        if name in INDEX_LISTS and value is not None:
            entries[name] = [new for new, old in enumerate(kept) if old in value]
        elif name in FIRSTS and value is not None:
            entries[name] = sum(old < value for old in kept)
        elif per_layer and isinstance(value, (list, tuple)) and len(value) == layers:
            entries[name] = [value[old] for old in kept]
    count = text.attribute_map.get("num_hidden_layers", "num_hidden_layers")
    cut = type(text).from_dict(entries | {count: len(kept)})
    return _replaced(config, text, with_attention(cut, attention_of(text)))


def _replaced(config: Any, old: Any, new: Any) -> Any:
    """A copy of `config` with `new` in the place of `old`, itself or a part of it."""
    if config is old:
        return new
    whole = copy.deepcopy(config)
    for name in config.sub_configs:
        inner = getattr(config, name)
        if isinstance(inner, PreTrainedConfig):
            setattr(whole, name, _replaced(inner, old, new))
    return whole


def _renamed(weights: dict[str, Tensor], path: str, kept: Sequence[int]) -> dict[str, Tensor]:
    """The weights of the layers `kept` under their new numbers, all others as they are."""
    meta = [name for name, weight in weights.items() if weight.is_meta]
    if meta:
        raise HostError(f"weight {meta[0]} is not in memory; open the model without offloading.")
    renamed = {name: weight for name, weight in weights.items() if not name.startswith(f"{path}.")}
    for new, old in enumerate(kept):
        start = f"{path}.{old}."
        again = old in kept[:new]  # saving would drop all but one of tensors that are one
        for name, weight in weights.items():
            if name.startswith(start):
                new_name = f"{path}.{new}.{name.removeprefix(start)}"
                renamed[new_name] = weight.clone() if again else weight
    return renamed


def _built(model: Any, weights: dict[str, Tensor], kept: Sequence[int]) -> Any:
    try:
        config = cut_config(model.config, kept)
    except StrictDataclassError as error:
        raise HostError(
            f"{model.config.model_type} has no configuration for the plan's layers alone: {error}"
        ) from error
    baked, problems = type(model).from_pretrained(
        None,
        config=config,
        state_dict=weights,
        dtype=model.dtype,
        ignore_mismatched_sizes=True,
        output_loading_info=True,
    )
    wrong = {what: sorted(map(str, names)) for what, names in problems.items() if names}
    if wrong:
        details = "; ".join(f"{what.replace('_', ' ')}: {some[0]}" for what, some in wrong.items())
        raise HostError(
            f"{config.model_type} decides by a layer's number what it is made of, and the plan "
            f"gives layers other numbers ({details}); keep layers so that every kind stays at its "
            "number."
        )
    baked.generation_config = copy.deepcopy(model.generation_config)
    return baked.to(model.device).eval()


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
        own, baked = _settings(before[old]), _settings(after[new])
        for name in sorted(own.keys() | baked.keys()):
            if own.get(name) != baked.get(name):
                raise HostError(
                    f"{family} sets {name} by the layer's number: {own.get(name)} in layer "
                    f"{old}, {baked.get(name)} where the checkpoint has it as layer {new}; keep "
                    "layers so that every kind stays at its number."
                )


def _settings(layer: nn.Module) -> dict[str, Any]:
    """Classes, numbers, words and flags of a layer's modules, the layer's own number left out."""
    settings: dict[str, Any] = {}
    for path, module in layer.named_modules():
        settings[path] = type(module).__name__
        for name, value in vars(module).items():
            hidden = name in NO_SETTINGS or name.startswith("_")
            if isinstance(value, (bool, int, float, str)) and not hidden:
                settings[f"{path}.{name}".lstrip(".")] = value
    return settings


@torch.no_grad()
def _compared(model: Any, baked: Any, plan: Plan, sample: Mapping[str, Tensor]) -> float:
    """Largest absolute difference of the logits; raises `HostError` where it is too large."""
    with depth(model, Planned(plan, scope="all")):
        expected = model(**sample).logits.float()
    try:
        logits = baked(**sample).logits.float()
    except ValueError as error:  # a cache needs an attention layer, say
        raise HostError(
            f"{model.config.model_type} does not run with the plan's layers alone: {error}"
        ) from error
    difference = (expected - logits).abs().max().item()
    allowed = TOLERANCE * torch.finfo(model.dtype).eps * expected.abs().max().item()
    if not difference <= allowed:  # NaN as well
        raise HostError(
            f"a {model.config.model_type} of the plan's layers alone does not compute what the "
            f"plan does (logits differ by {difference:.2g}): its stack does something by layer "
            "number; run the plan with trol instead."
        )
    return difference
