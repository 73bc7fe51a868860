"""A trace: what really happened, token by token and layer by layer."""

from __future__ import annotations

import time
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from trol.depth.cost import Cost, StackCost
from trol.depth.planes import cache_bytes
from trol.depth.policy import Answer, Visit
from trol.depth.roles import Mask
from trol.errors import UsageError


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
    def visits(self) -> Tensor:
        """How often each token visited each layer; of padding (`real`) it says nothing.

        Shape: [L, B, T].
        """
        return torch.cat(self._some(self._visits), dim=-1)

    @property
    def weights(self) -> Tensor:
        """w_r: the share of the r-th visit's output in the layer's output; sums to 1 over r.

        Shape: [L, R + 1, B, T]; TroL's gate is `weights[:, 2]`.
        """
        most = max(weights.shape[1] for weights in self._some(self._weights))
        padded = [
            torch.nn.functional.pad(w, (0, 0, 0, 0, 0, most - w.shape[1])) for w in self._weights
        ]
        return torch.cat(padded, dim=-1)

    @property
    def real(self) -> Tensor:
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
        visits: Tensor,
        weights: Tensor,
        real: Tensor,
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
        self._left = [0] * self.layers
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
        self, layer: int, need: Mask, state: Tensor, computed: int, *, stayed: int, left: int
    ) -> None:
        """One visit was made by the tokens in `need`. Shape of state: [B, T, D].

        `computed`, `stayed` and `left` are numbers of tokens as in `StackCost.layer_flops`.
        """
        rows, tokens = state.shape[:2]
        self._shape = rows, tokens
        if isinstance(need, bool):
            need = torch.full((rows, tokens), need)
        self._needs[layer].append(need.detach().long().cpu())
        self._computed[layer] += computed
        self._stayed[layer] += stayed
        self._left[layer] += left

    def translated(self) -> None:
        """The policy may have changed states at a layer's entrance."""
        self.trace.translated = True

    def looked(self, visit: Visit, flops: int) -> None:
        """The policy answered for the tokens of a visit, at so many FLOPs for each."""
        rows, tokens = visit.state.shape[:2]
        self._beside += flops * rows * tokens

    def spared_pairs(self, layer: int, pairs: int) -> None:
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

    def skipped(self, layer: int, state: Tensor) -> None:
        """The whole batch skipped a layer."""
        self._shape = state.shape[0], state.shape[1]
        self._shares[layer] = [1.0]

    def holding(self, cache: Any) -> None:
        """Notes how much the cache holds after a pass."""
        self.trace.holding(0 if cache is None else cache_bytes(cache))

    def _end(self, start: int, mask: Any, images: bool, milliseconds: float) -> None:
        assert self._shape is not None
        rows, tokens = self._shape
        nobody = torch.zeros(rows, tokens, dtype=torch.long)
        visits = torch.stack([sum(n, nobody) for n in self._needs])
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
            left=self._left,
            step=tokens,
            past=start,
            images=images,
        )
        flops = None if layers is None else layers + self._beside
        self.trace.add(
            visits=visits, weights=full, real=real, flops=flops, milliseconds=milliseconds
        )
