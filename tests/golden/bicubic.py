"""Bicubic interpolation from its definition, for tests of what interpolates."""

from __future__ import annotations

import torch
from torch import Tensor


def bicubic(before: int, after: int) -> Tensor:
    """The matrix [after, before] that resizes a line, its last numbers repeated beyond its ends.

    Keys' kernel with a = -3/4, at pixels' centres: (a + 2) x³ - (a + 3) x² + 1 up to the distance
    x = 1, then a (x³ - 5 x² + 8 x - 4) up to 2.
    """
    centres = (torch.arange(after).double() + 0.5) * before / after - 0.5
    matrix = torch.zeros(after, before, dtype=torch.float64)
    for step in (-1, 0, 1, 2):
        places = centres.floor() + step
        x = (centres - places).abs()
        near, far = 1.25 * x**3 - 2.25 * x**2 + 1, -0.75 * (x**3 - 5 * x**2 + 8 * x - 4)
        rows, columns = torch.arange(after), places.clamp(0, before - 1).long()
        matrix[rows, columns] += torch.where(x <= 1, near, far)
    return matrix


def enlarged_table(table: Tensor, rows: int, columns: int) -> Tensor:
    """A table [1 + g², D], class token first, for rows x columns patches."""
    side = round((table.shape[0] - 1) ** 0.5)
    square = table[1:].double().view(side, side, -1)
    across, down = bicubic(side, columns), bicubic(side, rows)
    made = torch.einsum("rg,ch,ghd->rcd", down, across, square).flatten(0, 1)
    return torch.cat([table[:1], made.float()])
