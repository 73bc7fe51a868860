"""What is kept for each position along with a cache, and moves as its layers do."""

from __future__ import annotations

from torch import Tensor

from trol.host.cache import at_rest


class PositionSlot:
    """Something of each position, kept beside a layer's planes and cropped, reordered with them."""

    def __init__(self, values: Tensor, *, is_static: bool = False) -> None:
        self.values = at_rest(values) if is_static else values
        """Shape: [B, S, ...]."""
        self.is_static = is_static
        """Whether S is all that the cache can hold, and values are written where they are."""

    def reset(self) -> None:
        self.values.zero_()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.values = self.values.index_select(0, beam_idx.to(self.values.device))

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove and not self.is_static:  # there, what comes next is written over it
            self.values = self.values[:, : -abs(tokens_to_remove)]

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.values = self.values.repeat_interleave(repeats, dim=0)

    def batch_select_indices(self, indices: Tensor) -> None:
        self.values = self.values[indices]
