"""What a run costs: predicted == counted, and planes are held only while somebody can read them."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache, PreTrainedModel

from hosts import HOSTS, Host
from hosts.checks import greedy
from trol.depth import attach, cost_of, detach, trace
from trol.depth.planes import cache_bytes
from trol.host.names import CACHE
from trol.policies.planned import Planned

from .subjects import POLICIES, attach_settled, layers_of, made, policy_cases, some_hosts

pytestmark = pytest.mark.usefixtures("no_grad")

COUNTED = [name for name, host in HOSTS.items() if not host.hybrid]
"""Hosts whose FLOPs are matrix products only."""

VISITS = {
    "plain": (1, 1, 1, 1),
    "trol": (2, 2, 2, 2),
    "trol_all": (2, 2, 2, 2),
    "trol_three": (3, 3, 3, 3),
    "trol_answer": (1, 1, 1, 1),
    "skip": (1, 0, 1, 1),
    "skip_first": (0, 1, 1, 1),
    "skip_kept": (2, 0, 1, 1),
    "exit": (1, 1, 0, 0),
    "repeat": (2, 1, 0, 3),
    "skip_answer": (1, 1, 1, 1),
    "skip_question": (2, 0, 0, 1),
    "controller": (1, 1, 1, 1),
    "router": (1, 1, 1, 1),
}
"""Visits of each layer by the tokens of a question."""

TOKEN_DEPENDENT = {"trol_tau", "exit_sure", "exit_heads", "some_twice", "some_skip"}
"""Policies whose visits hang on the tokens."""


@pytest.mark.parametrize("host", some_hosts(*COUNTED))
def test_flops_of_a_question(host: Host) -> None:
    """Predicted from shapes and visits, recorded by the trace, counted by torch: one number."""
    model, inputs = _counting(host), host.inputs(batch=2)
    tokens = inputs["input_ids"].shape[1]
    counts = []
    for name in ("plain", "trol", "trol_three", "skip", "repeat"):
        attach_settled(model, made(name))
        model(**inputs)  # a class's first skip runs one layer, to learn what it returns
        counted = _count(model, inputs)
        with trace(model) as seen:
            model(**inputs, use_cache=False)
        assert seen.cost.flops == counted
        assert cost_of(model).flops(VISITS[name], rows=2, tokens=tokens) == counted
        assert seen.cost.layer_visits == sum(VISITS[name]) * 2 * tokens
        counts.append(counted)
        detach(model)
    plain, trol, three, skip, _repeat = counts
    assert skip * 4 == plain * 3 or host.layer_types
    assert trol == 2 * plain + 4 * 2 * 32 * 2 * tokens  # and a gate per layer
    assert three == 3 * plain + 2 * 4 * 2 * 32 * 2 * tokens


@pytest.mark.parametrize("host", some_hosts("llama", "mistral", "gemma3", "gpt2", "qwen3_moe"))
@pytest.mark.parametrize("name", ["plain", "trol", "trol_all", "skip_first", "repeat"])
def test_flops_of_pieces_and_decoding(host: Host, name: str) -> None:
    """Past tokens count as keys; a window bounds them."""
    model, inputs = attach_settled(_counting(host), made(name)), host.inputs(length=12)
    ids, cache, total = inputs["input_ids"], DynamicCache(config=model.config), 0
    twin = DynamicCache(config=model.config)
    model(**inputs)  # a class's first skip runs one layer, to learn what it returns
    for cut in (slice(0, 8), slice(8, 11), slice(11, 12)):
        answer = torch.full_like(ids[:, cut], int(cut.start == 11))
        said = {"input_ids": ids[:, cut], "assistant_masks": answer}
        total += _count(model, said | {CACHE: twin}, use_cache=True)
        with trace(model) as seen:
            model(**said, **{CACHE: cache})
        start = cut.start
        visits = (1, 1, 1, 1) if name == "trol" and start == 11 else VISITS[name]
        if start < 11 or name != "trol":  # answers after TroL still advance plane 2
            assert seen.cost.flops == cost_of(model).flops(
                visits, rows=1, tokens=cut.stop - start, past=start
            )
        total -= seen.cost.flops
    assert total == 0


def _counting(host: Host) -> PreTrainedModel:
    """On eager attention, whose products torch counts; experts one by one."""
    model = host.build("eager")
    for config in (model.config, model.config.get_text_config()):
        config._experts_implementation = "eager"
    return model


def _count(model: PreTrainedModel, inputs: dict, *, use_cache: bool = False) -> int:
    """FLOPs inside the layers, counted by torch."""
    names = {name for name, m in model.named_modules() if any(m is x for x in layers_of(model))}
    with FlopCounterMode(display=False) as counter:
        model(**inputs, use_cache=use_cache)
    totals = {k: sum(v.values()) for k, v in counter.get_flop_counts().items()}
    found = {k: v for k, v in totals.items() if k.partition(".")[2] in names}
    return sum(found.values())


@pytest.mark.parametrize("host", some_hosts("qwen3_next", "falcon_h1"))
def test_unknown_flops_are_none(host: Host) -> None:
    """Recurrent mixers have parts that no formula of ours counts: no number is better than one."""
    model = attach_settled(host.build(), made("trol"))
    with trace(model) as seen:
        model(**host.inputs())
    assert seen.cost.flops is None
    assert seen.cost.layer_visits == 2 * 4 * 9
    assert seen.cost.milliseconds > 0


@pytest.mark.parametrize("host", some_hosts(*HOSTS))
def test_planes_are_dropped_after_the_prompt(host: Host) -> None:
    """Scope question: `generate` ends with the bare host's cache; scope all holds planes twice."""
    model, inputs = host.build(), host.inputs(batch=2)
    bare = cache_bytes(
        model.generate(**inputs, max_new_tokens=3, do_sample=False, return_dict_in_generate=True)[
            CACHE
        ]
    )
    held = {}
    for name in ("plain", "trol", "trol_all", "trol_three", "skip_answer", "skip_question", "exit"):
        attach_settled(model, made(name))
        with trace(model) as seen:
            model.generate(**inputs, max_new_tokens=3, do_sample=False)
        held[name] = seen.cost.kv_bytes
        detach(model)
    assert held["plain"] == held["trol"] == held["skip_question"] == bare
    assert held["trol_all"] == 2 * bare
    assert held["trol_three"] == 3 * bare
    assert held["exit"] < bare


@pytest.mark.parametrize("host", some_hosts(*HOSTS))
def test_planes_are_kept_for_a_caller(host: Host) -> None:
    """Who holds the cache may ask again: plane 2 of the question stays, and answers advance it."""
    model, inputs = host.build(), host.inputs(batch=2)
    settings = {"max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True}
    bare = cache_bytes(model.generate(**inputs, **settings)[CACHE])
    attach_settled(model, made("trol"))
    kept = model.generate(**inputs, **settings)[CACHE]
    assert cache_bytes(kept) == 2 * bare
    assert {plane for _, plane in kept.planes} == {2}
    cache = DynamicCache(config=model.config)
    model.generate(**inputs, max_new_tokens=3, do_sample=False, **{CACHE: cache})
    assert cache_bytes(cache) == 2 * bare


def test_a_skipped_layer_holds_nothing() -> None:
    """Skipped by all rows always: no keys and values, and the cache still knows its length."""
    host = HOSTS["llama"]
    model, inputs = host.build(), host.inputs(length=9)
    whole = model(**inputs)[CACHE]
    attach(model, Planned("1 3"))
    part = model(**inputs)[CACHE]
    assert cache_bytes(part) == cache_bytes(whole) // 2
    assert part.get_seq_length() == 9
    assert [slot.get_seq_length() for slot in part.layers] == [0, 9, 0, 9]


@pytest.mark.parametrize(("host", "name"), policy_cases("llama", "gpt2"))
def test_visits_are_what_was_asked_for(host: Host, name: str) -> None:
    """Layer by layer and token by token, in prefill and decoding; padding costs no visits."""
    model, rows = attach_settled(host.build(), made(name)), host.left_padded((5, 8))
    with trace(model) as seen:
        model.generate(**rows.batch, max_new_tokens=3, do_sample=False)
    assert seen.visits.shape == (4, 2, 8 + 2)
    assert (seen.weights.sum(1) - 1).abs().max() <= 1e-6
    real = seen.real
    assert real.sum(1).tolist() == [7, 10]
    policy = made(name)
    asks = policy.scope in ("question", "all")
    if name in VISITS and name != "trol_tau":
        for layer in range(4):
            expected = VISITS[name][layer] if asks else 1
            behind = 3 + policy.keep_first if policy.keep_first else 0  # padding and those
            assert (seen.visits[layer, :, behind:8] == expected).all()
    assert seen.cost.layer_visits == int((seen.visits * real).sum())
    decoded = seen.visits[:, :, 8:]
    alone = {"trol": 1, "skip_question": 1, "trol_answer": 2, "trol_all": 2, "plain": 1}
    if name in alone:
        assert (decoded == alone[name]).all()
    if name in ("skip_answer", "hole_answer"):
        plan = (0, 1, 0, 2) if name == "skip_answer" else (0, 1, 1, 1)
        assert decoded[:, 0, 0].tolist() == list(plan)
    if name == "trol_tau":
        gates = seen.weights[:, 2]
        assert torch.equal(seen.visits == 2, gates > 0.5)
        assert 0 < (gates > 0.5).float().mean() < 1


@pytest.mark.parametrize("host", some_hosts(*HOSTS))
def test_padding_is_no_visit(host: Host) -> None:
    """In a forward, in `generate`, on a static cache: decoders get masks of all kinds."""
    model, rows = attach_settled(host.build(), made("trol")), host.left_padded((5, 8))
    padding = (rows.batch["attention_mask"] == 0).sum(1).tolist()
    static = {"cache_implementation": "static", "disable_compile": True}
    for settings in ({}, static if "static_cache" not in host.cannot else {}):
        with trace(model) as seen:
            model.generate(**rows.batch, max_new_tokens=3, do_sample=False, **settings)
        assert (~seen.real).sum(1).tolist() == padding
        assert not seen.real[0, : padding[0]].any()
    with trace(model) as seen:
        model(**rows.batch)
    assert (~seen.real).sum(1).tolist() == padding == [3, 0]


def test_every_policy_has_its_visits_written_here() -> None:
    assert set(VISITS) == set(POLICIES) - TOKEN_DEPENDENT


def test_a_trace_reaches_through_chunks() -> None:
    """Chunks and steps follow one another along T."""
    host = HOSTS["llama"]
    model, inputs = attach_settled(host.build(), made("trol_tau")), host.inputs()
    traces = []
    for settings in ({}, {"prefill_chunk_size": 4}, {"use_cache": False}):
        with trace(model) as seen:
            model.generate(**inputs, max_new_tokens=3, do_sample=False, **settings)
        traces.append(seen)
    whole, chunked, uncached = traces
    assert torch.equal(chunked.visits, whole.visits)
    assert (chunked.weights - whole.weights).abs().max() <= 1e-5
    assert uncached.visits.shape[-1] == 9 + 10 + 11
    assert torch.equal(uncached.visits[..., -11:], whole.visits)
    tokens = greedy(model, inputs)[0]
    with trace(model) as seen:
        assert torch.equal(greedy(model, inputs)[0], tokens)  # watching changes nothing
