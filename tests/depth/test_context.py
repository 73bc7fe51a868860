"""What a policy is told of a call: places, padding, and what it keeps along with the cache."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from hosts import HOSTS
from trol.depth import AbstractPolicy, Answer, Bounds, Visit, attach
from trol.depth.roles import INPUT, Context
from trol.errors import HostError
from trol.host.names import CACHE

STATE = torch.zeros(2, 3, 4)
PADDING = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 0]])
"""A row padded on the left, one on the right; of five columns the call has the last three."""


def test_positions_do_not_count_padding() -> None:
    assert Context(start=4).positions(STATE).tolist() == [[4, 5, 6]]
    padded = Context(start=2, padding=PADDING)
    assert padded.positions(STATE).tolist() == [[0, 1, 2], [2, 3, 3]]


def test_real_tokens_and_those_in_scope() -> None:
    assert Context().real(STATE).all()
    padded = Context(padding=PADDING, in_scope=torch.tensor([[True, False, True]] * 2))
    assert padded.real(STATE).tolist() == [[True, True, True], [True, True, False]]
    assert padded.scope(STATE).tolist() == [[True, False, True], [True, False, False]]
    assert not Context(in_scope=False).scope(STATE).any()


class Watcher(AbstractPolicy):
    """The plain model, that writes down what it is told before layer `layer`."""

    name = "watcher"
    reads_start = True
    reads_input = True
    observes = True

    def __init__(self, layer: int = 1) -> None:
        super().__init__()
        self.layer = layer
        self.positions: list[Tensor] = []
        self.kept: list[Tensor] = []
        self.told: list[tuple[bool, int, bool]] = []

    def bounds(self, layer: int) -> Bounds:
        return Bounds(0 if layer == self.layer else 1, 1)

    def again(self, visit: Visit) -> Answer:
        if visit.layer == self.layer:
            context = visit.context
            self.positions.append(context.positions(visit.state))
            self.kept.append(
                visit.keep_with_cache(self.positions[-1].expand(visit.state.shape[:2]))
            )
            entered = context.notes[INPUT].shape == visit.state.shape
            self.told.append((context.training, context.layers, entered))
        return 1.0

    def settings(self) -> dict[str, Any]:
        return {"layer": self.layer}


def _watched() -> tuple[Any, Watcher]:
    policy = Watcher()
    return attach(HOSTS["llama"].build(), policy), policy


def test_what_a_call_is_told() -> None:
    model, policy = _watched()
    inputs = HOSTS["llama"].inputs()
    model(**inputs)
    model.train()(**inputs)
    assert policy.told == [(False, 4, True), (True, 4, True)]


@torch.no_grad()
def test_places_in_generation_are_those_of_the_rows_alone() -> None:
    rows = HOSTS["llama"].left_padded((3, 5))
    model, policy = _watched()
    model.generate(**rows.batch, max_new_tokens=3, do_sample=False)
    assert [p.tolist() for p in policy.positions] == [
        [[0, 0, 0, 1, 2], [0, 1, 2, 3, 4]],
        [[3], [5]],
        [[4], [6]],
    ]
    assert [kept.shape[1] for kept in policy.kept] == [5, 6, 7]
    assert policy.kept[-1].tolist() == [[0, 0, 0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5, 6]]


@torch.no_grad()
def test_what_is_kept_goes_with_the_cache() -> None:
    """Cropped, reordered and repeated as keys and values are; without a cache nothing is kept."""
    host = HOSTS["llama"]
    model, policy = _watched()
    ids = host.inputs(batch=2, length=8)["input_ids"]
    mask = torch.tensor([[0] * 2 + [1] * 4, [1] * 6])
    cache = DynamicCache(config=model.config)
    model(ids[:, :6], attention_mask=mask, **{CACHE: cache})
    first = [[0, 0, 0, 1, 2, 3], [0, 1, 2, 3, 4, 5]]
    assert policy.kept[-1].tolist() == first
    cache.crop(-2)
    cache.reorder_cache(torch.tensor([1, 0]))
    cache.batch_repeat_interleave(2)
    model(ids[[1, 1, 0, 0], 4:6], **{CACHE: cache})
    assert policy.kept[-1].tolist() == [[0, 1, 2, 3, 4, 5]] * 2 + [[0, 0, 0, 1, 4, 5]] * 2
    cache.batch_select_indices(torch.tensor([0, 3]))
    model(ids[[1, 0], 6:7], **{CACHE: cache})
    assert policy.kept[-1].tolist() == [[0, 1, 2, 3, 4, 5, 6], [0, 0, 0, 1, 4, 5, 6]]
    model(ids[:, 6:], use_cache=False)
    assert policy.kept[-1].tolist() == [[0, 1]] * 2


@torch.no_grad()
def test_a_cache_that_others_filled_is_refused() -> None:
    host = HOSTS["llama"]
    plain, ids = host.build(), host.inputs()["input_ids"]
    cache = plain(ids)[CACHE]
    model, _ = _watched()
    with pytest.raises(HostError, match="holds 9 tokens that the policy in force never looked at"):
        model(ids[:, :1], **{CACHE: cache})
