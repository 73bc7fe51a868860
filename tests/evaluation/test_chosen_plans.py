"""Chosen plans: the layers that do nothing go first, and greedy never chooses a worse one."""

from collections.abc import Iterator
from itertools import combinations

import pytest
import torch

from training import standins
from trol.depth import is_attached
from trol.errors import UsageError
from trol.evaluation.items import Item
from trol.evaluation.plan_search import CHOSEN, chosen_plan, plan_loss
from trol.family.loading import load_model
from trol.policies.planned import plan_keeping

ITEMS = [
    Item(None, question, answer, "words")
    for question, answer in zip(standins.ASKED, standins.ANSWERED, strict=True)
]
LAYERS, IDLE = 5, (1, 3)
METHODS = ("influence", "greedy")


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
        assert made == plan_keeping(kept, LAYERS)


@pytest.mark.parametrize("scope", ["answer", "all"])
def test_greedy_takes_what_costs_least_at_each_step(model: tuple, scope: str) -> None:
    def loss(kept: tuple[int, ...]) -> float:
        return plan_loss(*model, ITEMS, plan_keeping(kept, LAYERS), scope)

    stays = tuple(range(LAYERS))
    for keep in (0.8, 0.6, 0.4):
        stays = min(combinations(stays, len(stays) - 1), key=loss)
        made = chosen_plan("greedy", *model, ITEMS, keep, scope=scope)
        assert sum(made.visits) == len(stays)
        assert plan_loss(*model, ITEMS, made, scope) == pytest.approx(loss(stays), abs=1e-6)


def test_scopes_are_measured_apart(model: tuple) -> None:
    plan = plan_keeping((0, 4), LAYERS)
    assert plan_loss(*model, ITEMS, plan, "answer") != plan_loss(*model, ITEMS, plan, "all")


@pytest.mark.parametrize("method", METHODS)
def test_a_choice_is_the_same_again_and_tells_how_far_it_is(model: tuple, method: str) -> None:
    reported: list[tuple[int, int]] = []
    made = chosen_plan(
        method, *model, ITEMS, 0.4, progress=lambda done, of: reported.append((done, of))
    )
    assert made == chosen_plan(method, *model, ITEMS, 0.4)
    of = {"influence": 1, "greedy": 5 + 4 + 3}[method]
    assert reported == [(done, of) for done in range(of + 1)]


def test_no_number_is_no_choice(model: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan under which the model overflows is the worst, not the best."""
    monkeypatch.setattr("trol.evaluation.plan_search.losses", lambda *_: [1.0, float("nan")])
    assert plan_loss(*model, ITEMS, plan_keeping((0,), LAYERS), "all") == float("inf")


@pytest.mark.parametrize("method", CHOSEN)
def test_refusals(model: tuple, method: str) -> None:
    for keep in (0.0, 1.5, -1.0):
        with pytest.raises(UsageError, match="give a number above 0 and at most 1"):
            chosen_plan(method, *model, ITEMS, keep)
    with pytest.raises(UsageError, match="got none; give at least one"):
        chosen_plan(method, *model, [], 0.5)


def test_an_unknown_method(model: tuple) -> None:
    with pytest.raises(UsageError, match="Did you mean 'greedy'"):
        chosen_plan("greed", *model, ITEMS, 0.5)
