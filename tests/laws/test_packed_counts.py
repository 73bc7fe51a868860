"""What packing leaves out: the tokens computed are those that go, and where it pays alone."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache, PreTrainedModel

from hosts import HOSTS, Host
from hosts.checks import greedy
from hosts.releases import NEVER_PACKED
from trol.depth import Trace, attach, attached, executor, trace
from trol.depth import choosing as choosing_
from trol.depth import packed as packed_
from trol.depth.pace import Pace, pace_of
from trol.host.names import CACHE
from trol.policies.planned import Planned
from trol.policies.random_tokens import RandomTokens

from .subjects import POLICIES, attach_settled, gap, layers_of, made, some_hosts

pytestmark = pytest.mark.usefixtures("no_grad")

LINEAR = {"llama", "phi3", "gemma3", "opt", "gpt2", "gpt_neox", "qwen2_5_vl"}
LINEAR_HOSTS = some_hosts(*sorted(LINEAR - NEVER_PACKED.keys()))
SHARES = {
    "twice": RandomTokens(0.5),
    "twice_question": RandomTokens(0.25, scope="question"),
    "skip": RandomTokens(0.5, visit=1),
    "skip_hole": RandomTokens(0.5, visit=1, skipped_kv="hole"),
    "nobody": RandomTokens(0.0),
    "no_layer": RandomTokens(0.0, visit=1),
    "rows": Planned(("0:2 1 3", "1-3", "exit@2")),
    "rows_hole": Planned(("0:2 1 3", "1-3", "exit@2"), skipped_kv="hole"),
}


@contextmanager
def counting(model: PreTrainedModel) -> Iterator[list[int]]:
    """Counts the tokens that enter each layer's MLP."""
    counts = [0] * 4
    hooks = []
    for index, layer in enumerate(layers_of(model)):

        def count(_module: object, args: tuple[Tensor, ...], index: int = index) -> None:
            counts[index] += args[0].numel() // args[0].shape[-1]

        mlp = next(
            module
            for name in ("mlp", "fc1", "feed_forward")
            if (module := getattr(layer, name, None)) is not None
        )
        hooks.append(mlp.register_forward_pre_hook(count))
    try:
        yield counts
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize("host", LINEAR_HOSTS)
@pytest.mark.parametrize("name", SHARES)
def test_those_that_go_are_computed_and_nobody_else(host: Host, name: str) -> None:
    """What enters an MLP is what the trace says that visits, in a prompt and in steps."""
    model, inputs = attach(host.build(), SHARES[name]), host.inputs(batch=3, length=24)
    settings = {"max_new_tokens": 3, "do_sample": False}
    with executor(model, "packed"):
        with trace(model):  # compares, and learns what layers return
            model.generate(**inputs, **settings)
        with counting(model) as counts, trace(model) as seen:
            model.generate(**inputs, **settings)
    visits = seen.visits
    rows, tokens = visits.shape[1:]
    for layer in range(4):
        # A group's rows are as long as its longest; of the short rows here, all go together.
        longest = _longest(visits[layer], rows, tokens - 2)
        assert visits[layer].sum() <= counts[layer] <= longest, (layer, counts)
    with executor(model, "dense"), counting(model) as all_counts:
        model.generate(**inputs, **settings)
    assert sum(counts) < sum(all_counts)
    if name == "twice":
        assert 1.3 < sum(counts) / (4 * rows * tokens) < 1.7
    if name == "nobody":
        assert counts == [rows * tokens] * 4
    if name == "no_layer":
        assert counts == [0] * 4


def _longest(visits: Tensor, rows: int, prompt: int) -> int:
    """Tokens computed at most: each visit pads the rows of each call to the longest one."""
    total = 0
    for part in (visits[:, :prompt], *visits[:, prompt:].split(1, dim=1)):
        for number in range(1, int(visits.max()) + 1):
            going = (part >= number).sum(1)
            total += int(going.max()) * int((going > 0).sum())
    return total


@pytest.mark.parametrize("host", some_hosts("llama", "mistral", "gpt2", "gpt_neox", "qwen3_moe"))
@pytest.mark.parametrize("name", SHARES)
@pytest.mark.parametrize("masked", [True, False])
def test_flops_predicted_are_flops_counted(host: Host, name: str, masked: bool) -> None:
    """Packed visits, keys alone, rows kept: the trace's number is torch's."""
    model = host.build("eager")
    for config in (model.config, model.config.get_text_config()):
        config._experts_implementation = "eager"
    attach(model, SHARES[name])
    inputs = host.inputs(batch=3)
    if not masked:
        inputs.pop("attention_mask")
    with executor(model, "packed"):
        model(**inputs)
        with FlopCounterMode(display=False) as counter:
            model(**inputs)
        with trace(model) as seen:
            model(**inputs)
    totals = {k: sum(v.values()) for k, v in counter.get_flop_counts().items()}
    inside = {n for n, m in model.named_modules() if any(m is one for one in layers_of(model))}
    assert seen.cost.flops == sum(v for k, v in totals.items() if k.partition(".")[2] in inside)


def test_flops_of_keys_without_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a layer is wide enough to leave out the queries of those who leave keys alone."""
    monkeypatch.setattr(packed_, "pace_of", lambda *_: Pace(1.0, 0.0))
    test_flops_predicted_are_flops_counted(HOSTS["llama"], "skip", masked=True)


@pytest.fixture
def packings(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For each visit that is not dense, whether tokens go through the layer in it."""
    seen, own = [], packed_.packed_visit

    def noted(run, state, plane, packing):
        seen.append(bool(packing.going))
        return own(run, state, plane, packing)

    monkeypatch.setattr("trol.depth.executors.packed_visit", noted)
    return seen


def _paces(monkeypatch: pytest.MonkeyPatch, flops: float, operation: float) -> None:
    for room in (choosing_, packed_):
        monkeypatch.setattr(room, "pace_of", lambda *_: Pace(flops, operation))


@pytest.mark.parametrize("name", POLICIES)
def test_small_hosts_stay_dense_by_themselves(
    name: str, packings: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gathering takes longer there than computing all; nothing is compared either."""
    _paces(monkeypatch, 3e10, 3e-6)  # of a slow core
    host = HOSTS["llama"]
    model = attach_settled(host.build(), made(name))
    greedy(model, host.inputs(batch=2))
    assert not any(packings)
    assert not attached(model)[1].depth_verdicts


@pytest.mark.parametrize("name", ["trol_tau", "some_twice", "some_skip"])
def test_auto_packs_where_it_pays(
    name: str, packings: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Were operations free, whatever is left out would pay; `dense` does not ask."""
    _paces(monkeypatch, 3e10, 0.0)
    host = HOSTS["llama"]
    model, inputs = attach_settled(host.build(), made(name)), host.inputs(batch=2)
    with executor(model, "dense"):
        expected = model(**inputs, use_cache=False).logits
    assert not packings
    assert gap(model(**inputs, use_cache=False).logits, expected) <= host.default_exact
    assert any(packings)
    assert set(attached(model)[1].depth_verdicts.values()) == {True}


def test_a_wide_layer_packs_few_tokens_and_not_most(
    packings: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The density from which on dense is taken follows from the pace."""
    host = HOSTS["llama"]
    inputs = host.inputs(length=64)
    _paces(monkeypatch, 1e6, 0.0025)  # a visit of all takes 1.5 seconds, a call more a quarter
    found = {}
    for share in (0.1, 0.9):
        packings.clear()
        model = attach(host.build(), RandomTokens(share))
        model(**inputs, use_cache=False)
        found[share] = any(packings)
    assert found == {0.1: True, 0.9: False}


@pytest.mark.parametrize("name", ["trol_tau", "some_twice", "some_skip", "repeat"])
def test_an_unknown_side_input_keeps_a_layer_dense(name: str, packings: list[bool]) -> None:
    """A tensor that nobody knows how to gather."""
    host = HOSTS["llama"]
    model, inputs = attach_settled(host.build(), made(name)), host.inputs(batch=2)
    hooks = [
        layer.register_forward_pre_hook(
            lambda _m, args, kwargs: (args, {**kwargs, "strange": torch.zeros(1)}),
            with_kwargs=True,
        )
        for layer in layers_of(model)
    ]
    with executor(model, "packed"):
        strange = greedy(model, inputs)
        assert not any(packings)
        for hook in hooks:
            hook.remove()
        assert torch.equal(strange[0], greedy(model, inputs)[0])
        assert any(packings)


@pytest.mark.parametrize("asked", ["output_attentions", "output_router_logits"])
@pytest.mark.parametrize("how", ["call", "config"])
def test_what_is_shown_of_every_token_is_computed_for_every_token(
    asked: str, how: str, packings: list[bool]
) -> None:
    host = HOSTS["qwen3_moe"]
    model, inputs = attach(host.build("eager"), RandomTokens(0.5, visit=1)), host.inputs(batch=2)
    if how == "config":
        setattr(model.config, asked, True)
    said = {asked: True} if how == "call" else {}
    with executor(model, "packed"):
        model(**inputs, **said)
        assert not packings
        setattr(model.config, asked, False)
        model(**inputs)
        assert any(packings)


@pytest.mark.parametrize("attention", ["flash_attention_2", "flex_attention", "paged|sdpa"])
def test_other_attentions_are_not_gathered(attention: str, packings: list[bool]) -> None:
    """They take masks in other forms; tokens that leave keys and values alone need none."""
    host = HOSTS["llama"]
    model, inputs = attach(host.build(), RandomTokens(0.5)), host.inputs(batch=2)
    own = attached(model)[1]._open

    def renamed(*args):
        call = own(*args)
        call.config = copy.copy(model.config)
        call.config._attn_implementation_internal = attention
        return call

    attached(model)[1]._open = renamed
    with executor(model, "packed"):
        model(**inputs, use_cache=False)
    assert not any(packings)


def test_a_trace_of_packed_and_dense_tells_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Visits and weights are those of the policy; FLOPs those of the executor."""
    host = HOSTS["llama"]
    model, inputs = attach(host.build(), RandomTokens(0.5)), host.inputs(batch=2, length=32)
    traces: dict[str, Trace] = {}
    for who in ("dense", "packed"):
        with executor(model, who):
            model(**inputs)
            with trace(model) as traces[who]:
                model(**inputs, **{CACHE: DynamicCache(config=model.config)})
    dense, packed = traces["dense"], traces["packed"]
    assert torch.equal(dense.visits, packed.visits)
    assert torch.equal(dense.weights, packed.weights)
    assert dense.cost.kv_bytes == packed.cost.kv_bytes
    assert packed.cost.flops < 0.9 * dense.cost.flops


def test_the_pace_is_nobody_elses_work() -> None:
    """It is measured when it is first asked for, perhaps while somebody counts FLOPs."""
    pace_of.cache_clear()
    with FlopCounterMode(display=False) as counter:
        pace = pace_of(torch.device("cpu"), torch.float32)
    assert counter.get_total_flops() == 0
    assert pace.flops > 1e8
    assert 1e-8 < pace.operation < 1e-3
