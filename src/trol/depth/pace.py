"""How fast this device is: what decides whether leaving tokens out saves time.

packed visit = gathering + FLOPs of those that go or leave keys and values / pace
dense visit  =             FLOPs of all tokens / pace
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from trol.host.dispatch import without_modes

CALL, SPARING = 100, 30
"""Small tensor operations that take as long as one more call of a layer with the gathering for it,
its matrices aside, and as leaving a product out of a call (`trol bench sparse` shows what choosing
by them costs)."""
SIZE, TRIES = 768, 5


@dataclass(frozen=True)
class Pace:
    """What a device does in a second, and what it takes to start something small."""

    flops: float
    """FLOPs of matrix products in a second."""
    operation: float
    """Seconds of one small operation."""

    def pays(self, saved: int, operations: int) -> bool:
        """Whether saving so many FLOPs is worth so many small operations."""
        return saved / self.flops > operations * self.operation


@functools.cache
def pace_of(device: torch.device, dtype: torch.dtype) -> Pace:
    """The pace of a device, measured once in a process: some milliseconds."""
    with without_modes():  # who counts FLOPs now does not mean these
        wide = torch.ones(SIZE, SIZE, device=device, dtype=dtype)
        small = torch.ones(8, device=device, dtype=dtype)
        product = _shortest(lambda: wide @ wide, device)
        return Pace(2 * SIZE**3 / product, _shortest(lambda: _repeat(small), device) / CALL)


def _repeat(small: torch.Tensor) -> None:
    for _ in range(CALL):
        small = small + 1


def _shortest(run: Callable[[], object], device: torch.device) -> float:
    """Seconds of the fastest of some runs, after a first that does not count."""
    times = []
    for _ in range(TRIES + 1):
        began = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - began)
    return min(times[1:])
