"""Layers that plans share run once: the same losses to the last digit, and few layers run."""

from collections import Counter
from typing import Any

import pytest
import torch

from hosts import HOSTS
from trol.depth import Plan, is_attached
from trol.evaluation import shared_layers
from trol.evaluation.hidden_states import layers_of
from trol.evaluation.items import Item
from trol.evaluation.shared_layers import PlanLosses
from trol.host.layers import find_decoder, layer_list
from trol.policies.planned import plan_keeping

FAMILIES = ("llama", "gemma3", "gpt2", "falcon_h1", "qwen3_vl", "llava")
FULL = Plan("all")
ROWS = [Item(None, "", "", "")] * 2
"""What the two rows of a batch stand for: questions, which count alike."""


def batch_of(host: Any) -> dict[str, torch.Tensor]:
    """Two rows with answers, the second one padded; pictures in both where the host sees."""
    inputs = dict(host.inputs(batch=2))
    labels = inputs["input_ids"].clone()
    labels[:, :-4] = -100
    inputs.setdefault("attention_mask", torch.ones_like(labels))
    if host.picture is None:
        inputs["attention_mask"][1, -2:] = 0
        labels[1, -2:] = -100
    return {**inputs, "labels": labels}


def losses_of(model: Any, host: Any, monkeypatch: Any, scope: Any, first: int) -> PlanLosses:
    monkeypatch.setattr(shared_layers, "batches", lambda *_: [()])
    monkeypatch.setattr(shared_layers, "labelled", lambda *_: batch_of(host))
    return PlanLosses(model, None, ROWS, scope, first)


def plans(layers: int) -> list[tuple[Plan, Plan]]:
    """Plans beside their bases: one layer less, one more, another visit of one, all as they are."""
    rounds = []
    for base in (set(range(layers)), {0, 2, 3}, {1, 2}):
        kept = plan_keeping(base, layers)
        others = [plan_keeping(base ^ {layer}, layers) for layer in range(layers)]
        rounds += [(other, kept) for other in [*others, kept, FULL]]
    return rounds


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("scope", ["answer", "question", "all"])
@pytest.mark.parametrize("name", FAMILIES)
def test_losses_are_those_of_whole_runs_to_the_last_digit(
    name: str, scope: str, first: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = HOSTS[name]
    model = host.build()
    shares = losses_of(model, host, monkeypatch, scope, first)
    shared = [shares.of(plan, base) for plan, base in plans(layers_of(model))]
    monkeypatch.setattr(shared_layers, "RECORDED", 0)
    alone = losses_of(model, host, monkeypatch, scope, first)
    assert shared == [alone.of(plan, base) for plan, base in plans(layers_of(model))]
    assert all(run.entered for run in shares.runs.runs)
    assert not any(run.entered for run in alone.runs.runs)
    assert len(set(shared)) > layers_of(model)
    assert not is_attached(model)


def test_a_plan_costs_the_layers_from_the_first_that_differs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    host = HOSTS["llama"]
    model, ran = host.build(), Counter[int]()
    losses = losses_of(model, host, monkeypatch, "all", 0)
    losses.of(FULL, FULL)
    parts = [layer.mlp for layer in layer_list(find_decoder(model)) or ()]
    hooks = [
        part.register_forward_hook(lambda *_, at=at: ran.update([at]))
        for at, part in enumerate(parts)
    ]
    losses.of(plan_keeping({0, 1, 3}, 4), FULL)
    assert ran == {3: 1}
    ran.clear()
    losses.of(plan_keeping({0, 2, 3}, 4), FULL)
    assert ran == {2: 1, 3: 1}
    ran.clear()
    losses.of(plan_keeping({0, 2}, 4), plan_keeping({0, 2, 3}, 4))  # the base is recorded anew
    assert ran == {2: 1, 3: 1}
    for hook in hooks:
        hook.remove()


def test_recorded_states_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches above the bound run whole, and the loss stays what it was."""
    host = HOSTS["llama"]
    model = host.build()
    monkeypatch.setattr(shared_layers, "batches", lambda *_: [(), (), ()])
    monkeypatch.setattr(shared_layers, "labelled", lambda *_: batch_of(host))
    plan, base = plan_keeping({0, 1, 3}, 4), plan_keeping({0, 1, 2, 3}, 4)
    expected = PlanLosses(model, None, 3 * ROWS, "all").of(plan, base)
    one = batch_of(host)["input_ids"].numel() * model.config.hidden_size * 4
    monkeypatch.setattr(shared_layers, "RECORDED", 2 * one)
    losses = PlanLosses(model, None, 3 * ROWS, "all")
    assert losses.of(plan, base) == expected
    held = [sum(states.numel() for states in run.entered) for run in losses.runs.runs]
    assert held == [one, one, 0]
