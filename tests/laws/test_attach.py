"""Attaching leaves the host what it is; detaching gives it back."""

import copy
import inspect
import pickle
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import ModelHook, add_hook_to_module
from torch import nn
from transformers import PreTrainedModel

from hosts import HOSTS, Host
from hosts.checks import greedy
from trol import depth
from trol.depth import attach, attached, cost_of, detach, executor, is_attached, probe, trace
from trol.depth.policy import Plain
from trol.errors import UsageError
from trol.policies.mixer import TrolMixer

from .subjects import (
    HOLED,
    KEY,
    NO_HOLES,
    POLICIES,
    assert_same,
    attach_settled,
    gap,
    hosts_and_attns,
    layers_of,
    made,
    policy_cases,
    some_hosts,
)

pytestmark = pytest.mark.usefixtures("no_grad")

SHOWING = ("llama", "falcon", "bloom", "qwen3_next", "gpt2")
"""Families whose attentions transformers collects, that gather their own, and of mixed layers."""


@pytest.mark.parametrize(("host", "attn"), hosts_and_attns())
def test_plain_is_the_host(host: Host, attn: str) -> None:
    """Bit for bit: padded forward, decoding, hidden states and attentions."""
    model, inputs = host.build(attn), host.left_padded().batch
    shown = {"output_hidden_states": True, "output_attentions": attn == "eager"}
    bare, said = model(**inputs, **shown), greedy(model, inputs)
    attach(model, Plain())
    got = model(**inputs, **shown)
    assert torch.equal(got.logits, bare.logits)
    assert_same(greedy(model, inputs), said, 0)
    for name in ("hidden_states", "attentions"):
        assert _all_equal(got.get(name), bare.get(name))
    assert type(got) is type(bare)


@pytest.mark.parametrize(("host", "attn"), hosts_and_attns())
def test_detach_gives_back_the_host(host: Host, attn: str) -> None:
    """Bit for bit, after every policy ran: outputs, classes, parameters, attributes, signatures."""
    model, inputs = host.build(attn), host.inputs(batch=2)
    bare, said = model(**inputs).logits, greedy(model, inputs)
    before, weights = _anatomy(model), copy.deepcopy(model.state_dict())
    for name in (*POLICIES, *HOLED) if attn == host.attns[-1] else ("trol_three", *KEY):
        if name in HOLED and host.name in NO_HOLES:
            continue
        attach(model, made(name))
        model(**inputs)
        greedy(model, inputs)
        kept = {k: v for k, v in model.state_dict().items() if ".depth." not in k}
        assert _all_equal(kept, weights)  # base keys and values never change
        detach(model)
        assert _anatomy(model) == before, name
    assert _all_equal(model.state_dict(), weights)
    assert torch.equal(model(**inputs).logits, bare)
    assert_same(greedy(model, inputs), said, 0)


@pytest.mark.parametrize("host", some_hosts(*HOSTS))
def test_the_module_tree_stays(host: Host) -> None:
    """Names of modules, parameters and classes, isinstance and signatures: others rely on them."""
    model = host.build()
    modules = {name: type(module) for name, module in model.named_modules()}
    signature = inspect.signature(model.forward)
    attach(model, TrolMixer())
    for name, module in model.named_modules():
        if name.endswith(".depth"):
            continue
        was = modules.pop(name)
        assert isinstance(module, was)
        assert (type(module).__name__, type(module).__module__) == (was.__name__, was.__module__)
    assert not modules
    assert inspect.signature(model.forward) == signature
    gates = [name for name, _ in model.named_modules() if name.endswith(".depth")]
    assert len(gates) == 4
    assert all(name.rpartition(".")[0] in dict(model.named_modules()) for name in gates)


@pytest.mark.parametrize("host", some_hosts("llama", "gpt2", "falcon", "qwen3_next", "qwen3_vl"))
@pytest.mark.parametrize("name", ["trol", "trol_three", "skip_first"])
def test_pickle_and_deepcopy(host: Host, name: str) -> None:
    """The copies follow the policy too, share nothing, and detach by themselves."""
    model, inputs = attach_settled(host.build(), made(name)), host.inputs()
    said = greedy(model, inputs)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert is_attached(twin)
        assert_same(greedy(twin, inputs), said, 0)
        with depth(twin, "exit@1"):
            assert gap(greedy(twin, inputs)[1], said[1]) > 1e-2
        detach(twin)
        assert type(twin) is model.trol_original
        for weight in twin.parameters():
            weight.zero_()
    assert_same(greedy(model, inputs), said, 0)


@pytest.mark.parametrize("host", some_hosts("llama", "gpt2", "falcon", "qwen3_vl"))
@pytest.mark.parametrize("name", ["trol", "skip_first"])
def test_accelerate_hooks(host: Host, name: str) -> None:
    """Hooks keep a layer's old forward on the instance: not rebound, trol would do nothing."""
    inputs = host.inputs(batch=2)
    bare = greedy(host.build(), inputs)
    expected = greedy(attach_settled(host.build(), made(name)), inputs)
    assert gap(bare[1], expected[1]) > 1e-2
    for hooked_first in (True, False):
        model = host.build()
        if not hooked_first:
            attach_settled(model, made(name))
        for layer in layers_of(model):
            add_hook_to_module(layer, ModelHook())
        if hooked_first:
            attach_settled(model, made(name))
        assert_same(greedy(model, inputs), expected, 0)
        detach(model)
        assert_same(greedy(model, inputs), bare, 0)


def test_an_attach_that_fails_changes_nothing() -> None:
    """Whatever raises on the way, the model can be attached to afterwards."""

    class Broken(TrolMixer):
        def gate(self, layer: int, width: int) -> torch.nn.Module | None:
            if layer == 2:
                raise RuntimeError("no gate")
            return super().gate(layer, width)

    host = HOSTS["llama"]
    model, inputs = host.build(), host.inputs()
    bare = greedy(model, inputs)
    with pytest.raises(RuntimeError, match="no gate"):
        attach(model, Broken())
    assert not is_attached(model)
    assert all(not hasattr(layer, "depth") for layer in layers_of(model))
    assert_same(greedy(model, inputs), bare, 0)
    detach(attach(model, TrolMixer()))
    assert_same(greedy(model, inputs), bare, 0)


def test_gates_are_where_the_layer_is_and_can_learn() -> None:
    """Whatever device and mode the caller makes tensors in."""
    host = HOSTS["llama"]
    model = host.build()
    with torch.device("meta"):
        attach(model, TrolMixer())
    detach(model)
    with torch.inference_mode():
        attach(model, TrolMixer())
    with torch.enable_grad():
        model.train()(**host.inputs(), labels=host.inputs()["input_ids"]).loss.backward()
    for layer in layers_of(model):
        assert layer.depth.weight.grad.abs().max() > 0


def test_of_two_threads_that_attach_one_does() -> None:
    host = HOSTS["llama"]
    for _ in range(4):
        model, errors, start = host.build(), [], threading.Barrier(2)

        def one(model: Any = model, errors: Any = errors, start: Any = start) -> None:
            start.wait()
            try:
                attach(model, TrolMixer())
            except UsageError as error:
                errors.append(str(error))

        both = [threading.Thread(target=one) for _ in range(2)]
        for thread in both:
            thread.start()
        for thread in both:
            thread.join()
        (said,) = errors
        assert "attached to this model already" in said
        detach(model)


@pytest.mark.filterwarnings("ignore:You are calling .generate:UserWarning")  # before 5.23
@pytest.mark.parametrize("host", some_hosts("llama", "gpt2", "llava"))
def test_cpu_offload(host: Host) -> None:
    """accelerate's own placement of every module, gates included."""
    inputs = host.inputs(batch=2)
    expected = greedy(attach_settled(host.build(), made("trol")), inputs)
    model = attach_settled(host.build(), made("trol"))
    cpu_offload(model, execution_device=torch.device("cpu"))
    assert_same(greedy(model, inputs), expected, 0)


@pytest.mark.parametrize(("host", "name"), policy_cases(*SHOWING))
def test_hidden_states_and_attentions(host: Host, name: str) -> None:
    """One hidden state per layer and one more; each layer's first attentions in its place."""
    model, inputs = host.build("eager"), host.inputs(length=6)
    bare = model(**inputs, output_hidden_states=True, output_attentions=True)
    attach_settled(model, made(name))
    got = model(**inputs, output_hidden_states=True, output_attentions=True)
    with trace(model) as seen:
        traced = model(**inputs, output_hidden_states=True, output_attentions=True)
    ran = [bool(seen.visits[layer].any()) or name in _RUN_FOR_KV for layer in range(4)]
    if host.hybrid:  # of its layers every other one attends
        ran = ran[1::2]
    for out in (got, traced):
        assert len(out.hidden_states) == len(bare.hidden_states) == 5
        assert [a is not None for a in out.attentions] == ran
    assert _all_equal(traced.attentions, got.attentions)
    if ran[0] and not host.hybrid:  # what entered layer 0 is the same, so the first visit is
        assert gap(got.attentions[0], bare.attentions[0]) <= 1e-6 or name in HOLED


_RUN_FOR_KV = ("skip_question", "hole_question", "exit_sure")
"""Policies whose skipped layers run all the same, for the keys and values they leave."""


def test_the_decoder_alone() -> None:
    """A bare decoder without a head is a host as well."""
    host = HOSTS["llama"]
    inputs = host.inputs()
    whole = attach_settled(host.build(), made("trol"))
    expected = whole.model(**inputs).last_hidden_state
    decoder = host.build().model
    bare = decoder(**inputs).last_hidden_state
    attach(decoder, TrolMixer())
    decoder.load_state_dict(whole.model.state_dict())
    assert gap(decoder(**inputs).last_hidden_state, expected) == 0
    with trace(decoder) as seen:
        decoder(**inputs)
    assert seen.visits.tolist() == torch.full((4, 1, 9), 2).tolist()
    assert torch.equal(detach(decoder)(**inputs).last_hidden_state, bare)


def test_depth_and_trace_on_a_plain_model_leave_nothing() -> None:
    host = HOSTS["llama"]
    model, inputs = host.build(), host.inputs()
    before, bare = _anatomy(model), model(**inputs).logits
    with trace(model) as seen:
        assert torch.equal(model(**inputs).logits, bare)
    assert set(seen.visits.flatten().tolist()) == {1}
    with pytest.raises(IndexError), depth(model, "exit@1"):
        model(input_ids=torch.tensor([[10_000]]))
    assert not is_attached(model)
    assert _anatomy(model) == before


def test_an_error_inside_a_call_leaves_no_trace_of_it() -> None:
    host = HOSTS["llama"]
    model, inputs = attach_settled(host.build(), made("trol")), host.inputs()
    expected = model(**inputs).logits
    with pytest.raises(IndexError), depth(model, "exit@1"):
        model(input_ids=torch.tensor([[10_000]]))
    assert attached(model)[1].depth_blocks == 0
    assert torch.equal(model(**inputs).logits, expected)
    assert cost_of(model).gate_per_token == (64,) * 4


def _anatomy(model: PreTrainedModel) -> dict[str, Any]:
    """Everything that attaching could leave behind."""
    return {
        name: (
            type(module),
            sorted(vars(module)),
            list(module._parameters),
            list(module._modules),
            module.training,
            _tied(module),
        )
        for name, module in model.named_modules()
    }


def _tied(module: nn.Module) -> str:
    return str([getattr(module, n, None) for n in ("_tied_weights_keys", "all_tied_weights_keys")])


def _all_equal(a: Any, b: Any) -> bool:
    if a is None or b is None:
        return a is b
    pairs = [(a[k], b[k]) for k in {**a, **b}] if isinstance(a, dict) else zip(a, b, strict=True)
    return all(x is y or torch.equal(x, y) for x, y in pairs)


def test_blocks_that_threads_open_and_leave_are_counted_rightly() -> None:
    """However threads take turns: afterwards a block is in force, and none is left open."""
    host = HOSTS["llama"]
    model, inputs = attach(host.build(layers=2), "all"), host.inputs()
    stack, before = attached(model)[1], sys.getswitchinterval()

    def work() -> None:
        for _ in range(500):
            with executor(model, "dense"):
                pass

    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(before)
    assert stack.depth_blocks == 0
    plain = model(**inputs).logits
    with depth(model, "0"):
        assert gap(model(**inputs).logits, plain) > 1e-3


@pytest.mark.parametrize("block", [lambda m: executor(m, "dense"), trace, lambda m: depth(m, "0")])
def test_a_model_is_not_detached_inside_a_block(block: Callable[[PreTrainedModel], Any]) -> None:
    host = HOSTS["llama"]
    model = attach(host.build(layers=2), "all")
    with pytest.raises(UsageError, match="block is open on this model"), block(model):
        detach(model)
    assert is_attached(model)
    detach(model)


def test_first_traces_of_several_threads_count_alike() -> None:
    """What a class of models takes is found out by one of them, whoever else runs meanwhile."""
    host = HOSTS["llama"]
    model, inputs = attach(host.build(layers=2), "all"), host.inputs()
    found: list[int | None] = []

    def work() -> None:
        with torch.no_grad(), trace(model) as seen:
            model(**inputs)
        found.append(seen.cost.flops)

    probe._MISCOUNTS.clear()
    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 1
    assert found[0]
