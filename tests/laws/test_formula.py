"""What a policy computes: the formula by hand, and what plans leave of a model."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hosts import HOSTS, Host
from hosts.checks import greedy
from trol.depth import Plan, attach, attached, detach, trace
from trol.policies.mixer import TrolMixer
from trol.policies.planned import Planned

from .naive import naive_logits
from .subjects import (
    HOLED,
    KEY,
    NO_HOLES,
    POLICIES,
    assert_same,
    attach_settled,
    gap,
    gates_as_tensors,
    hosts_and_attns,
    layers_of,
    made,
    some_hosts,
)

pytestmark = pytest.mark.usefixtures("no_grad")

TURNS = (False, False, False, True, True, False, False, True)
"""Question, answer, question, answer, over and over."""

NAIVE_ALL = ("llama", "mistral", "gemma3", "gpt2", "qwen3_moe", "qwen3_vl")
"""Hosts on which every policy is held against the naive loop."""


def naive_cases() -> list[object]:
    """Hosts with keys and values in every layer; every policy on some, the key ones on all."""
    return [
        pytest.param(host, name, id=f"{host.name}-{name}")
        for host in HOSTS.values()
        if not host.hybrid and host.name != "gemma3_vl"  # its images are not read token by token
        for name in ({**POLICIES, **HOLED} if host.name in NAIVE_ALL else KEY)
        if not (name in HOLED and host.name in NO_HOLES)
    ]


@pytest.mark.parametrize(("host", "name"), naive_cases())
def test_every_policy_is_the_naive_loop(host: Host, name: str) -> None:
    """One call with several turns == one token, one visit, one layer call at a time."""
    model, inputs = host.build("eager"), host.inputs(length=11)
    plain = model(**inputs).logits
    attach_settled(model, made(name))
    length = inputs["input_ids"].shape[1]
    turns = torch.tensor([(TURNS * length)[:length]])
    whole = model(**inputs, assistant_masks=turns, use_cache=False).logits
    policy, gates = attached(model)[1].depth_policy, gates_as_tensors(model)
    detach(model)
    expected = naive_logits(
        model, layers_of(model), policy, inputs, answer=turns[0].tolist(), gates=gates
    )
    assert gap(whole, expected) <= host.default_exact
    if name != "plain":
        assert gap(whole, plain) > 1e-2  # the policy matters on these weights


class ByHand:
    """A forward hook: out = sum_r w_r x_r of whole sequences, with the bare layer called on all."""

    def __init__(self, passes: int, gate: tuple[Tensor, Tensor]) -> None:
        self.passes, (self.weight, self.bias) = passes, gate

    def __call__(self, layer: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        first = output[0] if isinstance(output, tuple) else output
        args = args[1:]
        kwargs = {k: v for k, v in kwargs.items() if k != "hidden_states"}
        states = [first]
        for _ in range(self.passes - 1):
            again = type(layer).forward(layer, states[-1], *args, **kwargs)
            states.append(again[0] if isinstance(again, tuple) else again)
        gates = [0.5 * torch.tanh(x @ self.weight + self.bias)[..., None] + 0.5 for x in states]
        out = states[-1]
        for x, gate in zip(states[-2::-1], gates[-2::-1], strict=True):
            out = (1 - gate) * x + gate * out  # from the last visit backwards
        return (out, *output[1:]) if isinstance(output, tuple) else out


@pytest.mark.parametrize(("host", "attn"), hosts_and_attns())
@pytest.mark.parametrize(("passes", "sharing"), [(2, "per_layer"), (3, "shared")])
def test_trol_is_its_formula(host: Host, attn: str, passes: int, sharing: Any) -> None:
    """x_1 + g(x_1) (x_2 - x_1), and so on, over a question: layers called whole, no cache."""
    model, inputs = host.build(attn), host.inputs(batch=2)
    bare = model(**inputs, use_cache=False).logits
    attach_settled(model, TrolMixer(passes, sharing=sharing))
    got = model(**inputs, use_cache=False).logits
    gates = gates_as_tensors(model)
    detach(model)
    hooks = [
        layer.register_forward_hook(ByHand(passes, gate), with_kwargs=True)
        for layer, gate in zip(layers_of(model), gates, strict=True)
    ]
    expected = model(**inputs, use_cache=False).logits
    for hook in hooks:
        hook.remove()
    assert gap(got, expected) <= host.default_exact
    assert gap(got, bare) > 1e-2


@pytest.mark.parametrize("host", some_hosts(*HOSTS))
def test_skip_all_is_embed_norm_head(host: Host) -> None:
    """With a cache and without, as a forward and in `generate`."""
    model, inputs = host.build(), host.inputs(batch=2)
    hooks = [layer.register_forward_hook(_pass_by, with_kwargs=True) for layer in layers_of(model)]
    expected = model(**inputs, use_cache=False).logits
    for hook in hooks:
        hook.remove()
    attach(model, Planned("exit@0"))
    assert torch.equal(model(**inputs, use_cache=False).logits, expected)
    assert torch.equal(model(**inputs).logits, expected)
    assert gap(greedy(model, inputs)[1][:, 0], expected[:, -1]) <= host.default_exact


def _pass_by(_layer: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
    entered = args[0] if args else kwargs["hidden_states"]
    return (entered, *output[1:]) if isinstance(output, tuple) else entered


@pytest.mark.parametrize(("host", "attn"), hosts_and_attns())
@pytest.mark.parametrize("kept", [(0, 3), (0, 1)], ids=["0 3", "0-1"])
def test_skipping_is_a_model_without_these_layers(
    host: Host, attn: str, kept: tuple[int, int]
) -> None:
    """A host of two layers with the same weights: forward, and decoding with its smaller cache."""
    if host.name == "qwen3_vl" and kept == (0, 3):
        pytest.skip("its deepstack adds image features behind layers 0 and 1, skipped or not")
    model, inputs = host.build(attn), host.left_padded().batch
    small = without_layers(host, model, attn, kept)
    attach(model, Planned(Plan([int(i in kept) for i in range(4)])))
    assert gap(model(**inputs).logits[:, -1], small(**inputs).logits[:, -1]) <= host.default_exact
    assert_same(greedy(model, inputs), greedy(small, inputs), host.default_exact)
    detach(model)
    assert gap(greedy(model, inputs)[1], greedy(small, inputs)[1]) > 1e-2


def without_layers(
    host: Host, model: PreTrainedModel, attn: str, kept: tuple[int, ...]
) -> PreTrainedModel:
    """The host built with fewer layers; the weights of `kept` and of all around them copied."""
    small = host.build(attn, layers=len(kept), seed=9)
    (prefix,) = (name for name, m in model.named_modules() if m is layers_of(model))
    around = {k: v for k, v in model.state_dict().items() if not k.startswith(f"{prefix}.")}
    missing = small.load_state_dict(around, strict=False)
    assert not missing.unexpected_keys
    for target, source in zip(layers_of(small), kept, strict=True):
        target.load_state_dict(layers_of(model)[source].state_dict())
    return small


@pytest.mark.parametrize("host", some_hosts(*HOSTS))
def test_exit_is_monotone(host: Host) -> None:
    """States before the exit are the full model's; behind it they pass unchanged."""
    model, inputs = host.build(), host.inputs(batch=2)
    full = model(**inputs, output_hidden_states=True).hidden_states
    attach(model, Planned("all"))
    for exit_layer in (1, 2, 3):
        detach(model)
        attach(model, Planned(f"exit@{exit_layer}"))
        states = model(**inputs, output_hidden_states=True).hidden_states
        assert len(states) == len(full) == 5
        for i in range(exit_layer + 1):  # state i is what enters layer i
            assert torch.equal(states[i], full[i])
        if host.name != "qwen3_vl":  # its deepstack adds image features on the way
            assert all(torch.equal(s, states[exit_layer]) for s in states[exit_layer:4])
        assert gap(states[4], full[4]) > 1e-2


@pytest.mark.parametrize("host", some_hosts("llama", "gemma3", "qwen3_moe"))
def test_tau_moves_a_layer_by_at_most_tau(host: Host) -> None:
    """|out_tau - out| <= tau |x_2 - x_1| for every token of layer 0."""
    model, inputs = host.build(), host.inputs(batch=3)
    x1 = model(**inputs, output_hidden_states=True).hidden_states[1]
    attach(model, Planned("0:2 1-3"))
    x2 = model(**inputs, output_hidden_states=True).hidden_states[1]
    detach(model)
    outs = {}
    for tau in (0.0, 0.3, 0.6):
        attach_settled(model, TrolMixer(tau=tau))
        outs[tau] = model(**inputs, output_hidden_states=True).hidden_states[1]
        detach(model)
    for tau in (0.3, 0.6):
        moved = (outs[tau] - outs[0.0]).norm(dim=-1)
        assert (moved <= tau * (x2 - x1).norm(dim=-1) + 1e-5).all()
        left = (outs[tau] - x1).abs().amax(-1) == 0
        assert 0 < left.sum() < left.numel()  # some tokens leave, some stay


@pytest.mark.parametrize("name", ["hole_answer", "hole_question"])
@pytest.mark.parametrize("host", some_hosts("llama", "mistral", "gpt2", "gemma3_vl"))
def test_a_hole_is_not_a_projection(host: Host, name: str) -> None:
    """Only tokens that visit the layer, behind one that did not, see the difference."""
    model, inputs = host.build(), host.inputs(length=10)
    policy = made(name)
    roles = torch.zeros_like(inputs["input_ids"])
    roles[:, -3:-1] = 1  # question ..., answer, answer, question
    outs = []
    for kv in ("hole", "project"):
        attach(model, Planned(policy.plans[0], scope=policy.scope, skipped_kv=kv))
        outs.append(model(**inputs, assistant_masks=roles).logits)
        detach(model)
    apart = (outs[0] - outs[1]).abs().amax(-1)[0]
    sees = -1 if name == "hole_answer" else -3
    assert apart[:sees].max() <= 1e-5
    assert apart[sees] > 1e-2


@pytest.mark.parametrize("host", some_hosts("llama", "gpt2", "qwen3_vl"))
@pytest.mark.parametrize("passes", [2, 3])
def test_half_precision_hosts(host: Host, passes: int) -> None:
    """The gate and the mixture are float32, the stream stays bfloat16."""
    model, inputs = host.build().to(torch.bfloat16), host.inputs(batch=2)
    if "pixel_values" in inputs:
        inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
    x1 = model(**inputs, output_hidden_states=True).hidden_states[1]
    attach_settled(model, TrolMixer(passes))
    weight, bias = gates_as_tensors(model)[0]
    assert weight.dtype == torch.float32
    with trace(model) as seen:
        out = model(**inputs, output_hidden_states=True)
    assert out.logits.dtype == out.hidden_states[1].dtype == torch.bfloat16
    gate = 0.5 * torch.tanh(x1.float() @ weight + bias) + 0.5
    if passes == 2:
        assert gap(seen.weights[0, 2], gate) <= 1e-6
    assert_same(
        greedy(model, inputs),
        greedy(model, inputs, use_cache=False),
        0.5,  # bfloat16 rounds otherwise in other shapes; tokens agree
    )
