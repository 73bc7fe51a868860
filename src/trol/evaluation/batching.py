"""Items in batches, ids in tensors, and how far a batch has come."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import BatchEncoding, StoppingCriteria

from trol.evaluation.items import Item

BATCH = 64
"""Questions answered at once."""

TOKENS_AT_ONCE = 4096
"""Tokens of the windows that are read together, one window at least."""

Heard = Callable[[float], None]
"""Is told how many items' worth of work is done."""


def batches(items: Sequence[Item], size: int = BATCH) -> Iterable[Sequence[Item]]:
    """The items in order, `size` at a time; of windows no more than `TOKENS_AT_ONCE` holds."""
    longest = max((len(item.ids) for item in items), default=0)
    if longest:
        size = max(1, min(size, TOKENS_AT_ONCE // longest))
    for start in range(0, len(items), size):
        yield items[start : start + size]


def padded(rows: Sequence[Sequence[int]], *, left: bool = False) -> BatchEncoding:
    """Rows of ids as `input_ids` and `attention_mask` [B, T]; what pads them is never read."""
    ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    real = torch.zeros_like(ids)
    for at, row in enumerate(rows):
        part = slice(-len(row), None) if left else slice(len(row))
        ids[at, part], real[at, part] = torch.tensor(row), 1
    return BatchEncoding({"input_ids": ids, "attention_mask": real})


class Told(StoppingCriteria):
    """Stops nothing: says how far a batch of answers has come, after each token.

    Args:
        heard: is told.
        before: items that were finished before the batch.
        rows: items of the batch.
        prompt: tokens of its prompts.
        most: new tokens at most.
    """

    def __init__(self, heard: Heard, before: int, rows: int, *, prompt: int, most: int) -> None:
        self.heard, self.before, self.rows = heard, before, rows
        self.prompt, self.most = prompt, most

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """Which rows are to stop: none. Shape: [B]."""
        del scores, kwargs
        self.heard(self.before + self.rows * (input_ids.shape[1] - self.prompt) / self.most)
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
