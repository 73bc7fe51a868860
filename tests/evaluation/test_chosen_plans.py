"""Chosen plans: the layers that do nothing go first, and greedy never chooses a worse one."""

from collections.abc import Iterator
from itertools import combinations
from typing import Any

import pytest
import torch

from training import standins
from trol.depth import Plan, is_attached
from trol.errors import UsageError
from trol.evaluation import plan_search
from trol.evaluation.items import Item
from trol.evaluation.plan_search import MEASURED, METHODS, chosen_plan, keep_first_text, plan_loss
from trol.evaluation.store import Measurements
from trol.family.loading import load_model
from trol.policies.planned import STATIC, plan_keeping, static_plan

ITEMS = [
    Item(None, question, answer, "words")
    for question, answer in zip(standins.ASKED, standins.ANSWERED, strict=True)
]
LAYERS, IDLE = 5, (1, 3)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple]:
    """A Llama of five layers, of which two do nothing."""
    folder = standins.llm(tmp_path_factory.mktemp("llama"), num_hidden_layers=LAYERS)
    opened, processor = load_model(folder)
    torch.manual_seed(0)
    for weight in opened.parameters():
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=0.15)
    for layer in IDLE:
        opened.model.layers[layer].self_attn.o_proj.weight.data.zero_()
        opened.model.layers[layer].mlp.down_proj.weight.data.zero_()
    yield opened, processor
    assert not is_attached(opened)


@pytest.mark.parametrize("scope", ["answer", "all"])
def test_influence_takes_the_idle_layers_first(model: tuple, scope: str) -> None:
    for keep, kept in ((0.8, (0, 1, 2, 4)), (0.6, (0, 2, 4)), (1.0, range(LAYERS))):
        made = chosen_plan("influence", *model, ITEMS, keep, scope=scope)
        assert made.plan == plan_keeping(kept, LAYERS)


@pytest.mark.parametrize("scope", ["answer", "question", "all"])
def test_greedy_takes_what_costs_least_at_each_step(model: tuple, scope: str) -> None:
    first = 0 if scope == "answer" else 1

    def loss(kept: tuple[int, ...]) -> float:
        return plan_loss(*model, ITEMS, plan_keeping(kept, LAYERS), scope, keep_first=first)

    stays = tuple(range(LAYERS))
    for keep in (0.8, 0.6, 0.4):
        stays = min(combinations(stays, len(stays) - 1), key=loss)
        made = chosen_plan("greedy", *model, ITEMS, keep, scope=scope)
        assert sum(made.plan.visits) == len(stays)
        assert made.losses[keep_first_text(first)] == pytest.approx(loss(stays), abs=1e-6)
        assert made.losses["full"] == pytest.approx(loss(tuple(range(LAYERS))), abs=1e-6)


@pytest.mark.parametrize("scope", ["answer", "question", "all"])
@pytest.mark.parametrize("method", [one for one in METHODS if one != "draft"])
def test_first_tokens_keep_full_depth_where_that_is_better(
    model: tuple, method: str, scope: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = chosen_plan(method, *model, ITEMS, 0.6, scope=scope)
    if method in STATIC and scope == "answer":
        assert made.losses == {}
        assert made.keep_first == 0
        return
    tried = [0] if scope == "answer" else [0, 1]
    each = {n: plan_loss(*model, ITEMS, made.plan, scope, keep_first=n) for n in tried}
    assert set(made.losses) == {"full", *map(keep_first_text, tried)}
    for first, value in each.items():
        assert made.losses[keep_first_text(first)] == pytest.approx(value, abs=1e-6)
    assert made.keep_first == min(tried, key=each.__getitem__)
    assert made.loss == min(made.losses[keep_first_text(n)] for n in tried)
    # The other way round, the other number is taken.
    whole = plan_search._Search.loss

    def turned(self: Any, plan: Plan, base: Plan, keep_first: int | None = None) -> float:
        return -whole(self, plan, base, keep_first)

    if method in STATIC and each.get(0) != each.get(1):
        monkeypatch.setattr(plan_search._Search, "loss", turned)
        assert chosen_plan(method, *model, ITEMS, 0.6, scope=scope).keep_first != made.keep_first


def test_scopes_are_measured_apart(model: tuple) -> None:
    plan = plan_keeping((0, 4), LAYERS)
    assert plan_loss(*model, ITEMS, plan, "answer") != plan_loss(*model, ITEMS, plan, "all")
    spares = plan_loss(*model, ITEMS, plan, "all", keep_first=1)
    assert spares != plan_loss(*model, ITEMS, plan, "all")


@pytest.mark.parametrize("scope", ["answer", "all"])
@pytest.mark.parametrize("method", [one for one in METHODS if one != "draft"])
def test_a_choice_is_the_same_again_and_tells_how_far_it_is(
    model: tuple, method: str, scope: str
) -> None:
    reported: list[tuple[int, int]] = []
    kept = Measurements()
    words = {"scope": scope, "measured": kept}
    made = chosen_plan(
        method, *model, ITEMS, 0.4, progress=lambda *one: reported.append(one), **words
    )
    count = len(kept.values)
    assert made == chosen_plan(method, *model, ITEMS, 0.4, **words)
    assert len(kept.values) == count  # nothing was measured twice
    if method in STATIC and scope == "answer":
        assert made.plan == static_plan(method, LAYERS, 0.4)
        assert not reported
        return
    assert reported[0][0] == 0
    assert [done for done, _ in reported] == sorted(done for done, _ in reported)
    assert reported[-1][0] == reported[-1][1] >= count


def test_no_number_is_no_choice(model: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan under which the model overflows is the worst, not the best."""
    values = [float("nan"), *[1.0] * (len(ITEMS) - 1)]
    monkeypatch.setattr("trol.evaluation.plan_search.losses", lambda *_: values)
    assert plan_loss(*model, ITEMS, plan_keeping((0,), LAYERS), "all") == float("inf")


@pytest.mark.parametrize("method", MEASURED)
def test_refusals(model: tuple, method: str) -> None:
    for keep in (0.0, 1.5, -1.0):
        with pytest.raises(UsageError, match="give a number above 0 and at most 1"):
            chosen_plan(method, *model, ITEMS, keep)
    with pytest.raises(UsageError, match="got none; give at least one"):
        chosen_plan(method, *model, [], 0.5)


def test_an_unknown_method(model: tuple) -> None:
    with pytest.raises(UsageError, match="Did you mean 'greedy'"):
        chosen_plan("greed", *model, ITEMS, 0.5)
