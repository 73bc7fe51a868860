"""TrolMixer's thresholds: one or one for each layer, layers without a second visit, refusals."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from hosts import HOSTS
from laws.naive import naive_logits
from laws.subjects import attach_settled, gap, gates_as_tensors
from trol.checkpoints.adapter import load, save
from trol.depth import attach, attached, depth, detach, trace
from trol.depth.attachment import gates_of
from trol.depth.policy import from_settings, to_settings
from trol.errors import UsageError
from trol.family import TrolForConditionalGeneration, tiny
from trol.host.layers import find_decoder, layer_list
from trol.policies.mixer import TrolMixer
from trol.training.recipe import resolve

MIXED = (0.4, None, 0.0, 0.6)
"""Thresholds for the four layers of a host: some go again, nobody, all, fewer."""


def test_bounds_of_each_layer() -> None:
    policy = TrolMixer(3, tau=MIXED)
    assert [tuple(policy.bounds(layer)) for layer in range(4)] == [(1, 3), (1, 1), (3, 3), (1, 3)]
    assert [policy.threshold(layer) for layer in range(4)] == list(MIXED)
    assert tuple(TrolMixer(tau=0.0).bounds(7)) == (2, 2)
    assert tuple(TrolMixer(tau=0.2).bounds(7)) == (1, 2)


def test_settings_are_json_and_back() -> None:
    for tau in (0.0, 0.3, list(MIXED), MIXED):
        policy = TrolMixer(tau=tau)
        again = from_settings(json.loads(json.dumps(to_settings(policy))))
        assert again == policy
        assert again.tau == (tuple(tau) if isinstance(tau, (list, tuple)) else tau)
    assert TrolMixer(tau=[0.3, None]) != TrolMixer(tau=[0.3, 0.0])


@pytest.mark.parametrize(
    ("tau", "said"),
    [
        (1.0, "tau is 1.0, but must lie in [0, 1)"),
        (float("nan"), "tau is nan"),
        ([0.1, 1.0], "tau of layer 1 is 1.0, but must lie in [0, 1)"),
        ([-0.1], "tau of layer 0 is -0.1"),
        ([0.1, "0.5"], "tau of layer 1 is '0.5'; give a number in [0, 1), or None"),
        ([], "tau is []; give a number in [0, 1), or a list"),
        ("0.5", "tau is '0.5'"),
        (None, "tau is None"),
    ],
)
def test_thresholds_that_cannot_be(tau: Any, said: str) -> None:
    with pytest.raises(UsageError, match=re.escape(said)):
        TrolMixer(tau=tau)


def test_a_list_of_another_length_is_refused_where_it_is_put_on() -> None:
    model = HOSTS["llama"].build()
    short = TrolMixer(tau=(0.3, None))
    with pytest.raises(UsageError, match="tau is a list of 2, but the stack has 4 layers"):
        attach(model, short)
    attach(model, TrolMixer())
    with pytest.raises(UsageError, match="list of 2"), depth(model, short):
        pass


@pytest.mark.parametrize("name", ["llama", "gemma3", "bloom"])
def test_each_token_alone(name: str) -> None:
    """As the reference that goes through the tokens one by one."""
    host = HOSTS[name]
    policy = TrolMixer(scope="all", tau=MIXED)
    model, inputs = attach_settled(host.build("eager"), policy), host.inputs(length=11)
    mixed, gates = model(**inputs, use_cache=False).logits, gates_as_tensors(model)
    detach(model)
    answer = [False] * mixed.shape[1]
    layers = layer_list(find_decoder(model))
    expected = naive_logits(model, layers, policy, inputs, answer=answer, gates=gates)
    assert gap(mixed, expected) <= 2e-5


@pytest.mark.parametrize("scope", ["question", "all"])
def test_none_is_a_gate_that_is_shut(scope: Any) -> None:
    """Layer 1 without a second visit gives what one weighed 0 gives, in prompt and answer."""
    host = HOSTS["llama"]
    inputs = host.left_padded((5, 8)).batch
    model = attach_settled(host.build(), TrolMixer(scope=scope, tau=[0.4, 0.0, 0.0, 0.6]))
    shut = gates_of(attached(model)[1])[1]
    shut.weight.data.zero_()
    shut.bias.data.fill_(-20.0)  # 0.5 * tanh(-20) + 0.5 is 0 in float32
    answer = {"max_new_tokens": 4, "do_sample": False, "output_logits": True}
    answer |= {"return_dict_in_generate": True, "pad_token_id": 0}
    seen = []
    for tau in ([0.4, 0.0, 0.0, 0.6], list(MIXED)):
        with depth(model, TrolMixer(scope=scope, tau=tau)):
            out = model.generate(**inputs, **answer)
            with trace(model) as visited:
                model(**inputs)
        seen.append((torch.stack(out.logits), visited.visits[1]))
    torch.testing.assert_close(seen[0][0], seen[1][0], atol=1e-5, rtol=1e-5)
    assert (seen[0][1] == 2).all()
    assert (seen[1][1] == 1).all()


def test_all_none_is_the_plain_model() -> None:
    host = HOSTS["llama"]
    model, inputs = host.build(), host.inputs()
    plain = model(**inputs).logits
    attach_settled(model, TrolMixer(scope="all", tau=[None] * 4))
    assert torch.equal(model(**inputs).logits, plain)


def test_saved_is_loaded(tmp_path: Path) -> None:
    """An adapter carries the thresholds; so does a TroL model's own configuration."""
    host = HOSTS["llama"]
    model, inputs = attach_settled(host.build(), TrolMixer(tau=MIXED)), host.inputs()
    expected = model(**inputs).logits
    save(model, tmp_path / "adapter")
    fresh = load(host.build(), tmp_path / "adapter")
    assert attached(fresh)[1].depth_policy == TrolMixer(tau=MIXED)
    assert torch.equal(fresh(**inputs).logits, expected)
    config = tiny(20, layers=2, depth={"policy": "trol_mixer", "tau": [0.3, None]})
    TrolForConditionalGeneration(config).save_pretrained(tmp_path / "model")
    opened = TrolForConditionalGeneration.from_pretrained(tmp_path / "model")
    assert attached(opened)[1].depth_policy.tau == (0.3, None)
    config.depth["tau"] = [0.3] * 3
    with pytest.raises(UsageError, match="list of 3"):
        TrolForConditionalGeneration(config)


def test_the_shipped_model_takes_thresholds() -> None:
    """By its configuration, and by an adapter put on in the place of its own policy."""
    from trol.family.loading import load_model

    sparse = {"policy": "trol_mixer", "tau": [0.5, None]}
    model, _ = load_model("trol-tiny", depth=sparse)
    assert attached(model)[1].depth_policy.threshold(1) is None
    assert model.config.depth == sparse


@torch.no_grad()
def test_a_mixer_that_answers_otherwise_is_asked() -> None:
    """Gate and mixture in one step are those of the mixer itself, and of no subclass."""

    class Half(TrolMixer):
        name = "half_of_it"

        def again(self, visit):
            answer = super().again(visit)
            return answer if visit.number == 0 else 0.5 * answer

    host = HOSTS["llama"]
    model, inputs = attach_settled(host.build(), TrolMixer(scope="all")), host.inputs()
    with depth(model, Half(scope="all")):
        mixed = model(**inputs).logits
        with trace(model) as seen:
            watched = model(**inputs).logits
    assert gap(mixed, watched) <= host.default_exact
    assert gap(mixed, model(**inputs).logits) > 1e-3
    assert seen.weights[:, 2].max() <= 0.5


def test_where_gates_start(tmp_path: Path) -> None:
    """Little on a host, as published in a model from nothing; the settings say which."""
    save(attach(HOSTS["llama"].build(), TrolMixer()), tmp_path)
    assert json.loads((tmp_path / "depth_config.json").read_text())["initial_gate"] == 0.01
    own = {"policy": "trol_mixer"}
    assert tiny(20, depth=own).depth["initial_gate"] is None
    assert resolve("tiny", [f"policy={own}"]).policy["initial_gate"] is None
    assert from_settings(resolve("any-llm", [f"policy={own}"]).policy) == TrolMixer()
    chosen = {**own, "initial_gate": 0.3}
    assert tiny(20, depth=chosen).depth == chosen
    assert resolve("tiny", [f"policy={chosen}"]).policy == chosen


@torch.no_grad()
def test_adapters_of_the_published_start_open_as_before(tmp_path: Path) -> None:
    host = HOSTS["llama"]
    model, inputs = attach_settled(host.build(), TrolMixer(initial_gate=None)), host.inputs()
    expected = model(**inputs).logits
    save(model, tmp_path)
    file = tmp_path / "depth_config.json"
    settings = json.loads(file.read_text())
    for written in (settings, {k: v for k, v in settings.items() if k != "initial_gate"}):
        file.write_text(json.dumps(written))
        assert torch.equal(load(host.build(), tmp_path)(**inputs).logits, expected)
