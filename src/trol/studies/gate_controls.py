"""Weights of second visits that no token decides: the controls of TroL's gate (its Table 4(d))."""

from dataclasses import KW_ONLY, dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from trol.depth import Answer, Bounds, Scope, Visit, register
from trol.errors import UsageError
from trol.policies.base import DataclassPolicy, PolicyModule


@register
@dataclass(eq=False, repr=False)
class RandomWeights(DataclassPolicy):
    """out = (1 - g) L(x) + g L(L(x)) with g drawn anew for each token from [0, 1]."""

    name = "random_weights"

    _: KW_ONLY
    scope: Scope = "question"
    training_scope: Scope = "all"

    def bounds(self, layer: int) -> Bounds:
        return Bounds(2, 2)

    def again(self, visit: Visit) -> Answer:
        state = visit.state
        if visit.number == 0:
            return 1.0
        return torch.rand(state.shape[:2], device=state.device)


@register
@dataclass(eq=False, repr=False)
class ConstantWeights(DataclassPolicy):
    """out = (1 - g) L(x) + g L(L(x)) with one g for all tokens and layers, which is given.

    Raises:
        UsageError: the weight is not in [0, 1].
    """

    name = "constant_weights"

    weight: float
    _: KW_ONLY
    scope: Scope = "question"
    training_scope: Scope = "all"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.weight <= 1:
            raise UsageError(f"weight is {self.weight}; give a number in [0, 1].")

    def bounds(self, layer: int) -> Bounds:
        return Bounds(2, 2)

    def again(self, visit: Visit) -> Answer:
        return 1.0 if visit.number == 0 else self.weight


class Weight(PolicyModule):
    """g = sigmoid(b), one number for all tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(1))

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.bias)

    def forward(self, state: Tensor) -> Tensor:
        """The number at each token. Shape: [B, T, D] -> [B, T]."""
        return torch.sigmoid(self.bias.float()).expand(state.shape[:2])


@register
@dataclass(eq=False, repr=False)
class LearnedWeights(DataclassPolicy):
    """out = (1 - g) L(x) + g L(L(x)) with one learned g for each layer, or one for all."""

    name = "learned_weights"

    sharing: Literal["per_layer", "shared"] = "per_layer"
    _: KW_ONLY
    scope: Scope = "question"
    training_scope: Scope = "all"

    @property
    def tied(self) -> bool:
        return self.sharing == "shared"

    def gate(self, layer: int, width: int) -> nn.Module:
        return Weight()

    def bounds(self, layer: int) -> Bounds:
        return Bounds(2, 2)

    def again(self, visit: Visit) -> Answer:
        if visit.number == 0:
            return 1.0
        assert visit.gate is not None
        return visit.gate(visit.state)
