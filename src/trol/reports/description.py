"""Descriptions of a model: as `trol info` gives it, and as the model card of a training run."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCardData
from torch import nn

from trol.checkpoints.adapter import is_trained
from trol.depth.attachment import attached, check_by_probe, cost_of, depth, is_attached
from trol.depth.policy import to_settings
from trol.depth.trace import StackCost
from trol.errors import HostError
from trol.files import write_whole
from trol.host.cache import new_cache
from trol.host.layers import FamilyNote, attention_of, family_note, find_decoder, layer_list
from trol.reports import pages
from trol.reports.training import RUN

PLAIN = "all"
"""The plan under which a model is what it was."""


def describe(model: nn.Module) -> dict[str, Any]:
    """Family, sizes, kinds of cache layers, policy, FLOPs of a visit, and what is refused and why.

    A model that cannot be attached to is described as well; `refused` then says so. JSON values.
    """
    config: Any = model.config
    description: dict[str, Any] = {
        "class": type(model).__name__,
        "family": config.get_text_config(decoder=True).model_type,
        **dict.fromkeys(("layers", "hidden_size", "attention", "cache_layers", "visit")),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "policy": to_settings(attached(model)[1].depth_policy) if is_attached(model) else None,
    }
    try:
        stack: Any = find_decoder(model)
    except HostError as error:
        return description | {"refused": {"any policy": str(error)}}
    layers = list(layer_list(stack) or ())
    description |= {
        "layers": len(layers),
        "hidden_size": stack.config.hidden_size,
        "attention": attention_of(stack.config),
    }
    try:
        description["cache_layers"] = dict(
            Counter(type(one).__name__ for one in new_cache(stack.config).layers)
        )
        with depth(model, PLAIN):
            check_by_probe(model)
            description["visit"] = _visit(cost_of(model))
            return description | {"refused": _refused(stack, family_note(stack))}
    except HostError as error:
        return description | {"refused": {"any policy": str(error)}}


def _visit(cost: StackCost) -> dict[str, Any]:
    """FLOPs of one visit of a layer, from the cheapest to the dearest; None: not known."""
    known = [layer for layer in cost.layers if layer is not None]
    if len(known) < len(cost.layers):
        return {"flops_per_token": None, "flops_per_token_and_key": None}
    return {
        "flops_per_token": sorted({layer.per_token for layer in known}),
        "flops_per_token_and_key": sorted({layer.per_key for layer in known}),
    }


def _refused(stack: Any, note: FamilyNote) -> dict[str, str]:
    """What is refused on a model that is not refused as a whole -> why."""
    recurrent = "a recurrent state has no positions to leave out, nor to take back"
    reasons = {
        "second visits": note.no_second_visit,
        "skipped_kv='hole'": note.no_holes or recurrent * stack.depth_recurrent,
        "speculation": recurrent * stack.depth_recurrent,
        "reading predictions (early exit)": stack.depth_unreadable,
        "some tokens alone": stack.depth_entangled,
    }
    return {what: why for what, why in reasons.items() if why}


def write_card(folder: str | Path) -> Path:
    """Writes the model card, `README.md`, into the folder of a run; returns its path.

    Where the card fails, that is a warning, and the path is that of `training.json`.

    Raises:
        DataError: there is no `training.json`, or it is no training run's.
    """
    folder = Path(folder)
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text(encoding="utf-8"))
    run, file = RUN.read(folder / RUN.file), folder / RUN.file
    with pages.warning_if_it_fails(file):
        card = render_card(run, recipe, folder.name, adapters=is_trained(folder))
        return write_whole(folder / "README.md", card)
    return file


def render_card(
    run: Mapping[str, Any], recipe: Mapping[str, Any], name: str, *, adapters: bool = False
) -> str:
    """The card: what the model is, how to open it, how it was trained, what it scores.

    `adapters`: whether the folder holds adapters for a host, and no whole model.
    """
    data = ModelCardData(
        library_name="transformers",
        base_model=recipe.get("host") or None,
        tags=["trol", str(recipe["policy"].get("policy", "trol_mixer"))],
    )
    values = {"run": run, "recipe": recipe, "name": name, "quoted": repr(name)}
    return pages.render("card.md", metadata=data.to_yaml(), adapters=adapters, **values)
