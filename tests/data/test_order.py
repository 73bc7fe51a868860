"""An epoch's order: deterministic, complete, disjoint between ranks, similar lengths together."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader, TensorDataset

from trol.data.pools import ShardedOrder, grouped_order, order
from trol.errors import UsageError

SIZES = st.tuples(st.integers(0, 700), st.integers(1, 9), st.integers(0, 5))


@given(SIZES)
def test_every_row_comes_once(sizes: tuple[int, int, int]) -> None:
    count, batch, epoch = sizes
    lengths = np.random.default_rng(count).integers(0, 1000, count)
    for rows in (
        order(count, seed=1, epoch=epoch),
        grouped_order(lengths, batch, seed=1, epoch=epoch),
    ):
        assert sorted(rows.tolist()) == list(range(count))


@given(SIZES, st.integers(1, 5), st.booleans())
def test_ranks_share_the_rows(sizes: tuple[int, int, int], ranks: int, grouped: bool) -> None:
    count, batch, epoch = sizes
    lengths = np.arange(count) % 97 if grouped else None
    shares = []
    for rank in range(ranks):
        share = ShardedOrder(count, batch, seed=3, rank=rank, ranks=ranks, lengths=lengths)
        share.set_epoch(epoch)
        shares.append(list(share))
        assert len(share) == len(shares[-1]) == count // ranks
        assert list(share) == shares[-1]
    together = [row for share in shares for row in share]
    assert len(set(together)) == len(together) == count // ranks * ranks


def test_epochs_and_seeds_differ() -> None:
    orders = [order(50, seed=seed, epoch=epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(rows.tolist()) for rows in orders}) == 4


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("lengths", [None, list(range(20))])
def test_workers_change_nothing(workers: int, lengths: Any) -> None:
    share = ShardedOrder(20, 3, seed=5, rank=1, ranks=2, lengths=lengths)
    rows = TensorDataset(torch.arange(20))
    loader = DataLoader(rows, batch_size=3, sampler=share, num_workers=workers)
    assert [int(row) for (batch,) in loader for row in batch] == list(share)


def test_resuming_goes_on_where_it_was() -> None:
    share = ShardedOrder(40, 4, ranks=2, lengths=range(40))
    share.set_epoch(2)
    whole = list(share)
    share.set_epoch(2, done=12)
    assert list(share) == whole[12:]
    assert len(share) == len(whole) - 12
    share.set_epoch(3)
    assert list(share) != whole
    assert len(share) == 20


def test_batches_have_similar_lengths_on_all_ranks_at_once() -> None:
    lengths = np.random.default_rng(0).integers(1, 2000, 4000)
    shares = [list(ShardedOrder(4000, 8, rank=rank, ranks=2, lengths=lengths)) for rank in range(2)]
    spread = []
    for at in range(0, 2000, 8):
        batch = lengths[shares[0][at : at + 8] + shares[1][at : at + 8]]
        spread.append(batch.max() - batch.min())
    plain = lengths[list(ShardedOrder(4000, 8))].reshape(-1, 8)
    assert np.mean(spread) < 0.05 * np.mean(plain.max(1) - plain.min(1))
    firsts = lengths[shares[0]].reshape(-1, 8)[:, 0]
    assert abs(np.corrcoef(firsts, np.arange(len(firsts)))[0, 1]) < 0.2, "batches come unsorted"


@pytest.mark.parametrize(
    "settings",
    [{"rank": 2, "ranks": 2}, {"rank": -1}, {"batch": 0}, {"seed": -1}, {"lengths": [1, 2]}],
)
def test_wrong_settings(settings: Any) -> None:
    with pytest.raises(UsageError):
        ShardedOrder(**{"count": 10, "batch": 2, **settings})
