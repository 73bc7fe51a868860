"""Controllers and routers: what only they promise, beside what every policy does."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from hosts import CHECKS, HOSTS, Host
from hosts.checks import greedy
from hosts.host import Inputs
from trol import depth
from trol.depth import AbstractPolicy, attached, detach, trace
from trol.depth.attachment import gates_of
from trol.errors import HostError
from trol.host.names import CACHE
from trol.host.trainer import checkpoint_activations
from trol.policies.controller import Controller
from trol.policies.planned import Planned
from trol.policies.router import Router

from .subjects import assert_same, attach_settled, gap, layers_of, made, recomputed, some_hosts
from .test_cache import in_pieces, turns
from .test_cost import _count, _counting

KINDS: dict[str, Callable[[], AbstractPolicy]] = {
    "position": lambda: Controller("position"),
    "embedding": lambda: Controller("embedding"),
    "sum": lambda: Controller("sum", hidden_layers=1),
    "ones": lambda: Controller("ones"),
    "everywhere": lambda: Controller("sum", scope="all"),
    "hole": lambda: Controller(skipped_kv="hole"),
    "routed_hole": lambda: Router(["0-1", "0-2", "all"], after=2, hidden=8, skipped_kv="hole"),
    "routed_loop": lambda: Router(["0-1 3", "0-1 2:2", "all"], after=0, dial=0.4),
}
"""What the laws of all policies do not try: they have one controller and one router."""


@pytest.mark.usefixtures("no_grad")
@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("host", some_hosts("llama", "gpt2"))
def test_every_kind_however_it_is_cut(host: Host, name: str) -> None:
    """Cached = uncached, padded = alone, pieces = one shot, causal, beams."""
    model, inputs = host.build(), host.inputs(batch=2, length=10)
    bare = greedy(model, inputs)[1]
    attach_settled(model, KINDS[name](), seed=3)
    expected = recomputed(host, model, inputs)
    assert gap(expected[1], bare) > 1e-2
    assert_same(greedy(model, inputs), expected, host.default_exact)
    for check in ("left_padding", "right_padding", "causal", "chunked_prefill", "beams"):
        assert CHECKS[check](host, model) <= host.default_exact
    roles = torch.stack([turns(inputs, from_column=c)[0] for c in (2, 3)])
    whole = model(**inputs, assistant_masks=roles, use_cache=False).logits
    for size in (1, 3):
        pieces = in_pieces(model, inputs, roles, first=size, size=size, masked=size != 1)
        assert gap(pieces, whole) <= host.default_exact


@pytest.mark.usefixtures("no_grad")
@pytest.mark.parametrize("input", ["hidden", "position", "embedding", "sum", "ones"])
def test_tokens_differ_where_their_inputs_do(input: Any) -> None:
    """Inner layers run for some answer tokens and not for others; the outer ones run for all."""
    host = HOSTS["llama"]
    model, inputs = host.build(layers=6), host.inputs(batch=4, length=24)
    attach_settled(model, Controller(input), seed=3)
    roles = torch.zeros_like(inputs["input_ids"])
    roles[:, 4:] = 1
    with trace(model) as seen:
        model(**inputs, assistant_masks=roles)
    assert (seen.visits[:, :, :4] == 1).all()
    answered = seen.visits[:, :, 4:].float()
    assert (answered[[0, -1]] == 1).all()
    shares = answered[1:-1].mean(dim=(1, 2))
    if input == "ones":
        assert set(shares.tolist()) == {0.0, 1.0}
        return
    assert ((shares > 0) & (shares < 1)).any()
    if input == "position":
        assert (answered == answered[:, :1]).all()  # the same in every row


class Drawn:
    """A forward hook: m layer(x) + (1 - m) x at answer tokens, m straight through a drawn choice.

    As the authors' code: all tokens are computed, then a mask picks.
    """

    def __init__(self, policy: Controller, gate: Any, answer: Tensor) -> None:
        self.policy, self.gate, self.answer = policy, gate, answer
        self.executed: Tensor | None = None

    def __call__(self, layer: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        entered = args[0] if args else kwargs["hidden_states"]
        through = output[0] if isinstance(output, tuple) else output
        logits = entered.detach() @ self.gate.weight_0.T + self.gate.bias_0
        drawn = nn.functional.gumbel_softmax(logits, tau=self.policy.temperature, hard=True)
        mask = torch.where(self.answer, drawn[..., 1], 1.0)
        self.executed = mask[self.answer].mean()
        out = mask[..., None] * through + (1 - mask[..., None]) * entered
        return (out, *output[1:]) if isinstance(output, tuple) else out


@pytest.mark.parametrize("host", some_hosts("llama", "gpt2", "gemma3"))
@pytest.mark.parametrize("wish", [{}, {"alpha": 0.7}, {"target": 0.6, "weight": 3.0}])
def test_gradients_are_those_of_a_drawn_mask(host: Host, wish: dict[str, float]) -> None:
    """Loss and every gradient, those of tokens that skip among them, and the cost of visits."""
    policy = Controller(temperature=0.7, **wish)
    model, inputs = attach_settled(host.build(), policy).train(), host.inputs(batch=3)
    labels = _labels(inputs)
    torch.manual_seed(5)
    loss = model(**inputs, labels=labels, use_cache=False).loss
    loss.backward()
    got = {name: p.grad for name, p in model.named_parameters()}
    gates = gates_of(attached(model)[1])
    detach(model)
    for number, gate in enumerate(gates):
        if gate is not None:
            layers_of(model)[number].depth = gate
    model.zero_grad()
    hooks = [
        (Drawn(policy, gate, labels != -100), layer)
        for layer, gate in zip(layers_of(model), gates, strict=True)
        if gate is not None
    ]
    for hook, layer in hooks:
        layer.register_forward_hook(hook, with_kwargs=True)
    torch.manual_seed(5)
    expected = model(**inputs, labels=labels, use_cache=False).loss
    executed = (torch.stack([hook.executed for hook, _ in hooks]).sum() + 2) / 4
    if "alpha" in wish:
        expected = expected + wish["alpha"] * executed
    elif wish:
        expected = expected + wish["weight"] * (executed - wish["target"]) ** 2
    expected.backward()
    assert 0 < (executed - 0.5) * 2 < 1  # some skip, some do not
    assert gap(loss, expected) <= 1e-5
    for name, parameter in model.named_parameters():
        assert gap(got[name], parameter.grad) <= 1e-4 * (1 + parameter.grad.abs().max()), name
    assert all(gate.weight_0.grad.abs().max() > 0 for gate in gates if gate is not None)


@pytest.mark.parametrize("host", some_hosts("llama", "gpt2"))
@pytest.mark.parametrize("name", ["controller", "router"])
def test_checkpointed_controllers_and_routers(host: Host, name: str) -> None:
    """The second run draws what the first did; the re-entrant kind, which cannot tell, is named."""
    policy = Controller(alpha=0.5) if name == "controller" else made(name)
    results = []
    for reentrant in (None, False):
        model = attach_settled(host.build(), policy).train()
        if reentrant is not None:
            _checkpoint(model, reentrant=reentrant)
        torch.manual_seed(2)
        inputs = host.inputs(batch=2)
        loss = model(**inputs, labels=_labels(inputs), use_cache=False).loss
        loss.backward()
        results.append((loss, {n: p.grad for n, p in model.named_parameters()}))
    (plain, gradients), (loss, others) = results
    assert gap(loss, plain) <= 1e-6
    for key, gradient in gradients.items():
        if gradient is not None:
            assert gap(others[key], gradient) <= 1e-5 * (1 + gradient.abs().max()), key
    if name == "controller":
        _checkpoint(model, reentrant=True)
        with pytest.raises(HostError, match="use_reentrant"):
            model(**inputs, labels=_labels(inputs), use_cache=False)


def _checkpoint(model: PreTrainedModel, *, reentrant: bool) -> None:
    checkpoint_activations(model, use_reentrant=reentrant)
    model.enable_input_require_grads()


def _labels(inputs: Inputs) -> Tensor:
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[:, -5:] = inputs["input_ids"][:, -5:]
    return labels


@pytest.mark.usefixtures("no_grad")
@pytest.mark.parametrize("host", some_hosts("llama", "mistral", "gpt2"))
@pytest.mark.parametrize("name", ["controller", "sum", "router", "routed_loop"])
def test_flops_are_counted_where_they_are_made(host: Host, name: str) -> None:
    """In the question, in a call of both roles, and in answers: trace = torch."""
    policy = KINDS[name]() if name in KINDS else made(name)
    model, ids = attach_settled(_counting(host), policy), host.inputs(length=12)["input_ids"]
    cache, twin = DynamicCache(config=model.config), DynamicCache(config=model.config)
    for cut, answered in ((slice(0, 6), 0), (slice(6, 10), 2), (slice(10, 12), 2)):
        masks = torch.zeros_like(ids[:, cut])
        masks[:, masks.shape[1] - answered :] = 1
        said: dict[str, Any] = {"input_ids": ids[:, cut], "assistant_masks": masks}
        counted = _count(model, said | {CACHE: twin}, use_cache=True)
        with trace(model) as seen:
            model(**said, **{CACHE: cache})
        assert seen.cost.flops == counted


@pytest.mark.usefixtures("no_grad")
@pytest.mark.parametrize("host", some_hosts("llama", "gemma3", "qwen3_vl"))
def test_a_dial_goes_from_the_cheapest_plan_to_the_full_one(host: Host) -> None:
    """At its ends a router is a plan for answers, or the plain model; between, rows differ."""
    model, inputs = host.build(), host.inputs(batch=6)
    menu = ["0 3", "0 2-3", "all"]
    plain = greedy(model, inputs)
    attach_settled(model, Router(menu, hidden=8, dial=0.5), seed=2)
    taken = []
    for dial in (0.0, 0.4, 0.5, 0.6, 1.0):
        with depth(model, Router(menu, hidden=8, dial=dial)), trace(model) as seen:
            said = greedy(model, inputs)
        answered = seen.visits[:, :, inputs["input_ids"].shape[1] :]
        assert (answered == answered[..., :1]).all()  # one plan for one answer
        taken.append(answered[..., 0].sum(0).float())
        if dial == 1.0:
            assert_same(said, plain, host.default_exact)
        if dial == 0.0:
            with depth(model, Planned(menu[0], scope="answer")):
                assert_same(said, greedy(model, inputs), host.default_exact)
    assert taken[0].unique().tolist() == [2]
    assert taken[-1].unique().tolist() == [4]
    assert all((low <= high).all() for low, high in pairwise(taken))


@pytest.mark.usefixtures("no_grad")
def test_rows_take_different_plans_and_keep_them_in_beams() -> None:
    """What a row's prompt says decides for that row, whoever its batch mates are."""
    host = HOSTS["llama"]
    model, rows = host.build(), host.left_padded((5, 9, 7, 12, 6, 8))
    attach_settled(model, Router(["0 3", "0 2-3", "all"], hidden=8), seed=0)
    logits = []
    head = gates_of(attached(model)[1])[1]
    own = head.logits
    head.logits = lambda means: logits.append(own(means)) or logits[-1]
    greedy(model, rows.batch, max_new_tokens=2)
    middle = torch.sigmoid(logits[-1][..., 0]).median().item()
    dial = Router(["0 3", "0 2-3", "all"], hidden=8, dial=middle)
    search = {"num_beams": 3, "max_new_tokens": 4, "do_sample": False}
    with depth(model, dial):
        with trace(model) as seen:
            greedy(model, rows.batch)
        assert len(set(seen.visits[:, :, -1].sum(0).tolist())) > 1
        together = model.generate(**rows.batch, **search)[:, -4:]
        alone = [model.generate(**row, **search)[0, -4:] for row in rows.alone]
    assert together.tolist() == torch.stack(alone).tolist()


@pytest.mark.usefixtures("no_grad")
def test_a_router_that_never_saw_the_question_is_refused() -> None:
    host = HOSTS["llama"]
    model, ids = host.build(), host.inputs()["input_ids"]
    cache = DynamicCache(config=model.config)
    model(ids[:, :5], **{CACHE: cache})
    attach_settled(model, made("router"))
    with pytest.raises(HostError, match="holds 5 tokens that the policy in force never looked at"):
        model(ids[:, 5:], **{CACHE: cache})
