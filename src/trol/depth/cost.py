"""Cost: layer visits, FLOPs, bytes and milliseconds, predicted from shapes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from trol.host.flops import LayerCost, image_flops, layer_cost, matrix_flops, part_flops
from trol.host.parts import parts_in, token_wise_parts


@dataclass(frozen=True)
class Cost:
    """What a run took in the stack of layers (embedding and head not counted)."""

    layer_visits: int
    """Visits of real tokens, summed over layers."""
    flops: int | None
    """Multiplications and additions of the matrix products, padding included, as executed; None
    where a layer has parts whose count is not known (recurrent mixers)."""
    kv_bytes: int
    """What the cache holds at the end. Unit: bytes."""
    milliseconds: float
    """Time in the stack."""

    def json(self) -> dict[str, Any]:
        """As a JSON object."""
        return asdict(self)


@dataclass(frozen=True)
class StackCost:
    """Predicts FLOPs of a stack of layers from the visits made.

    FLOPs = sum_l visits_l * B * T * (2 P_l + 4 H d (past + T)) + gates
    """

    layers: tuple[LayerCost | None, ...]
    """None for a layer whose FLOPs are not known."""
    gate_per_token: tuple[int, ...]
    """FLOPs of the policy's own parameters on each layer, for one token."""
    token_wise: tuple[int, ...] = ()
    """FLOPs of each layer's token-wise parts for one token: what one that stays can be spared."""
    token_wise_on_images: tuple[int, ...] = ()
    """The same, more in a call that holds image tokens."""

    def flops(
        self,
        visits: Sequence[int],
        *,
        rows: int,
        tokens: int,
        past: int = 0,
        images: bool = False,
    ) -> int | None:
        """FLOPs when layer l computes all rows x tokens tokens `visits[l]` times.

        `images`: whether there are image tokens among them, for decoders that treat them apart.
        """
        computed = [count * rows * tokens for count in visits]
        layers = self.layer_flops(computed, step=tokens, past=past, images=images)
        if layers is None:
            return None
        # A mixer's gate looks at every state but the last.
        looks = (max(count - 1, 0) for count in visits)
        gates = sum(gate * n for gate, n in zip(self.gate_per_token, looks, strict=True))
        return layers + gates * rows * tokens

    def layer_flops(
        self,
        computed: Sequence[int],
        *,
        stayed: Sequence[int] | None = None,
        left: Sequence[int] | None = None,
        step: int,
        past: int = 0,
        images: bool = False,
    ) -> int | None:
        """FLOPs of the layers alone, for so many tokens of all rows that each computes.

        Args:
            computed: tokens that go through each layer, each visit counted.
            stayed: of them those that its token-wise parts did not compute.
            left: tokens that leave keys and values there, and no more.
            step: tokens of one row in this call.
            past: tokens of one row before it.
            images: as in `flops`.
        """
        total = 0
        none = [None] * len(computed)
        for index, (layer, count, out, keys) in enumerate(
            zip(self.layers, computed, stayed or none, left or none, strict=True)
        ):
            if not (count or keys):
                continue
            if layer is None or (keys and layer.keys_per_token is None):
                return None
            total += layer.flops(count, step=step, past=past, images=images)
            total += (keys or 0) * (layer.keys_per_token or 0)
            if out:
                own = self.token_wise[index] + self.token_wise_on_images[index] * images
                total -= out * own
        return total


def stack_cost(
    layers: Sequence[nn.Module], gates: Sequence[nn.Module | None], config: Any
) -> StackCost:
    """Reads the coefficients off the modules of a stack and its text configuration."""
    types = getattr(config, "layer_types", None) or [None] * len(layers)
    parts = [list(parts_in(layer, token_wise_parts(layer))) for layer in layers]
    on_images = tuple(sum(map(image_flops, own)) for own in parts)
    return StackCost(
        tuple(layer_cost(layer, config, kind) for layer, kind in zip(layers, types, strict=True)),
        tuple(0 if gate is None else matrix_flops(gate) for gate in gates),
        tuple(
            sum(part_flops(part, config) for part in own) - extra
            for own, extra in zip(parts, on_images, strict=True)
        ),
        on_images,
    )
