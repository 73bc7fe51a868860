"""Low-rank updates (LoRA) beside the decoder's own matrices.

Low-rank updates that only second and later visits have.
"""

from __future__ import annotations

import re
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from trol.depth import attached
from trol.depth.stack import LayerMixin
from trol.errors import HostError, UsageError
from trol.host.classes import Specialised, lora_b_maps, restore, specialise
from trol.host.layers import LINEAR, find_decoder, layer_list
from trol.host.torch_internals import CompileableContextVar
from trol.host.weights import is_quantised

AGAIN = "again"
"""What PEFT calls the updates of second and later visits."""

# Nothing of it on the model: threads have their own, and checkpointing counts once more.
_VISIT = CompileableContextVar("trol_visit")


class LayerCall(Specialised):
    """In front of a traversing layer: its visits are counted from 0 in each call."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The layer's output. Shape: [B, T, D]."""
        token = _VISIT.set(0)
        try:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        finally:
            _VISIT.reset(token)


class LayerVisit(Specialised):
    """Behind the traversing layer, in front of the host's own: it runs once for each visit."""

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


ADAPTER = "default"
"""What PEFT calls the updates of all visits."""

SPARED = ("depth", "image_down", "image_up")
"""Modules inside layers that get no update: gates, and updates themselves."""


def low_rank(model: Any, rank: int, alpha: int = 0, *, per_visit: bool = False) -> Any:
    """The model with updates of rank `rank` on every linear map of its decoder's layers.

        W x + (alpha / rank) B A x          and in visits r > 1, with `per_visit`,
        W x + (alpha / rank) (B A + B' A') x

    TroL, section 4(c): rank and alpha are 64 (`alpha` 0 stands for the rank). The policy's own
    parameters get no update: they learn whole, as the projector does. Updates that the model
    carries already go on learning.

    Raises:
        HostError: the decoder has no linear map that can be updated.
        UsageError: the model carries updates of another form.
    """
    config = LoraConfig(r=rank, lora_alpha=alpha or rank)
    if isinstance(model, PeftModel):
        _check_same(model, config, per_visit=per_visit)
        return model
    config.target_modules, config.fan_in_fan_out = _targets(model)
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


def _targets(model: Any) -> tuple[str, bool]:
    """A regular expression for the linear maps inside layers; whether they are transposed."""
    layers = layer_list(find_decoder(model))
    prefix = next(name for name, module in model.named_modules() if module is layers)
    maps = {
        name.partition(".")[2]: module
        for name, module in (layers or nn.ModuleList()).named_modules()
        if isinstance(module, LINEAR) and not set(name.split(".")) & set(SPARED)
    }
    if not maps:
        raise HostError(
            f"the layers of {type(model).__name__} have no linear map that low-rank updates can "
            "be put on; train with lora=0."
        )
    names = "|".join(re.escape(name) for name in sorted(maps))
    transposed = not any(isinstance(module, nn.Linear) for module in maps.values())
    return rf"{re.escape(prefix)}\.\d+\.(?:{names})", transposed


def _check_same(learner: PeftModel, wanted: LoraConfig, *, per_visit: bool) -> None:
    there: Any = learner.peft_config[ADAPTER]
    found = (there.r, there.lora_alpha, has_visit_updates(learner))
    asked = (wanted.r, wanted.lora_alpha, per_visit)
    if found != asked:
        names = ("lora", "lora_alpha", "per_visit")
        told = [dict(zip(names, one, strict=True)) for one in (found, asked)]
        raise UsageError(
            f"the model carries low-rank updates with {told[0]}, the stage wants {told[1]}; give "
            "the stage the same settings, or merge the updates first."
        )
