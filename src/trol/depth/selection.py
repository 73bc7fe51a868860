"""Some of the B x T tokens of a call, gathered in groups: each group is one call of the layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

SLACK = 64
"""Tokens that a group may be padded by in any case: a layer reads all its weights for one."""
WASTE = 0.25
"""Beyond them, the padding that a group may have, as a share of its real tokens."""
STRETCH = 64
"""Tokens of a group that attend together: later ones see more keys than earlier ones."""


@dataclass(frozen=True, eq=False)
class Group:
    """Tokens of some rows, padded to the longest of them."""

    rows: Tensor | None
    """Which rows; None for all. Shape: [b]."""
    tokens: Tensor | None
    """Which tokens of each; None for all T. Shape: [b, m]."""
    real: Tensor | None
    """Places in the flattened `tokens` that are no padding; None where all are. Shape: [n]."""
    size: int
    """How many tokens are computed: b * m."""
    reach: tuple[int, ...] = ()
    """For every `STRETCH` of the m, one more than the last position among them; empty if few."""

    def take(self, value: Tensor, dim: int) -> Tensor:
        """The group's part of [B, ..., T, ...], tokens in `dim` < 0; B may be 1 for all rows.

        Shape: [b, ..., m, ...].
        """
        rows = None if self.rows is None or len(value) == 1 else self.rows
        if self.tokens is None:
            return value if rows is None else value.index_select(0, rows)
        if len(self.tokens) == 1:
            value = value if rows is None else value.index_select(0, rows)
            return value.index_select(dim, self.tokens[0])
        along = value.movedim(dim, 1)
        if len(value) == 1:
            return along[0][self.tokens].movedim(1, dim)
        return along[self._rows_of(rows), self.tokens].movedim(1, dim)

    def put(self, target: Tensor, value: Tensor, dim: int) -> None:
        """Writes `value`, the group's [b, ..., m, ...], into `target` [B, ..., T, ...]."""
        if self.tokens is None:
            if self.rows is None:
                target.copy_(value)
            else:
                target.index_copy_(0, self.rows, value)
        elif len(target) == 1:
            target.index_copy_(dim, self.tokens[0], value)
        else:
            rows, tokens = self._rows_of(self.rows).expand_as(self.tokens), self.tokens
            value = value.movedim(dim, 1)
            if self.real is not None:
                value = value.flatten(0, 1)[self.real]
                rows, tokens = rows.flatten()[self.real], tokens.flatten()[self.real]
            target.movedim(dim, 1)[rows, tokens] = value

    def take_keys(self, mask: Tensor) -> Tensor:
        """The columns of the group's own tokens. Shape: [b or 1, H, m, T] -> [b, H, m, m]."""
        if self.tokens is None:
            return mask
        mask = mask.expand(len(self.tokens), *mask.shape[1:])
        return mask.take_along_dim(self.tokens[:, None, None, :], dim=-1)

    def rows_in(self, value: Tensor) -> Tensor:
        """The group's rows of something that all its tokens share: [B, ...] -> [b, ...]."""
        return value if self.rows is None else value.index_select(0, self.rows)

    def _rows_of(self, rows: Tensor | None) -> Tensor:
        assert self.tokens is not None
        if rows is None:
            rows = torch.arange(len(self.tokens), device=self.tokens.device)
        return rows[:, None]


class Crowd(Group):
    """Tokens of any rows as one row: for what happens to each alone, before it attends.

    Shape: rows [n], tokens [n].
    """

    def take(self, value: Tensor, dim: int) -> Tensor:
        along = value.movedim(dim, 1)
        mine = along[0][self.tokens] if len(value) == 1 else along[self.rows, self.tokens]
        return mine[None].movedim(1, dim)

    def put(self, target: Tensor, value: Tensor, dim: int) -> None:
        target.movedim(dim, 1)[self.rows, self.tokens] = value.movedim(dim, 1)[0]

    def rows_in(self, value: Tensor) -> Tensor:
        return value


def everybody(rows: int, tokens: int) -> Group:
    """All rows, all tokens."""
    return Group(None, None, None, rows * tokens)


def groups_of(mask: Tensor, device: torch.device, *, one: bool = False) -> list[Group]:
    """The tokens of a BoolTensor [B, T], rows of like length together; `one`: in one group."""
    mask = mask.cpu()  # the one look that waits for a device
    counts: list[int] = mask.sum(1).tolist()
    return [_group(mask, rows, counts, device) for rows in _alike(counts, one=one)]


def crowd_of(mask: Tensor, device: torch.device) -> list[Group]:
    """The tokens of a BoolTensor [B, T] as one row; no group where there is none."""
    mask = mask.cpu()
    if len(mask) == 1 or bool(mask.all()):
        return groups_of(mask, device)
    rows, tokens = (part.to(device) for part in mask.nonzero(as_tuple=True))
    return [Crowd(rows, tokens, None, len(tokens))] if len(tokens) else []


def _alike(counts: Sequence[int], *, one: bool) -> list[list[int]]:
    """Rows that have tokens, so that no group is padded by much."""
    order = sorted((row for row, count in enumerate(counts) if count), key=lambda r: -counts[r])
    groups: list[list[int]] = []
    real = 0
    for row in order:
        if groups:
            most = counts[groups[-1][0]]
            padding = most * (len(groups[-1]) + 1) - real - counts[row]
            if one or padding <= max(SLACK, WASTE * real):
                groups[-1].append(row)
                real += counts[row]
                continue
        groups.append([row])
        real = counts[row]
    return [sorted(group) for group in groups]


def _group(mask: Tensor, rows: list[int], counts: Sequence[int], device: torch.device) -> Group:
    most, width = max(counts[row] for row in rows), mask.shape[1]
    every = len(rows) == len(counts)
    where = None if every else torch.tensor(rows, device=device)
    here = mask if every else mask[rows]
    size = len(rows) * most
    if all(counts[row] == most for row in rows):
        if most == width:
            return Group(where, None, None, size)
        tokens = here.nonzero()[:, 1].view(len(rows), most)
        return Group(where, tokens.to(device), None, size, _reach(tokens))
    # Selected tokens first, in their order; what fills a shorter row up is never written back.
    tokens = here.byte().argsort(dim=1, descending=True, stable=True)[:, :most]
    real = here.gather(1, tokens).flatten().nonzero()[:, 0]
    return Group(where, tokens.to(device), real.to(device), size, _reach(tokens))


def _reach(tokens: Tensor) -> tuple[int, ...]:
    if tokens.shape[1] < 2 * STRETCH:
        return ()
    return tuple(int(part.max()) + 1 for part in tokens.split(STRETCH, dim=1))
