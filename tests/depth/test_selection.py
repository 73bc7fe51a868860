"""Groups of tokens: everybody in one, what is taken is put back, padding is bounded."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from trol.depth.selection import SLACK, WASTE, Group, crowd_of, everybody, groups_of

CPU = torch.device("cpu")


@st.composite
def masks(draw: st.DrawFn, rows: int = 5, tokens: int = 9) -> Tensor:
    """Who is selected. Shape: BoolTensor [B, T]."""
    rows, tokens = draw(st.integers(1, rows)), draw(st.integers(1, tokens))
    kind = draw(st.sampled_from(["some", "rows", "columns"]))
    if kind == "rows":
        goes = draw(st.lists(st.booleans(), min_size=rows, max_size=rows))
        return torch.tensor(goes)[:, None].expand(rows, tokens).clone()
    if kind == "columns":
        goes = draw(st.lists(st.booleans(), min_size=tokens, max_size=tokens))
        return torch.tensor(goes)[None].expand(rows, tokens).clone()
    every = draw(st.lists(st.booleans(), min_size=rows * tokens, max_size=rows * tokens))
    return torch.tensor(every).view(rows, tokens)


def places(group: Group, rows: int, tokens: int) -> list[tuple[int, int]]:
    """(row, token) of each real token of a group, in the order in which they are computed."""
    chosen = list(range(rows)) if group.rows is None else group.rows.tolist()
    wide = torch.arange(tokens).expand(len(chosen), -1) if group.tokens is None else group.tokens
    found = [(row, t) for row, line in zip(chosen, wide.tolist(), strict=True) for t in line]
    return found if group.real is None else [found[i] for i in group.real.tolist()]


@given(masks(), st.booleans())
def test_every_selected_token_is_in_one_group(mask: Tensor, one: bool) -> None:
    """And nobody else is; tokens of a row keep their order; a row lies in one group."""
    groups = groups_of(mask, CPU, one=one)
    found = [place for group in groups for place in places(group, *mask.shape)]
    assert sorted(found) == [tuple(place) for place in mask.nonzero().tolist()]
    assert len(groups) <= (1 if one else len(mask))
    for group in groups:
        inside = places(group, *mask.shape)
        assert inside == sorted(inside)
    rows = [{row for row, _ in places(group, *mask.shape)} for group in groups]
    assert sum(map(len, rows)) == len(set().union(*rows))


@given(masks(), st.booleans(), st.sampled_from([(-2, (2, 3)), (-1, ()), (-2, (4,))]))
def test_put_after_take_restores(
    mask: Tensor, one: bool, form: tuple[int, tuple[int, ...]]
) -> None:
    """In the places selected, and only there. Values: [B, T], [B, T, d] or [B, 2, T, 3]."""
    dim, beside = form
    rows, tokens = mask.shape
    shape = {(): (rows, tokens), (4,): (rows, tokens, 4), (2, 3): (rows, 2, tokens, 3)}[beside]
    value = torch.arange(1.0, 1 + torch.Size(shape).numel()).view(shape)
    target = torch.zeros(shape)
    for group in groups_of(mask, CPU, one=one):
        taken = group.take(value, dim)
        assert taken.shape[0] * taken.shape[dim] == group.size
        group.put(target, taken, dim)
    where = mask if not beside else mask[..., None] if len(beside) == 1 else mask[:, None, :, None]
    assert torch.equal(target, value * where)


@given(masks())
def test_what_is_alike_for_all_rows_is_taken_for_each(mask: Tensor) -> None:
    """A side input of batch 1 gives what the same input, repeated for every row, gives."""
    rows, tokens = mask.shape
    shared = torch.arange(2.0 * tokens * 3).view(1, 2, tokens, 3)
    for group in groups_of(mask, CPU):
        taken = group.take(shared, -2)
        own = group.take(shared.expand(rows, -1, -1, -1), -2)
        assert torch.equal(taken.expand_as(own), own)


@given(masks())
def test_columns_of_the_groups_own_tokens(mask: Tensor) -> None:
    """mask[b, h, i, j] = square[b, h, token i, token j]: tokens see each other alone."""
    rows, tokens = mask.shape
    square = torch.arange(rows * tokens * tokens).view(rows, 1, tokens, tokens)
    for group in groups_of(mask, CPU):
        own = group.take_keys(group.take(square, -2))
        chosen = range(rows) if group.rows is None else group.rows.tolist()
        for i, row in enumerate(chosen):
            at = torch.arange(tokens) if group.tokens is None else group.tokens[i]
            assert torch.equal(own[i, 0], square[row, 0][at][:, at])


@given(st.lists(st.integers(0, 400), min_size=1, max_size=8))
def test_padding_is_bounded(counts: list[int]) -> None:
    """At most SLACK tokens of a group, or WASTE of its real ones; `one` pads to the longest."""
    mask = torch.arange(400) < torch.tensor(counts)[:, None]
    groups = groups_of(mask, CPU)
    assert sum(len(places(group, *mask.shape)) for group in groups) == sum(counts)
    for group in groups:
        real = len(places(group, *mask.shape))
        assert group.size - real <= max(SLACK, WASTE * real)
    single = groups_of(mask, CPU, one=True)
    assert sum(group.size for group in single) == max(counts) * sum(map(bool, counts))


def test_whole_rows_and_everybody_are_not_gathered() -> None:
    assert groups_of(torch.ones(3, 4, dtype=torch.bool), CPU)[0].tokens is None
    whole = everybody(3, 4)
    value = torch.randn(3, 4, 2)
    assert whole.take(value, -2) is value
    rows = groups_of(torch.tensor([[True] * 4, [False] * 4, [True] * 4]), CPU)
    assert [group.tokens for group in rows] == [None]
    assert rows[0].rows is not None
    assert rows[0].rows.tolist() == [0, 2]
    assert groups_of(torch.zeros(2, 3, dtype=torch.bool), CPU) == []


@given(masks(), st.sampled_from([(-2, (2, 3)), (-2, (4,))]))
def test_a_crowd_is_one_row_of_all(mask: Tensor, form: tuple[int, tuple[int, ...]]) -> None:
    """Every selected token once and no padding; what it takes it puts back in place."""
    dim, beside = form
    rows, tokens = mask.shape
    shape = (rows, tokens, 4) if beside == (4,) else (rows, 2, tokens, 3)
    value = torch.arange(1.0, 1 + torch.Size(shape).numel()).view(shape)
    target = torch.zeros(shape)
    groups = crowd_of(mask, CPU)
    assert len(groups) <= 1
    assert sum(group.size for group in groups) == int(mask.sum())
    for group in groups:
        taken = group.take(value, dim)
        assert taken.shape[0] * taken.shape[dim] == group.size
        shared = value[:1].clone()
        own = group.take(shared.expand(shape), dim)
        assert torch.equal(group.take(shared, dim).expand_as(own), own)
        group.put(target, taken, dim)
    where = mask[..., None] if beside == (4,) else mask[:, None, :, None]
    assert torch.equal(target, value * where)
