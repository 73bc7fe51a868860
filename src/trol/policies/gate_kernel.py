"""A Triton kernel for CUDA devices that computes a gate and its mixture in one launch.

    out = x + sigmoid(2 (w . x + b)) (y - x)            one program for each token, in float32

`mixer.Gate` and `depth.policy.mixture` compute the same, and run where Triton is missing.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

WIDEST = 8192
"""Columns that a program reads at once."""


@triton.jit
def _gated(state, further, weight, bias, out, width, BLOCK: tl.constexpr):  # noqa: PLR0917
    row = tl.program_id(0).to(tl.int64) * width
    score = tl.load(bias).to(tl.float32)
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < width
        x = tl.load(state + row + columns, mask=inside, other=0.0).to(tl.float32)
        w = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
        score += tl.sum(x * w, axis=0)
    gate = tl.sigmoid(2.0 * score)
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < width
        x = tl.load(state + row + columns, mask=inside, other=0.0).to(tl.float32)
        y = tl.load(further + row + columns, mask=inside, other=0.0).to(tl.float32)
        tl.store(out + row + columns, (x + gate * (y - x)).to(out.dtype.element_ty), mask=inside)


def gated_mixture(state: Tensor, further: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """(1 - g) x + g y with the gate g of x. Shape: [B, T, D] each; weight [1, D], bias [1]."""
    state, further = state.contiguous(), further.contiguous()
    out, width = torch.empty_like(state), state.shape[-1]
    block = min(WIDEST, triton.next_power_of_2(width))
    grid = (state.numel() // width,)
    launch: Any = _gated[grid]  # untyped: BLOCK is a number here, and a constant in the kernel
    with torch.cuda.device_of(state):  # Triton launches on the current device
        launch(state, further, weight.contiguous(), bias, out, width, BLOCK=block)
    return out
