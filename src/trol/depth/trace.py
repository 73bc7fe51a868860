"""A trace: what really happened, token by token and layer by layer.

Cost: layer visits, FLOPs, bytes and milliseconds, predicted from shapes.
"""

import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Float, Integer
from torch import Tensor, nn

from trol.axes import States, TokenMask
from trol.depth.planes import cache_bytes
from trol.depth.policy import Answer, Visit
from trol.depth.roles import Mask
from trol.errors import UsageError
from trol.host.flops import LayerCost, image_flops, layer_cost, matrix_flops, part_flops
from trol.host.names import parts_in, token_wise_parts


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
        keys_only: Sequence[int] | None = None,
        step: int,
        past: int = 0,
        images: bool = False,
    ) -> int | None:
        """FLOPs of the layers alone, for so many tokens of all rows that each computes.

        Args:
            computed: tokens that go through each layer, each visit counted.
            stayed: of them those that its token-wise parts did not compute.
            keys_only: tokens of which only keys and values are computed there.
            step: tokens of one row in this call.
            past: tokens of one row before it.
            images: as in `flops`.
        """
        total = 0
        none = [None] * len(computed)
        counts = zip(self.layers, computed, stayed or none, keys_only or none, strict=True)
        for index, (layer, visited, stay, keys) in enumerate(counts):
            if not (visited or keys):
                continue
            if layer is None or (keys and layer.keys_per_token is None):
                return None
            total += layer.flops(visited, step=step, past=past, images=images)
            total += (keys or 0) * (layer.keys_per_token or 0)
            if stay:
                own = self.token_wise[index] + self.token_wise_on_images[index] * images
                total -= stay * own
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


class Trace:
    """Visits, weights and cost of every forward pass made while the trace was open.

    Later passes (chunks, decoding steps) follow earlier ones along T. Tensors live on the CPU.
    """

    def __init__(self, stack_cost: StackCost) -> None:
        self.stack_cost = stack_cost
        """What visits of the layers cost."""
        self._visits: list[Tensor] = []
        self._weights: list[Tensor] = []
        self._real: list[Tensor] = []
        self._flops: list[int | None] = []
        self._kv_bytes = 0
        self._milliseconds = 0.0
        self.translated = False
        """Whether the policy changed states on their way, which no weight of a visit tells."""

    @property
    def visits(self) -> Integer[Tensor, "L B T"]:
        """How often each token visited each layer; of padding (`real`) it says nothing.

        Shape: [L, B, T].
        """
        return torch.cat(self._some(self._visits), dim=-1)

    @property
    def weights(self) -> Float[Tensor, "L shares B T"]:
        """w_r: the share of the r-th visit's output in the layer's output; sums to 1 over r.

        Shape: [L, R + 1, B, T]; TroL's gate is `weights[:, 2]`.
        """
        most = max(weights.shape[1] for weights in self._some(self._weights))
        padded = [
            torch.nn.functional.pad(w, (0, 0, 0, 0, 0, most - w.shape[1])) for w in self._weights
        ]
        return torch.cat(padded, dim=-1)

    @property
    def real(self) -> TokenMask:
        """Which tokens are no padding. Shape: [B, T]."""
        return torch.cat(self._some(self._real), dim=-1)

    @property
    def flops(self) -> list[int | None]:
        """FLOPs of each forward pass, in order; None as in `Cost`."""
        return list(self._flops)

    @property
    def cost(self) -> Cost:
        """What it took: layer visits of real tokens, FLOPs, bytes, milliseconds."""
        flops = [one for one in self._flops if one is not None]
        return Cost(
            layer_visits=int((self.visits * self.real).sum()),
            flops=sum(flops) if len(flops) == len(self._flops) else None,
            kv_bytes=self._kv_bytes,
            milliseconds=self._milliseconds,
        )

    def add(
        self,
        *,
        visits: Integer[Tensor, "L B T"],
        weights: Float[Tensor, "L shares B T"],
        real: TokenMask,
        flops: int | None,
        milliseconds: float,
    ) -> None:
        """Adds a forward pass: [L, B, T], [L, R + 1, B, T], [B, T], FLOPs and milliseconds."""
        self._visits.append(visits)
        self._weights.append(weights)
        self._real.append(real)
        self._flops.append(flops)
        self._milliseconds += milliseconds

    def holding(self, kv_bytes: int) -> None:
        """Notes what the cache holds by now. Unit: bytes."""
        self._kv_bytes = kv_bytes

    def _some(self, tensors: list[Tensor]) -> list[Tensor]:
        if not tensors:
            raise UsageError("this trace saw no forward pass; run the model inside the with block.")
        if len({t.shape[-2] for t in tensors}) > 1:
            raise UsageError("this trace saw batches of different sizes; open one trace for each.")
        return tensors


class Recorder:
    """Writes a `Trace` while forward passes run."""

    def __init__(self, trace: Trace, layers: int) -> None:
        self.trace, self.layers = trace, layers
        self._begin()

    def _begin(self) -> None:
        self._needs: list[list[Tensor]] = [[] for _ in range(self.layers)]
        self._shares: list[list[Answer]] = [[] for _ in range(self.layers)]
        self._shape: tuple[int, int] | None = None
        self._computed = [0] * self.layers
        self._stayed = [0] * self.layers
        self._keys_only = [0] * self.layers
        self._beside = 0

    @contextmanager
    def one_pass(self, cache: Any, mask: Any, *, images: bool = False) -> Generator[None]:
        """Spans one forward pass of the stack; `mask` is the padding mask [B, S] or None."""
        self._begin()
        start = 0 if cache is None else int(cache.get_seq_length())
        began = time.perf_counter()
        yield
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self._end(start, mask, images, 1000 * (time.perf_counter() - began))

    def visit(
        self, layer: int, need: Mask, state: States, computed: int, *, stayed: int, keys_only: int
    ) -> None:
        """One visit was made by the tokens in `need`. Shape of state: [B, T, D].

        `computed`, `stayed` and `keys_only` are numbers of tokens as in `StackCost.layer_flops`.
        """
        rows, tokens = state.shape[:2]
        self._shape = rows, tokens
        if isinstance(need, bool):
            need = torch.full((rows, tokens), need)
        self._needs[layer].append(need.detach().long().cpu())
        self._computed[layer] += computed
        self._stayed[layer] += stayed
        self._keys_only[layer] += keys_only

    def translated(self) -> None:
        """The policy may have changed states at a layer's entrance."""
        self.trace.translated = True

    def looked(self, visit: Visit, flops: int) -> None:
        """The policy answered for the tokens of a visit, at so many FLOPs for each."""
        rows, tokens = visit.state.shape[:2]
        self._beside += flops * rows * tokens

    def skipped_pairs(self, layer: int, pairs: int) -> None:
        """So many pairs of a query and a key did not attend in one visit."""
        cost = self.trace.stack_cost.layers[layer]
        self._beside -= 0 if cost is None else cost.per_key * pairs

    def answers(self, layer: int, answers: list[Any], *, ended: bool) -> None:
        """a_0, a_1, ... of one layer; `ended`: one more visit came behind the last of them."""
        shares: list[Answer] = []
        alive: Answer = 1.0
        for again in answers:
            known = torch.as_tensor(again).detach().float().cpu()
            if not ((known >= 0) & (known <= 1)).all():
                raise UsageError(
                    f"the policy answered {known.flatten()[:4].tolist()} ... at layer {layer}; a_r "
                    "lies in [0, 1]: 0 for a token that leaves, 1 for one that goes again."
                )
            shares.append(alive * (1 - known))
            alive = alive * known
        self._shares[layer] = [*shares, alive] if ended else shares

    def skipped(self, layer: int, state: States) -> None:
        """The whole batch skipped a layer."""
        self._shape = state.shape[0], state.shape[1]
        self._shares[layer] = [1.0]

    def holding(self, cache: Any) -> None:
        """Notes how much the cache holds after a pass."""
        self.trace.holding(0 if cache is None else cache_bytes(cache))

    def _end(self, start: int, mask: Any, images: bool, milliseconds: float) -> None:
        assert self._shape is not None
        rows, tokens = self._shape
        none = torch.zeros(rows, tokens, dtype=torch.long)
        visits = torch.stack([sum(n, none) for n in self._needs])
        most = max(len(shares) for shares in self._shares)
        full = torch.zeros(self.layers, most, rows, tokens)
        for layer, shares in enumerate(self._shares):
            for number, share in enumerate(shares):
                full[layer, number] = share
        real = torch.ones(rows, tokens, dtype=torch.bool)
        if isinstance(mask, Tensor) and mask.ndim == 2:
            real = mask[:, -tokens:].bool().cpu()
        layers = self.trace.stack_cost.layer_flops(
            self._computed,
            stayed=self._stayed,
            keys_only=self._keys_only,
            step=tokens,
            past=start,
            images=images,
        )
        flops = None if layers is None else layers + self._beside
        self.trace.add(
            visits=visits, weights=full, real=real, flops=flops, milliseconds=milliseconds
        )
