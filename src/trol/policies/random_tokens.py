"""Random tokens in place of chosen ones: the control for every policy that chooses tokens."""

from dataclasses import KW_ONLY, dataclass
from typing import Any, Literal

from torch import Tensor

from trol.depth import Answer, Bounds, Scope, Visit
from trol.depth.policy import check_number, check_whole
from trol.errors import UsageError
from trol.policies.base import DataclassPolicy, SkippedKV

FACTOR, WORD = 0x45D9F3B, 2**32 - 1
"""Of a hash of 32-bit words whose products fit 64 bits, so that every device agrees on it. Sums and
products alone would draw neighbours alike, and so the same token in two layers."""


@dataclass(eq=False, repr=False)
class RandomTokens(DataclassPolicy):
    """a_0 = 1 for a share of the tokens (visit = 1), or a_0 = 1, a_1 = 1 for it (visit = 2).

    Each layer draws its own tokens. Whether one is drawn follows from the seed, the layer and the
    token's position, so it is the same with a cache and without, alone and in a batch.

    Args:
        share: how many of the tokens in scope make the visit, in [0, 1].
        visit: the visit that only drawn tokens make: 1, the others skip the layer; or 2, the others
            visit it once.
        seed: each number draws other tokens.

    Raises:
        UsageError: a setting is out of its range.
    """

    name = "random_tokens"
    reads_start = True
    decides = True

    share: float = 0.5
    _: KW_ONLY
    visit: Literal[1, 2] = 2
    seed: int = 0
    scope: Scope = "all"
    skipped_kv: SkippedKV = "project"
    keep_first: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("share", self.share)
        if not 0 <= self.share <= 1:
            raise UsageError(f"share is {self.share}, but must be a number in [0, 1].")
        check_whole("seed", self.seed)
        check_whole("visit", self.visit)
        if self.visit not in (1, 2):
            raise UsageError(
                f"visit is {self.visit!r}; give 1 to skip layers, or 2 to repeat them."
            )

    def bounds(self, layer: int) -> Bounds:
        return Bounds(self.visit - 1, self.visit)

    def again(self, visit: Visit) -> Answer:
        if visit.number < self.visit - 1:
            return 1.0
        positions = visit.context.positions(visit.state)
        numbers = _random_numbers(positions, self.seed, visit.layer)
        return (numbers < self.share).float().expand(visit.state.shape[:2])


def _random_numbers(positions: Tensor, seed: int, layer: int) -> Tensor:
    """One number in [0, 1) for each position. Shape: [..., T], in and out."""
    words = _hashed(_hashed(_hashed(seed + 1) + layer) + positions)
    return (words >> 8) / 2**24  # 24 bits: all that float32 holds below 1


def _hashed(word: Any) -> Any:
    word = word & WORD
    for _ in range(2):
        word = (((word >> 16) ^ word) * FACTOR) & WORD
    return (word >> 16) ^ word
