"""The learner of a stage: a model with low-rank updates (LoRA), and the folder it is saved as.

adapter_config.json, adapter_model.safetensors   low-rank updates, as PEFT writes them
again/                                           those of second visits alone, if there are any
depth_config.json, depth.safetensors             the policy and its gates, as trol.save
parts.safetensors                                the projector, and other parts that learnt
"""

import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from trol.checkpoints import adapter
from trol.depth import attach, attached, detach, is_attached
from trol.depth.policy import Plain
from trol.depth.stack import LayerMixin
from trol.errors import AdapterError, HostError, UsageError, unknown
from trol.host.classes import Specialised, lora_b_maps, restore, specialise
from trol.host.layers import LINEAR, find_decoder, layer_list
from trol.host.torch_internals import CompileableContextVar
from trol.host.weights import is_quantised
from trol.training.recipe import Recipe, Stage
from trol.training.trainable import (
    freeze_unvisited,
    let_gradients_through,
    part_of,
    restore_dtypes,
    set_trainable,
)

ADAPTER = "default"
"""What PEFT calls the updates of all visits."""

WITHOUT_UPDATE = ("depth", "image_down", "image_up")
"""Modules inside layers that get no update: gates, and updates themselves."""

AGAIN = "again"
"""What PEFT calls the updates of second and later visits."""

# Not on the model: each thread counts its own visits, and checkpointing counts them once more.
_VISIT = CompileableContextVar("trol_visit")


class LayerCall(Specialised):
    """Class before the traversing layer: starts the count of visits anew in each call."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The layer's output. Shape: [B, T, D]."""
        token = _VISIT.set(0)
        try:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        finally:
            _VISIT.reset(token)


class LayerVisit(Specialised):
    """Class between the traversing layer and the host's own: counts each visit."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """One visit. Shape: [B, T, D]."""
        _VISIT.set((_VISIT.get() or 0) + 1)
        return super().forward(*args, **kwargs)  # type: ignore[misc]


class UpdateAgain(Specialised):
    """B of an update that is zero in the first visit: m B A x with m = [visit > 1]."""

    out_features: int

    def forward(self, state: Tensor) -> Tensor:
        """Shape: [B, T, rank] -> [B, T, out]."""
        if (_VISIT.get() or 0) > 1:
            return super().forward(state)  # type: ignore[misc]
        return state.new_zeros(*state.shape[:-1], self.out_features)


def only_again(learner: nn.Module) -> None:
    """Makes the updates named `AGAIN` run in second and later visits only, in place."""
    _, stack = attached(learner)
    layers: Any = layer_list(stack)
    for layer in layers:
        restore(layer)
        specialise(layer, LayerCall, LayerMixin, LayerVisit)
    for update in lora_b_maps(learner, AGAIN):
        specialise(update, UpdateAgain)


def low_rank(
    model: Any,
    rank: int,
    alpha: int = 0,
    *,
    per_visit: bool = False,
    targets: Collection[str] = (),
) -> Any:
    """The model with updates of rank `rank` on linear maps of its decoder's layers.

        W x + (alpha / rank) B A x          and in visits r > 1, with `per_visit`,
        W x + (alpha / rank) (B A + B' A') x

    TroL, section 4(c): rank and alpha are 64 (`alpha` 0 stands for the rank). The policy's own
    parameters get no update: they learn whole, as the projector does. Updates that the model
    carries already go on learning.

    Args:
        model: the host, its policy attached.
        rank: of each update.
        alpha: scales updates by alpha / rank.
        per_visit: whether second visits have an update of their own.
        targets: which maps, by the end of their names (`v_proj`, `3.mlp.down_proj`); all if none.

    Raises:
        HostError: the decoder has no linear map that can be updated.
        UsageError: it has none of a target's name, or carries updates of another form.
    """
    config = LoraConfig(r=rank, lora_alpha=alpha or rank)
    config.target_modules, config.fan_in_fan_out = _targets(model, targets)
    if isinstance(model, PeftModel):
        _check_same(model, config, per_visit=per_visit)
        return model
    try:
        learner: Any = get_peft_model(model, config)
    except ValueError as error:  # a kind of linear map that PEFT does not know
        raise HostError(f"{type(model).__name__} takes no low-rank updates: {error}") from error
    if per_visit:
        learner.add_adapter(AGAIN, config)
        learner.base_model.set_adapter([ADAPTER, AGAIN])
        only_again(learner)
    return learner


def has_visit_updates(learner: PeftModel) -> bool:
    """Whether second visits have an update of their own."""
    return AGAIN in learner.peft_config


def merged(learner: Any) -> Any:
    """The model with its updates added to its matrices: W + (alpha / rank) B A.

    Raises:
        HostError: the matrices are quantised, or differ from visit to visit.
    """
    if is_quantised(learner):
        raise HostError(
            "updates are not merged into quantised weights, which would round them away; open "
            "the host with its full weights (bits=0), the adapter on it, and merge there."
        )
    if has_visit_updates(learner):
        raise HostError(
            "second visits have an update of their own, so there is no one matrix to merge into; "
            "keep the adapter, or train without per_visit."
        )
    return learner.merge_and_unload()


def linear_maps(model: Any) -> dict[str, nn.Module]:
    """The linear maps that updates can be put on, by their names in the list of layers.

    `3.self_attn.v_proj` is one of layer 3; it keeps its name when it carries an update.
    """
    layers = layer_list(find_decoder(model)) or nn.ModuleList()
    return {
        name.removesuffix(".base_layer"): module
        for name, module in layers.named_modules()
        if isinstance(module, LINEAR)
        and not set(name.split(".")) & set(WITHOUT_UPDATE)
        and "lora_" not in name
    }


def _targets(model: Any, only: Collection[str]) -> tuple[str, bool]:
    """A regular expression for the linear maps inside layers; whether they are transposed."""
    host = model.get_base_model() if isinstance(model, PeftModel) else model
    layers = layer_list(find_decoder(host))
    prefix = next(name for name, module in host.named_modules() if module is layers)
    maps = linear_maps(host)
    if not maps:
        raise HostError(
            f"the layers of {type(host).__name__} have no linear map that low-rank updates can "
            "be put on; train with lora=0."
        )
    kinds = sorted({name.partition(".")[2] for name in maps})
    pattern = rf"\d+\.(?:{'|'.join(map(re.escape, kinds))})"
    if only:
        ends = {*kinds, *(kind.rpartition(".")[2] for kind in kinds)}
        for end in only:
            if not any(_ends(name, end) for name in maps):
                raise unknown("target of low-rank updates", end, ends)
        maps = {n: m for n, m in maps.items() if any(_ends(n, end) for end in only)}
        pattern = rf"(?:{'|'.join(map(re.escape, maps))})"
    transposed = not any(isinstance(module, nn.Linear) for module in maps.values())
    return rf"{re.escape(prefix)}\.{pattern}", transposed


def _ends(name: str, end: str) -> bool:
    """Whether a dotted name is `end`, or ends in it behind a dot."""
    return f".{name}".endswith(f".{end}")


def _check_same(learner: PeftModel, wanted: LoraConfig, *, per_visit: bool) -> None:
    config: Any = learner.peft_config[ADAPTER]
    again = has_visit_updates(learner)
    has, wants = (
        {"lora": one.r, "lora_alpha": one.lora_alpha, "per_visit": own, "maps": one.target_modules}
        for one, own in ((config, again), (wanted, per_visit))
    )
    if differing := [key for key in has if has[key] != wants[key]]:
        has, wants = ({key: one[key] for key in differing} for one in (has, wants))
        raise UsageError(
            f"the model carries low-rank updates with {has}, the stage wants {wants}; give the "
            "stage the same settings, or merge the updates first."
        )


def learner_of(model: Any, stage: Stage) -> Any:
    """The model, ready for this stage: its parts free to learn, its low-rank updates in place.

    Raises:
        HostError: the model lacks a part that is to learn, or its weights cannot.
        UsageError: it carries low-rank updates of another form.
    """
    learner = model
    if stage.lora:
        form = {"per_visit": stage.per_visit, "targets": stage.lora_targets}
        learner = low_rank(model, stage.lora, stage.lora_alpha, **form)
    let_gradients_through(learner)
    set_trainable(learner, stage.train, low_rank=isinstance(learner, PeftModel))
    if stage.traverse:
        freeze_unvisited(learner)
    return learner


def finished(learner: Any, stage: Stage) -> Any:
    """The model after the stage, all of it free to learn again.

    Low-rank updates are merged, unless the stage says otherwise or they cannot be: then the PEFT
    model itself is given back, which the next stage goes on with and `save_trained` saves.
    """
    restore_dtypes(learner, stage.train)
    updated = isinstance(learner, PeftModel)
    if updated and stage.merge and not is_quantised(learner) and not has_visit_updates(learner):
        learner = merged(learner)
        restore_dtypes(learner, stage.train)
    return learner.eval()


def save_trained(model: Any, recipe: Recipe, folder: Path) -> None:
    """Saves a model after `finished`: adapters where updates cannot be merged, else all weights.

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
    """Whether a host carries the plain policy, which any other may replace: it has no weights.

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
    wanted = {"projector", *parts} - {"mixers", "decoder"}
    parameters = attached(learner)[0].named_parameters()
    weights = {n: p.detach().contiguous() for n, p in parameters if part_of(n) in wanted}
    save_file(weights, folder / adapter.PARTS_NAME)
    return folder


def open_adapters(model: Any, folder: str | Path) -> Any:
    """Puts a saved folder on the host that it was trained on, free to learn on.

    A policy that the model carries gives way to the saved one. Returns the learner: the model
    itself, in a PEFT model where there are low-rank updates.

    Raises:
        AdapterError: the folder is no such folder, is damaged, or belongs to another host.
    """
    folder = Path(folder)
    if not adapter.is_trained(folder):
        raise AdapterError(
            f"{folder} holds no trained adapters ({adapter.CONFIG_NAME} and "
            f"{adapter.PARTS_NAME}); give the folder of a run whose updates were not merged."
        )
    if is_attached(model):
        detach(model)
    adapter.load(model, folder)
    _fill(model, folder / adapter.PARTS_NAME)
    if not (folder / "adapter_config.json").is_file():
        return model
    try:
        learner: Any = PeftModel.from_pretrained(model, str(folder), ADAPTER, is_trainable=True)
        if (folder / AGAIN).is_dir():
            learner.load_adapter(str(folder / AGAIN), AGAIN, is_trainable=True)
            learner.base_model.set_adapter([ADAPTER, AGAIN])
            only_again(learner)
    except (ValueError, RuntimeError, KeyError, OSError, SafetensorError) as error:
        raise AdapterError(
            f"the low-rank updates in {folder} cannot be put on {type(model).__name__}: {error}"
        ) from error
    let_gradients_through(learner)
    return learner


def _fill(model: Any, file: Path) -> None:
    try:
        weights = load_file(file)
    except (ValueError, SafetensorError) as error:
        raise AdapterError(f"{file} is damaged: {error}; save it again.") from error
    parameters = dict(model.named_parameters())
    for name, tensor in weights.items():
        parameter = parameters.get(name)
        if parameter is None or parameter.shape != tensor.shape:
            has = "no such parameter" if parameter is None else list(parameter.shape)
            raise AdapterError(
                f"{file} has {name} {list(tensor.shape)}, this host has {has}; put the adapters "
                "on the model that they were trained on."
            )
        parameter.data.copy_(tensor)
