"""A controller's settings, its modules, and what it costs to let tokens through."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import trol
from hosts import HOSTS
from trol.depth import attach, attached, detach, trace
from trol.depth.attachment import gates_of
from trol.errors import AdapterError, UsageError
from trol.family import TrolForConditionalGeneration, tiny
from trol.policies.controller import Controller, ControllerNet, sinusoids


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"input": "hiden"}, "Did you mean 'hidden'"),
        ({"hidden_layers": -1}, "hidden_layers is -1"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"initial": 1.0}, "initial is 1.0"),
        ({"alpha": -1.0}, "alpha is -1.0"),
        ({"weight": float("nan")}, "weight is nan"),
        ({"target": 1.5}, "target is 1.5"),
        ({"target": 0.0}, "target is 0.0"),
        ({"target": 0.5, "alpha": 0.1}, "contradict each other"),
        ({"scope": "answers"}, "Did you mean 'answer'"),
    ],
)
def test_settings_out_of_range_are_told(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        Controller(**settings)


def test_stacks_that_it_does_not_fit() -> None:
    with pytest.raises(UsageError, match="this stack has 2"):
        attach(HOSTS["llama"].build(layers=2), Controller())
    with pytest.raises(UsageError, match=r"target is 0\.4, .* give 0\.5 or more"):
        attach(HOSTS["llama"].build(), Controller(target=0.4))


@pytest.mark.parametrize(("hidden_layers", "shapes"), [(0, [(2, 32)]), (1, [(4, 32), (2, 4)])])
def test_a_module_on_every_layer_but_the_first_and_the_last(
    hidden_layers: int, shapes: list[tuple[int, int]]
) -> None:
    """One policy can be put on stacks of two heights: it is the same on both."""
    policy = Controller(hidden_layers=hidden_layers)
    for layers in (4, 6):
        model = attach(HOSTS["llama"].build(layers=layers), policy)
        first, *inner, last = gates_of(attached(model)[1])
        assert first is None
        assert last is None
        assert [[tuple(w.shape) for w, _ in gate.maps] for gate in inner] == [shapes] * (layers - 2)
    assert policy == Controller(hidden_layers=hidden_layers)


@pytest.mark.parametrize("initial", [0.2, 0.95])
@pytest.mark.parametrize("temperature", [0.5, 1.2])
def test_the_first_probability_is_the_one_asked_for(initial: float, temperature: float) -> None:
    """At any temperature; drawn in training, the likelier choice otherwise."""
    gate = ControllerNet(32, 1, initial)
    states, everywhere = torch.randn(40, 100, 32), torch.ones(40, 100, dtype=torch.bool)
    torch.manual_seed(0)
    drawn = gate.train()(states, everywhere, temperature)
    assert set(drawn.round(decimals=5).unique().tolist()) == {0.0, 1.0}
    assert abs(drawn.mean().item() - initial) < 4 * math.sqrt(initial * (1 - initial) / 4000)
    taken = gate.eval()(states, everywhere, temperature)
    assert (taken == float(initial > 0.5)).all()
    assert not torch.equal(ControllerNet(32, 0, None).weight_0, ControllerNet(32, 0, None).weight_0)


def test_half_precision_modules_decide_in_single_precision() -> None:
    gate = ControllerNet(32, 0, None).bfloat16()
    states = torch.randn(2, 3, 32, dtype=torch.bfloat16)
    assert gate.logits(states.float()).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        taken = gate.eval()(states, torch.ones(2, 3, dtype=torch.bool), 1.0)
    logits = states.float() @ gate.weight_0.float().T + gate.bias_0.float()
    assert torch.equal(taken, (logits[..., 1] >= logits[..., 0]).float())


def test_nothing_that_looks_for_linear_maps_finds_one() -> None:
    assert not any(isinstance(m, nn.Linear) for m in ControllerNet(64, 2, 0.9).modules())


@pytest.mark.parametrize("width", [6, 7])
def test_sinusoids(width: int) -> None:
    """Sines, then cosines, of wavelengths from 2 pi to 10,000 times that; each place differs."""
    found = sinusoids(torch.arange(50)[None], width)
    assert found.shape == (1, 50, width)
    half = (width + 1) // 2
    assert torch.allclose(found[0, :, 0], torch.arange(50.0).sin(), atol=1e-5)
    assert torch.allclose(found[0, :, half], torch.arange(50.0).cos(), atol=1e-5)
    assert torch.cdist(found[0], found[0]).fill_diagonal_(1).min() > 1e-2


@pytest.mark.parametrize("wish", [{"alpha": 0.3}, {"target": 0.75, "weight": 2.0}, {}])
def test_the_penalty_is_that_of_the_visits_made(wish: dict[str, float]) -> None:
    """By the trace, over answer tokens of uneven rows; nothing at evaluation."""
    host = HOSTS["llama"]
    rows = host.left_padded((5, 9, 7)).batch
    labels = rows["input_ids"].where(rows["attention_mask"].bool(), -100)
    labels[:, :-4] = -100
    losses = {}
    for policy in (Controller(initial=0.5), Controller(initial=0.5, **wish)):
        model = attach(host.build(), policy).train()
        torch.manual_seed(1)
        with torch.no_grad(), trace(model) as seen:
            losses[policy.alpha + (policy.target or 0)] = model(**rows, labels=labels).loss
        again = model.eval()(**rows, labels=labels).loss
        detach(model)
        assert torch.equal(again, model(**rows, labels=labels).loss)  # 0.5 goes through
    executed = seen.visits[:, labels != -100].float().mean().item()
    assert 0.5 < executed < 1
    penalty = wish.get("alpha", 0.0) * executed
    if "target" in wish:
        penalty = wish["weight"] * (executed - wish["target"]) ** 2
    (plain, *more) = losses.values()
    assert (more[0] if more else plain) - plain == pytest.approx(penalty, abs=1e-5)


@pytest.mark.parametrize(
    "policy",
    [
        {"policy": "controller", "hidden_layers": 1},
        {"policy": "router", "menu": ["0-1", "all"], "hidden": 4},
        {"policy": "trol_mixer", "initial_gate": 0.001},
    ],
    ids=lambda policy: policy["policy"],
)
def test_a_saved_model_opened_with_another_policy_starts_it_afresh(
    policy: dict[str, Any], tmp_path: Path
) -> None:
    """What the checkpoint lacks gets the policy's own first values, not whatever memory held."""
    TrolForConditionalGeneration(tiny(50, depth={"policy": "plain"})).save_pretrained(tmp_path)
    model = TrolForConditionalGeneration.from_pretrained(tmp_path, depth=policy)
    for gate in gates_of(attached(model)[1]):
        for name, parameter in () if gate is None else gate.named_parameters():
            assert 1e-9 < parameter.abs().max() < 8 or name in ("weight", "weight_1"), name
    gate = next(gate for gate in gates_of(attached(model)[1]) if gate is not None)
    if policy["policy"] == "controller":
        assert gate.bias_1.softmax(0)[1].item() == pytest.approx(0.95)
        assert gate.weight_1.abs().max() == 0
    if policy["policy"] == "trol_mixer":
        states = torch.randn(1, 3, gate.weight.shape[1])
        torch.testing.assert_close(gate(states), torch.full((1, 3), 0.001))


def test_an_adapter_of_another_host_or_width_is_refused(tmp_path: Path) -> None:
    trol.save(attach(HOSTS["llama"].build(), Controller(hidden_layers=1)), tmp_path)
    for other in (HOSTS["qwen2"].build(), HOSTS["llama"].build(layers=6)):
        with pytest.raises(AdapterError, match="load it onto the model it was trained on"):
            trol.load(other, tmp_path)
    again = trol.load(HOSTS["llama"].build(), tmp_path)
    assert attached(again)[1].depth_policy == trol.Controller(hidden_layers=1)
