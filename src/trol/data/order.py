"""The order of an epoch: seeded, the same on every machine, cut into equal shares for the ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler

from trol.errors import UsageError

BATCHES_SORTED = 64
"""Batches (of all ranks) whose rows are sorted by length together."""


def order(count: int, *, seed: int, epoch: int) -> np.ndarray:
    """Rows 0 .. count - 1 in the random order of this seed and epoch. Shape: [count], int64."""
    return np.random.default_rng([seed, epoch]).permutation(count)


def grouped_order(
    lengths: Sequence[int] | np.ndarray, batch: int, *, seed: int, epoch: int
) -> np.ndarray:
    """As `order`, but each run of `batch` rows has similar lengths. Shape: [len(lengths)], int64.

    Rows are shuffled, sorted by length among `BATCHES_SORTED` batches at a time, and the
    batches shuffled again; rows that fill no batch come last.
    """
    rows, known = order(len(lengths), seed=seed, epoch=epoch), np.asarray(lengths)
    pool = batch * BATCHES_SORTED
    pools = [rows[at : at + pool] for at in range(0, len(rows), pool)]
    ranked = [part[np.argsort(-known[part], kind="stable")] for part in pools]
    rows = np.concatenate([rows[:0], *ranked])
    full = len(rows) // batch
    # A draw of its own, so that batches do not move as the rows did.
    moved = np.random.default_rng([seed, epoch, 1]).permutation(full)
    batches = rows[: full * batch].reshape(full, batch)[moved]
    return np.concatenate([batches.ravel(), rows[full * batch :]])


class ShardedOrder(Sampler[int]):
    """The rows of one rank, epoch after epoch: disjoint from those of other ranks, and as many.

    With `lengths` given, rows of a batch have similar lengths, on all ranks at once. Of a number
    of rows that the ranks do not divide, the last `count % ranks` of an epoch's order are left
    out; they are others in each epoch. It does not depend on how many workers load the rows.
    """

    def __init__(
        self,
        count: int,
        batch: int,
        *,
        seed: int = 0,
        rank: int = 0,
        ranks: int = 1,
        lengths: Sequence[int] | np.ndarray | None = None,
    ) -> None:
        """Order of `count` rows for batches of `batch` rows per rank."""
        if not 0 <= rank < ranks:
            raise UsageError(f"rank {rank} of {ranks} ranks; ranks are numbered from 0.")
        if batch < 1 or seed < 0:
            raise UsageError(f"batch is {batch}, seed {seed}; give a batch >= 1 and a seed >= 0.")
        if lengths is not None and len(lengths) != count:
            raise UsageError(f"{len(lengths)} lengths for {count} rows; give one for each row.")
        self.count, self.batch, self.seed = count, batch, seed
        self.rank, self.ranks, self.lengths = rank, ranks, lengths
        self.epoch, self.done = 0, 0

    def set_epoch(self, epoch: int, done: int = 0) -> None:
        """The next iteration is epoch `epoch`, without the first `done` rows of this rank."""
        self.epoch, self.done = epoch, done

    def __len__(self) -> int:
        return max(self.count // self.ranks - self.done, 0)

    def __iter__(self) -> Iterator[int]:
        return iter(self._share()[self.done :].tolist())

    def _share(self) -> np.ndarray:
        """All rows of this rank in this epoch. Shape: [count // ranks]."""
        wide = self.batch * self.ranks  # one batch of every rank
        if self.lengths is None:
            rows = order(self.count, seed=self.seed, epoch=self.epoch)
        else:
            rows = grouped_order(self.lengths, wide, seed=self.seed, epoch=self.epoch)
        # Neighbours go to different ranks: each rank's batch b comes from the same `wide` rows.
        return rows[: self.count // self.ranks * self.ranks][self.rank :: self.ranks]
