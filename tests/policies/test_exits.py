"""Measures of confidence by hand, settings that cannot be, and layer dropout's draws."""

import json
import math

import pytest
import torch

from hosts import HOSTS
from trol.depth import attach, readout, trace
from trol.depth.policy import from_settings, resolve, to_settings
from trol.errors import UsageError
from trol.host.trainer import checkpoint_activations
from trol.policies.exits import (
    MEASURES,
    EarlyExit,
    LayerDropout,
    entropy,
    margin,
    patience,
    saturation,
)


def test_measures_by_hand() -> None:
    shares = torch.tensor([[0.7, 0.2, 0.1, 0.0], [0.25, 0.25, 0.25, 0.25]])
    logits = shares.log()  # with one of -inf
    spread = -sum(p * math.log(p) for p in (0.7, 0.2, 0.1))
    assert entropy(logits)[0].tolist() == pytest.approx([1 - spread / math.log(4), 0], abs=1e-6)
    assert margin(logits)[0].tolist() == pytest.approx([0.5, 0], abs=1e-6)
    nothing, said = saturation(logits)
    assert nothing.tolist() == [0, 0]
    later = torch.tensor([[0.5, 0.3, 0.1, 0.1], [0.25, 0.25, 0.25, 0.25]]).log()
    assert saturation(later, said)[0].tolist() == pytest.approx([0.8, 1], abs=1e-6)
    counts, kept = [], None
    for best in (1, 1, 1, 0, 0):
        count, kept = patience(torch.eye(4)[best], kept)
        counts.append(count.item())
    assert counts == [0, 1, 2, 0, 1]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"measure": "margins"}, "Did you mean 'margin'"),
        ({"threshold": 1.5}, r"1.5, but margin lies in \[0, 1\]"),
        ({"threshold": float("nan")}, "nan"),
        ({"threshold": [0.5, -0.1]}, "-0.1"),
        ({"threshold": "a"}, "threshold is 'a'; give a number"),
        ({"threshold": []}, "one for each look"),
        ({"measure": "patience", "threshold": 0.5}, "counts looks"),
        ({"measure": "patience", "threshold": 1.5}, "counts looks"),
        ({"first": -1}, "0 or more"),
        ({"every": 0}, "every is 0; give a whole number, 1 or more"),
        ({"scope": "answers"}, "Did you mean 'answer'"),
    ],
)
def test_settings_that_cannot_be(settings: dict, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        EarlyExit(**settings)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"first": 4}, "the stack has layers 0 to 3"),
        ({"threshold": [0.5, 0.5]}, r"2 thresholds for 3 looks \(before layers 1, 2, 3\)"),
        ({"measure": "saturation", "first": 3}, "the only one is before layer 3"),
        ({"measure": "patience", "threshold": 1, "every": 3}, "compares looks"),
    ],
)
def test_settings_that_do_not_fit_a_stack(settings: dict, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        attach(HOSTS["llama"].build(), EarlyExit(**settings))


@pytest.mark.parametrize(
    "policy",
    [
        EarlyExit(),
        EarlyExit("entropy", [0.5, 0.6], first=2, every=2, scope="all", heads=True),
        EarlyExit("patience", 2, skipped_kv="hole"),
        LayerDropout(0.3),
    ],
)
def test_settings_make_the_policy_again(policy: EarlyExit | LayerDropout) -> None:
    again = from_settings(json.loads(json.dumps(to_settings(policy))))
    assert again == policy
    assert repr(again) == repr(policy)
    assert type(resolve(policy.name)) is type(policy)


def test_layer_dropout_s_curve() -> None:
    """p_0 = 0, p_(L-1) = rate, and exponential between."""
    policy = LayerDropout(0.2)
    shares = [policy.share(layer, 5) for layer in range(5)]
    assert shares == pytest.approx([0.2 * (2 ** (layer / 4) - 1) for layer in range(5)])
    assert (shares[0], shares[-1]) == (0, pytest.approx(0.2))
    assert LayerDropout(0.2).share(0, 1) == 0
    for rate in (-0.1, 1.0):
        with pytest.raises(UsageError, match=r"\[0, 1\)"):
            LayerDropout(rate)


def test_layer_dropout_draws_for_each_row() -> None:
    """A whole row goes through or does not, as often as the curve says; never in evaluation."""
    host = HOSTS["llama"]
    model, inputs = host.build(), host.inputs(batch=400, length=2)
    bare = model(**inputs).logits
    attach(model, LayerDropout(0.6))
    assert torch.equal(model(**inputs).logits, bare)
    with torch.no_grad(), trace(model) as seen:
        model.train()(**inputs)
    assert (seen.visits == seen.visits[..., :1]).all()
    shares = 1 - seen.visits[..., 0].float().mean(1)
    expected = torch.tensor([LayerDropout(0.6).share(layer, 4) for layer in range(4)])
    assert shares[0] == 0
    assert (shares - expected).abs().max() < 0.08  # 3 standard deviations of 400 draws
    with torch.no_grad(), trace(model) as other:
        model(**inputs)
    assert not torch.equal(other.visits, seen.visits)


@pytest.mark.parametrize("settings", [{}, {"use_reentrant": True}, {"preserve_rng_state": False}])
def test_a_layer_that_runs_again_draws_the_same(settings: dict) -> None:
    """Gradient checkpointing: the same rows skip in the backward pass, whatever it does to RNG."""
    host, results = HOSTS["llama"], []
    inputs = host.inputs(batch=4)
    for checkpointing in (None, {"use_reentrant": False} | settings):
        model = attach(host.build(), LayerDropout(0.7)).train()
        if checkpointing is not None:
            checkpoint_activations(model, **checkpointing)
            model.enable_input_require_grads()
        torch.manual_seed(5)
        model(**inputs, labels=inputs["input_ids"], use_cache=False).loss.backward()
        results.append({name: p.grad for name, p in model.named_parameters()})
    plain, again = results
    for name, gradient in plain.items():
        if gradient is not None:
            assert (again[name] - gradient).abs().max() <= 1e-5 * (1 + gradient.abs().max()), name


@pytest.mark.parametrize("measure", MEASURES)
@torch.no_grad()
def test_looks_read_no_more_logits_at_once_than_allowed(
    measure: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And tokens leave where they do when all are read at once."""
    host = HOSTS["llama"]
    threshold = 1 if measure == "patience" else 0.02
    model = attach(host.build(), EarlyExit(measure, threshold, scope="all"))
    inputs, made = host.inputs(batch=2), []
    with trace(model) as expected:
        logits = model(**inputs).logits
    words = model.config.vocab_size
    monkeypatch.setattr(readout, "LOGITS_AT_ONCE", 3 * words)
    last = model.get_output_embeddings().register_forward_hook(
        lambda _, __, out: made.append(out.numel() // words)
    )
    with trace(model) as seen:
        assert torch.allclose(model(**inputs).logits, logits, atol=1e-5)
    last.remove()
    assert torch.equal(seen.visits, expected.visits)
    assert max(made[:-1]) <= 3  # the last are the model's own
