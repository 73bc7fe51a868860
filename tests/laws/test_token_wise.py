"""Token-wise = dense: whoever makes a visit alone gets what he gets among all others."""

import copy
import functools
import io
import threading
from collections.abc import Callable

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from torch import Tensor
from torch.nn.modules.module import register_module_forward_hook
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from hosts import HOSTS, Host
from hosts.checks import greedy
from hosts.host import Inputs
from trol.depth import AbstractPolicy, attach, attached, detach, executor, trace
from trol.depth import visits as executors
from trol.errors import UsageError
from trol.execution import token_wise as attending_
from trol.host.names import CACHE
from trol.policies.planned import Planned
from trol.policies.random_tokens import RandomTokens

from .subjects import (
    HOLED,
    NO_HOLES,
    POLICIES,
    attach_settled,
    entered,
    gap,
    hosts_and_attns,
    layers_of,
    some_hosts,
)

pytestmark = pytest.mark.usefixtures("no_grad")

PLANS = ("0:2 1 3", "1-3", "exit@2")
"""One for each of three rows: no visit, one visit and two of them in the same layer."""

ROWS: dict[str, Callable[[], AbstractPolicy]] = {
    "rows": lambda: Planned(PLANS),
    "rows_question": lambda: Planned(PLANS, scope="question"),
    "hole_rows": lambda: Planned(PLANS, skipped_kv="hole"),
    "hole_rows_answer": lambda: Planned(PLANS, scope="answer", skipped_kv="hole"),
}
"""Policies under which every row has a plan of its own."""

ALL = {**POLICIES, **HOLED, **ROWS}
del ALL["plain"]  # leaves nobody out

STATIC = {"cache_implementation": "static", "disable_compile": True}

DRAWN = ("some_twice", "some_skip", "hole_some")
"""Policies under which some tokens of each row go, and others stay."""


def cases() -> list[object]:
    """Every host, every attention, every policy that the host can have."""
    return [
        pytest.param(*case.values, name, id=f"{case.id}-{name}")
        for case in hosts_and_attns()
        for name in ALL
        if not (name.startswith("hole") and case.values[0].name in NO_HOLES)
    ]


@functools.lru_cache(maxsize=2)  # cases come host by host
def built(host: str, attn: str) -> tuple[PreTrainedModel, Tensor]:
    """A bare host, and its logits for three rows."""
    model = HOSTS[host].build(attn)
    return model, forward(model, HOSTS[host].inputs(batch=3), told=False)


def forward(model: PreTrainedModel, inputs: Inputs, *, told: bool = True) -> Tensor:
    """Logits of the real tokens, of a pass without a cache; two tokens of it are answer."""
    roles = torch.zeros_like(inputs["input_ids"])
    roles[:, -3:-1] = 1
    said = {"assistant_masks": roles} if told else {}
    return model(**inputs, **said, use_cache=False).logits[inputs["attention_mask"].bool()]


def runs(host: Host, model: PreTrainedModel) -> list[Callable[[], Tensor]]:
    """Ways to make logits: without padding, or padded on the right and without a cache, ..."""
    rows = host.inputs(batch=3)
    right = rows if "right_padding" in host.cannot else host.right_padded().batch
    return [lambda: forward(model, rows), lambda: forward(model, right)]


def caches(host: Host, model: PreTrainedModel) -> list[Callable[[], Tensor]]:
    """... padded on the left, by turns on every class of cache."""
    left = host.inputs(batch=3) if "left_padding" in host.cannot else host.left_padded().batch
    pieces = {} if "chunked_prefill" in host.cannot else {"prefill_chunk_size": 5}
    found = [lambda: greedy(model, left, max_new_tokens=2, **pieces)[1]]
    if "static_cache" not in host.cannot:
        found.append(lambda: greedy(model, left, max_new_tokens=2, **STATIC)[1])
    return found


@pytest.mark.parametrize(("host", "attn", "name"), cases())
def test_token_wise_is_dense(host: Host, attn: str, name: str) -> None:
    """Whatever the policy, the cache and the padding."""
    model, plain = built(host.name, attn)
    attach_settled(model, ALL[name]())
    try:
        for number, same in enumerate([*([run] for run in runs(host, model)), caches(host, model)]):
            with executor(model, "dense"), entered(model) as all_entered:
                dense = same[0]()
            if not number:
                assert gap(dense, plain) > 1e-2  # the policy matters
            for index, run in enumerate(same):
                with executor(model, "token-wise"), entered(model) as some_entered:
                    assert gap(run(), dense) <= host.default_exact
                if name in DRAWN and not index:
                    assert 0 < sum(some_entered) < sum(all_entered)
    finally:
        detach(model)


@pytest.mark.parametrize("host", [HOSTS[name] for name in ("llama", "gemma3", "gpt2")])
@pytest.mark.parametrize("name", ["trol", "trol_tau", "some_twice", "some_skip", "hole_rows"])
def test_a_conversation_on_one_cache(host: Host, name: str) -> None:
    """Turn after turn, by executors that take turns as well."""
    model, inputs = attach_settled(host.build(), ALL[name]()), host.inputs(batch=3)
    said = []
    for turns in (["dense"] * 3, ["token-wise"] * 3, ["token-wise", "dense"]):
        talk, kept, logits = inputs, {}, []
        for who in turns:
            with executor(model, who):
                out = model.generate(
                    **talk,
                    **kept,
                    max_new_tokens=2,
                    do_sample=False,
                    output_logits=True,
                    return_dict_in_generate=True,
                )
            kept = {CACHE: out[CACHE]}
            new = torch.cat([out.sequences[:, -2:], inputs["input_ids"][:, :3]], 1)
            talk = host.extend(talk, new)
            logits.append(torch.stack(out.logits, 1))
        said.append(torch.cat(logits, 1))
    dense, alone, mixed = said
    assert gap(alone, dense) <= host.default_exact
    assert gap(mixed, dense[:, :4]) <= host.default_exact


def own_attention(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, **_: object
) -> tuple[Tensor, None]:
    """An attention that takes a mask of two dimensions, as flash attention does."""
    places = torch.arange(query.shape[2])[:, None] + key.shape[2] - query.shape[2]
    seen = torch.arange(key.shape[2]) <= places
    if mask is not None:
        seen = seen & mask.bool()[:, None, None, :]
        seen = seen | (torch.arange(key.shape[2]) == places)  # padding sees itself
    key, value = (x.repeat_interleave(module.num_key_value_groups, 1) for x in (key, value))
    score = (query @ key.transpose(2, 3) * module.scaling).masked_fill(~seen, -1e9)
    return (score.softmax(-1) @ value).transpose(1, 2), None


@pytest.mark.parametrize("name", ["some_twice", "some_skip", "trol_tau"])
def test_no_attention_need_be_understood(name: str) -> None:
    """Masks of any form go to the layer as they are."""
    host = HOSTS["llama"]
    AttentionInterface.register("of_a_test", own_attention)
    AttentionMaskInterface.register("of_a_test", lambda attention_mask=None, **_: attention_mask)
    model = attach_settled(host.build("of_a_test"), ALL[name]())
    said = []
    for who in ("dense", "token-wise"):
        with executor(model, who), entered(model) as counts:
            said.append(forward(model, host.left_padded().batch))
    assert gap(*said) <= host.default_exact
    assert 0 < counts[0] < 2 * host.left_padded().batch["input_ids"].numel()


class Products(TorchFunctionMode):
    """Counts the FLOPs of sdpa, which torch does not count on a CPU."""

    flops = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.nn.functional.scaled_dot_product_attention:
            self.flops += 4 * args[0].numel() * args[1].shape[-2]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("host", some_hosts("llama", "phi3", "qwen3_moe", "gemma3", "opt", "gpt2"))
@pytest.mark.parametrize("name", ["some_twice", "some_skip", "trol_tau"])
def test_queries_that_attend_alone(host: Host, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In stretches, of which none sees keys behind its last; in chunks, and padded, too."""
    monkeypatch.setattr(executors, "STRETCHES", 0)
    monkeypatch.setattr(attending_, "STRETCH", 4)
    model = attach_settled(host.build("sdpa"), ALL[name]())
    ids, more = (host.inputs(length=n, seed=n)["input_ids"] for n in (5, 40))
    said = []
    for which in ("dense", "token-wise"):
        with executor(model, which):
            out = model(input_ids=more)
            late = model(input_ids=ids, **{CACHE: out[CACHE]})
            padded = forward(model, host.left_padded().batch)
            said.append(torch.cat([out.logits.flatten(0, 1), late.logits.flatten(0, 1), padded]))
    assert gap(*said) <= host.default_exact
    with executor(model, "token-wise"):
        with Products() as attended, FlopCounterMode(display=False) as counter:
            model(input_ids=more)
        with trace(model) as seen:
            model(input_ids=more)
    totals = {k: sum(v.values()) for k, v in counter.get_flop_counts().items()}
    inside = {n for n, m in model.named_modules() if any(m is one for one in layers_of(model))}
    if host.name != "qwen3_moe":  # experts run in operators of their own, which nobody counts
        counted = sum(v for k, v in totals.items() if k.partition(".")[2] in inside)
        assert seen.cost.flops == counted + attended.flops


@pytest.mark.parametrize("name", ["trol", "trol_all", "trol_three", "repeat"])
def test_the_last_visit_of_the_last_layer_needs_only_the_last_token(name: str) -> None:
    """While `generate` reads a prompt; not where hidden states are asked for."""
    host = HOSTS["llama"]
    model, inputs = attach(host.build(), ALL[name]()), host.inputs(batch=2)
    widths: list[int] = []
    layer = layers_of(model)[-1]
    layer.mlp.register_forward_pre_hook(lambda _m, args: widths.append(args[0].shape[:2].numel()))
    for who, settings, last in (
        ("token-wise", {}, 2),
        ("token-wise", {"output_hidden_states": True}, 18),
        ("dense", {}, 18),
    ):
        with executor(model, who):
            widths.clear()
            greedy(model, inputs, max_new_tokens=1, **settings)
            assert widths[-1] == last, (who, settings, widths)


WATCHED = {
    "layer": lambda model: layers_of(model)[-1].register_forward_hook,
    "norm": lambda model: model.get_decoder().norm.register_forward_pre_hook,
    "stack": lambda model: model.get_decoder().register_forward_hook,
    "whole": lambda model: model.model.register_forward_hook,
    "anything": lambda _model: register_module_forward_hook,
}
"""Who registers a hook that sees what leaves the last layer."""


@pytest.mark.parametrize("host", some_hosts("llama", "qwen2_5_vl"))
@pytest.mark.parametrize("where", WATCHED)
def test_who_watches_the_last_layer_sees_all_tokens(host: Host, where: str) -> None:
    """While `generate` reads a prompt too; hooks that are no forward hooks change nothing."""
    model, inputs = attach_settled(host.build(), ALL["trol"]()), host.inputs(batch=2)
    model(**inputs, output_hidden_states=True)  # transformers' own hooks stay on the layers
    for layer in layers_of(model):
        add_hook_to_module(layer, ModelHook())
    norm, states = model.get_decoder().norm, []
    with executor(model, "token-wise"):
        with entered(model) as cheap:
            greedy(model, inputs, max_new_tokens=1)
        assert cheap[-1] < cheap[0]
        hook = WATCHED[where](model)(lambda *_: None)
        note = norm.register_forward_pre_hook(lambda _m, args: states.append(args[0].clone()))
        greedy(model, inputs, max_new_tokens=1)
        model(**inputs)
        note.remove()
        with entered(model) as counts:
            greedy(model, inputs, max_new_tokens=1)
        hook.remove()
    assert gap(*states) <= host.default_exact
    assert counts[-1] == counts[0]


@pytest.mark.parametrize("asked", ["output_attentions", "output_router_logits"])
@pytest.mark.parametrize("how", ["call", "config"])
def test_what_is_shown_of_every_token_is_computed_for_every_token(asked: str, how: str) -> None:
    host = HOSTS["qwen3_moe"]
    model, inputs = attach(host.build("eager"), RandomTokens(0.5, visit=1)), host.inputs(batch=2)
    if how == "config":
        setattr(model.config, asked, True)
    said = {asked: True} if how == "call" else {}
    with executor(model, "token-wise"):
        with entered(model) as counts:
            model(**inputs, **said)
        assert counts == [18] * 4
        setattr(model.config, asked, False)
        with entered(model) as counts:
            model(**inputs)
        assert 0 < sum(counts) < 18 * 4


def test_in_training_all_are_computed() -> None:
    """Where dropout draws, some alone are not what they are among all; and gradients follow."""
    model = HOSTS["gpt2"].build()
    model.config.resid_pdrop = 0.5
    model = attach(model.train(), RandomTokens(0.5))
    inputs, logits = HOSTS["gpt2"].inputs(), []
    for who in ("dense", "token-wise"):
        torch.manual_seed(0)
        with executor(model, who):
            logits.append(model(**inputs).logits)
    assert torch.equal(*logits)
    with executor(model.eval(), "token-wise"), torch.enable_grad(), entered(model) as counts:
        model(**inputs)
    assert counts == [2 * 9] * 4


def test_a_model_is_copied_and_pickled_after_it_ran() -> None:
    host = HOSTS["llama"]
    model, inputs = attach(host.build(), RandomTokens(0.5)), host.inputs(batch=2)
    with executor(model, "token-wise"):
        expected = model(**inputs).logits
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for twin in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert attached(twin)[1] is not attached(model)[1]
        with executor(twin, "token-wise"):
            assert gap(twin(**inputs).logits, expected) <= host.default_exact


def test_threads_with_other_executors_do_not_mix() -> None:
    """Two threads on one model: each has its own executor, and both the same numbers."""
    host = HOSTS["llama"]
    model, inputs = attach(host.build(), RandomTokens(0.5)), host.inputs(batch=2)
    with executor(model, "token-wise"):
        expected = model(**inputs, use_cache=False).logits
    counts: dict[str, set[int]] = {"dense": set(), "token-wise": set()}
    apart: list[float] = []
    mine = threading.local()
    layers_of(model)[1].mlp.register_forward_pre_hook(
        lambda _m, args: counts[mine.who].add(args[0].shape[:2].numel())
    )
    meeting = threading.Barrier(2)

    def work(who: str) -> None:
        mine.who = who
        with torch.no_grad(), executor(model, who):
            for _ in range(20):
                meeting.wait(60)
                apart.append(gap(model(**inputs, use_cache=False).logits, expected))

    threads = [threading.Thread(target=work, args=(who,)) for who in counts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(apart) == 40
    assert max(apart) <= host.default_exact
    assert counts["dense"] == {18}
    assert len(counts["token-wise"]) == 2
    assert min(counts["token-wise"]) < 18


def test_executors_nest_end_and_have_names() -> None:
    """`packed` is what the token-wise one was called before."""
    host = HOSTS["llama"]
    model, inputs = attach(host.build(), Planned(["0 1", "2 3"])), host.inputs(batch=2)
    counts: list[int] = []
    layers_of(model)[1].mlp.register_forward_pre_hook(
        lambda _m, args: counts.append(args[0].shape[:2].numel())
    )
    with executor(model, "packed"):
        model(**inputs, use_cache=False)
        with executor(model, "dense"):
            model(**inputs, use_cache=False)
        model(**inputs, use_cache=False)
    assert counts == [9, 18, 9]
    with (
        pytest.raises(UsageError, match=r"unknown executor 'pack'.*auto, dense, token-wise"),
        executor(model, "pack"),
    ):
        pass


@pytest.mark.parametrize("host", some_hosts("llama", "qwen3_moe", "gpt_neox"))
def test_hooks_of_a_part_see_the_tokens_that_it_computes(host: Host) -> None:
    """Hooks run, and what they change counts, for those that go."""
    model, inputs = attach(host.build(), RandomTokens(0.5)), host.inputs(batch=2)
    for layer in layers_of(model):
        layer.mlp.register_forward_pre_hook(lambda _m, args: (2 * args[0], *args[1:]))
    said = []
    for who in ("dense", "token-wise"):
        with executor(model, who):
            said.append(model(**inputs).logits)
    assert gap(*said) <= host.default_exact
