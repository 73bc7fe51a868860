"""Cost: layer visits, FLOPs, bytes and milliseconds, predicted from shapes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from trol.host.layers import LINEAR, MADE_BEFORE_KEYS
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
class LayerCost:
    """Coefficients of one visit of one layer."""

    per_token: int
    """FLOPs of the linear maps for one token: 2 * number of weights (experts: those chosen)."""
    per_key: int
    """FLOPs of the attention for one token and one key: 4 * heads * head size."""
    per_image_call_token: int
    """FLOPs more for one token of a call that holds image tokens: maps that run only then."""
    window: int | None
    """How many positions a sliding attention sees, or None."""
    keys_per_token: int | None = None
    """FLOPs for one token that leaves its keys and values only; None where that is not known."""

    def flops(self, count: int, *, step: int, past: int = 0, images: bool = False) -> int:
        """FLOPs of one visit of `count` tokens, each beside `step` of its row, after `past`."""
        seen = past if self.window is None else min(past, self.window - 1)
        extra = self.per_image_call_token * images
        return count * (self.per_token + self.per_key * (seen + step) + extra)


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


def matrix_flops(module: nn.Module) -> int:
    """FLOPs of a module's matrices on one token: 2 * number of weights."""
    return 2 * sum(p.numel() for p in module.parameters() if p.ndim == 2)


def stack_cost(
    layers: Sequence[nn.Module], gates: Sequence[nn.Module | None], config: Any
) -> StackCost:
    """Reads the coefficients off the modules of a stack and its text configuration."""
    types = getattr(config, "layer_types", None) or [None] * len(layers)
    parts = [list(parts_in(layer, token_wise_parts(layer))) for layer in layers]
    on_images = tuple(sum(map(_image_flops, own)) for own in parts)
    return StackCost(
        tuple(_layer_cost(layer, config, kind) for layer, kind in zip(layers, types, strict=True)),
        tuple(0 if gate is None else matrix_flops(gate) for gate in gates),
        tuple(
            sum(_weights(part, config) for part in own) - extra
            for own, extra in zip(parts, on_images, strict=True)
        ),
        on_images,
    )


def _layer_cost(layer: nn.Module, config: Any, kind: str | None) -> LayerCost | None:
    if any(isinstance(module, nn.Conv1d) for module in layer.modules()):
        return None
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    sliding = kind == "sliding_attention" or (kind is None and _always_slides(config))
    window = getattr(config, "sliding_window", None) if sliding else None
    extra = _image_flops(layer)
    whole = _weights(layer, config) - extra
    return LayerCost(whole, 4 * heads * size, extra, window, _keys_flops(layer))


def _keys_flops(layer: nn.Module) -> int | None:
    """FLOPs of the maps that run before keys and values are stored: those of queries as well."""
    found = [
        module.weight.numel()
        for name, module in layer.named_modules()
        if isinstance(module, LINEAR) and MADE_BEFORE_KEYS & set(name.split("."))
    ]
    return 2 * sum(found) or None


def _image_flops(layer: nn.Module) -> int:
    """FLOPs for one token of the maps that modules declare, by name, to run on images alone."""
    maps = (
        getattr(module, name)
        for module in layer.modules()
        for name in getattr(module, "runs_on_images", ())
    )
    return 2 * sum(one.weight.numel() for one in maps)


def _always_slides(config: Any) -> bool:
    return getattr(config, "sliding_window", None) is not None


def _weights(layer: nn.Module, config: Any) -> int:
    linear = sum(
        module.weight.numel()
        for name, module in layer.named_modules()
        if isinstance(module, LINEAR) and name != "depth"
    )
    experts = [p for p in layer.parameters() if p.ndim == 3]
    routers = [
        p
        for name, p in layer.named_parameters()
        if p.ndim == 2 and experts and name.endswith(("gate.weight", "router.weight"))
    ]
    owned = {id(m.weight) for m in layer.modules() if isinstance(m, LINEAR)}
    linear += sum(p.numel() for p in routers if id(p) not in owned)
    chosen = getattr(config, "num_experts_per_tok", 1)
    return 2 * (linear + sum(p.numel() * chosen // p.shape[0] for p in experts))
