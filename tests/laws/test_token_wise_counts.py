"""What token-wise execution leaves out, what it looks at, and when it is taken."""

import copy

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedModel

from hosts import HOSTS, Host
from hosts.checks import greedy
from hosts.releases import SAME_VISITS_FOR_ALL_ROWS
from hosts.text import GATED
from trol.depth import Trace, attach, attached, depth, executor, trace
from trol.depth import visits as executors
from trol.errors import HostError, UsageError
from trol.host import names as parts
from trol.host.names import CACHE
from trol.host.torch_internals import Launches
from trol.policies.planned import Planned
from trol.policies.random_tokens import RandomTokens

from .subjects import POLICIES, attach_settled, entered, gap, layers_of, made, some_hosts

pytestmark = pytest.mark.usefixtures("no_grad")

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

LINEAR_HOSTS = some_hosts("llama", "phi3", "gemma3", "opt", "gpt2", "gpt_neox", "qwen2_5_vl")


@pytest.mark.parametrize("host", LINEAR_HOSTS)
@pytest.mark.parametrize("name", SHARES)
def test_those_that_go_are_computed_and_nobody_else(host: Host, name: str) -> None:
    """What enters an MLP is what the trace says that visits, in a prompt and in steps."""
    if name.startswith("rows") and host.name in SAME_VISITS_FOR_ALL_ROWS:
        pytest.skip(SAME_VISITS_FOR_ALL_ROWS[host.name])
    model, inputs = attach(host.build(), SHARES[name]), host.inputs(batch=3, length=24)
    settings = {"max_new_tokens": 3, "do_sample": False}
    with executor(model, "token-wise"), entered(model) as counts, trace(model) as seen:
        model.generate(**inputs, **settings)
    assert counts == seen.visits.sum((1, 2)).tolist()
    with executor(model, "dense"), entered(model) as all_counts:
        model.generate(**inputs, **settings)
    assert sum(counts) < sum(all_counts)


@pytest.mark.parametrize("host", some_hosts("llama", "mistral", "gpt2", "gpt_neox", "qwen3_moe"))
@pytest.mark.parametrize("name", SHARES)
@pytest.mark.parametrize("masked", [True, False])
def test_flops_predicted_are_flops_counted(host: Host, name: str, masked: bool) -> None:
    """Some tokens alone, keys alone, rows kept: the trace's number is torch's."""
    model = host.build("eager")
    for config in (model.config, model.config.get_text_config()):
        config._experts_implementation = "eager"
    attach(model, SHARES[name])
    inputs = host.inputs(batch=3)
    if not masked:
        inputs.pop("attention_mask")
    with executor(model, "token-wise"):
        with FlopCounterMode(display=False) as counter:
            model(**inputs)
        with trace(model) as seen:
            model(**inputs)
    totals = {k: sum(v.values()) for k, v in counter.get_flop_counts().items()}
    inside = {n for n, m in model.named_modules() if any(m is one for one in layers_of(model))}
    assert seen.cost.flops == sum(v for k, v in totals.items() if k.partition(".")[2] in inside)


NO_LOOKS = ("trol", "trol_all", "trol_three", "skip", "exit", "repeat", "skip_question")
"""Policies without a threshold."""


@pytest.mark.parametrize(
    "name", ["plain", *NO_LOOKS, "rows", "rows_hole", "trol_tau", "some_twice", "some_skip"]
)
@pytest.mark.parametrize("which", ["auto", "token-wise"])
def test_no_value_is_looked_at_without_a_threshold(name: str, which: str) -> None:
    """Each look waits for the device; with a threshold there is one in each layer."""
    host = HOSTS["llama"]
    policy = made(name) if name in POLICIES else SHARES[name]
    model = attach_settled(host.build("sdpa"), policy)
    ids = host.inputs(batch=3, length=12)["input_ids"]
    model.model(ids)  # layers are asked once what they return
    cache = DynamicCache(config=model.config)
    with executor(model, which):
        for given in (ids, ids[:, :1]):
            with Launches() as seen:
                model.model(given, **{CACHE: cache})
            looks = name in ("trol_tau", "some_twice", "some_skip")
            assert seen.looks == 4 * looks


def test_auto_takes_it_where_more_is_left_out_than_it_takes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By FLOPs, and not where a product reads its weights for so few tokens anyway."""
    host = HOSTS["llama"]
    model, inputs = attach(host.build(), RandomTokens(0.5)), host.inputs(batch=2, length=16)
    for worth, few, alone in ((1, 1, True), (10**9, 1, False), (1, 33, False)):
        monkeypatch.setattr(executors, "LEAST_SAVED", worth)
        monkeypatch.setitem(executors.LEAST_TOKENS, "cpu", few)
        with entered(model) as counts:
            model(**inputs)
        assert (sum(counts) < 4 * 64) == alone


@pytest.mark.parametrize("name", POLICIES)
def test_small_hosts_stay_dense_by_themselves(name: str) -> None:
    """Gathering takes longer there than computing all; what nobody needs is left out all the same.

    The last visit of the last layer, of which `generate` reads one token, too.
    """
    host = HOSTS["llama"]
    model = attach_settled(host.build(), made(name))
    with executor(model, "dense"):
        expected = greedy(model, host.inputs(batch=2))
    told = greedy(model, host.inputs(batch=2))
    assert told[0].tolist() == expected[0].tolist()
    assert gap(told[1], expected[1]) <= host.default_exact


def test_a_trace_of_either_executor_tells_the_same() -> None:
    """Visits and weights are those of the policy; FLOPs those of the executor."""
    host = HOSTS["llama"]
    model, inputs = attach(host.build(), RandomTokens(0.5)), host.inputs(batch=2, length=32)
    traces: dict[str, Trace] = {}
    for who in ("dense", "token-wise"):
        with executor(model, who), trace(model) as traces[who]:
            model(**inputs, **{CACHE: DynamicCache(config=model.config)})
    dense, alone = traces["dense"], traces["token-wise"]
    assert torch.equal(dense.visits, alone.visits)
    assert torch.equal(dense.weights, alone.weights)
    assert dense.cost.kv_bytes == alone.cost.kv_bytes
    assert alone.cost.flops < 0.9 * dense.cost.flops


@pytest.mark.parametrize("name", ["rows", "twice"])
def test_an_unknown_side_input_keeps_rows_together(name: str) -> None:
    """A tensor of which nobody knows what belongs to which row; single tokens need not know."""
    host = HOSTS["llama"]
    model, inputs = attach(host.build(), SHARES[name]), host.inputs(batch=3)
    hooks = [
        layer.register_forward_pre_hook(
            lambda _m, args, kwargs: (args, {**kwargs, "strange": torch.zeros(1)}),
            with_kwargs=True,
        )
        for layer in layers_of(model)
    ]
    with executor(model, "token-wise"):
        strange = greedy(model, inputs)
        for hook in hooks:
            hook.remove()
        known = greedy(model, inputs)
    assert strange[0].tolist() == known[0].tolist()
    assert gap(strange[1], known[1]) <= host.default_exact


class Neighbours(torch.nn.Module):
    """An MLP by name, whose tokens see each other."""

    def __init__(self, own: torch.nn.Module) -> None:
        super().__init__()
        self.own = own

    def forward(self, state: torch.Tensor) -> torch.Tensor:
        return self.own(state.roll(1, dims=1).index_fill(1, torch.tensor(0), 0))


def entangled() -> PreTrainedModel:
    model = HOSTS["llama"].build()
    for layer in layers_of(model):
        layer.mlp = Neighbours(layer.mlp)
    return model


def test_parts_that_only_sound_token_wise_are_found_out() -> None:
    """By the probe: that host's tokens are computed together, and who asks for more is told why."""
    host = HOSTS["llama"]
    model = attach(entangled(), RandomTokens(0.5))
    with executor(model, "dense"):
        expected = forward_all(model, host)
    assert torch.equal(forward_all(model, host), expected)
    with (
        pytest.raises(HostError, match=r"llama has no token-wise executor: some tokens alone give"),
        executor(model, "token-wise"),
    ):
        pass
    untouched = attach(copy.deepcopy(host.build()), RandomTokens(0.5))
    assert not attached(untouched)[1].depth_entangled


def forward_all(model: PreTrainedModel, host: Host) -> torch.Tensor:
    return model(**host.inputs(length=200), use_cache=False).logits


@pytest.mark.parametrize("host", some_hosts("llama", "bloom", "opt", "falcon_h1", "qwen3_next"))
def test_the_parts_that_names_propose(host: Host) -> None:
    """They are modules with matrices; none lies inside another, and no key map is among them."""
    for layer in layers_of(host.build()):
        found = list(parts.parts_in(layer, parts.token_wise_parts(layer)))
        names = {name for name, part in layer.named_modules() if any(part is one for one in found)}
        assert names
        assert not any(n.endswith(("k_proj", "v_proj", "query_key_value", "c_attn")) for n in names)
        assert not any(n != m and n.startswith(f"{m}.") for n in names for m in names)


def test_a_family_that_cannot_be_had_more_exactly_is_not_blamed() -> None:
    """Alone and among all are compared on a cache each, and without each: like with like."""
    own = {"attn_layer_indices": [1, 3], "mamba_n_heads": 8, "mamba_d_head": 8}
    own |= {"mamba_n_groups": 1, "mamba_d_state": 8, "num_hidden_layers": 4}
    config = AutoConfig.for_model("bamba", **{**GATED, **own})
    torch.manual_seed(0)
    model = attach(AutoModelForCausalLM.from_config(config).eval(), RandomTokens(0.5))
    assert not attached(model)[1].depth_entangled


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (torch.ones(2, 1), r"Tensor of shape \[2, 1\] at layer 0"),
        (torch.tensor(1.0), r"Tensor of shape \[\] at layer 0"),
        (torch.ones(2, 9, 1), r"Tensor of shape \[2, 9, 1\]"),
        (None, "NoneType of shape None"),
        ([1.0], "list of shape None"),
    ],
)
@pytest.mark.parametrize("which", ["dense", "token-wise", "auto"])
def test_an_answer_of_another_form_is_refused(answer: object, told: str, which: str) -> None:
    """By name, at the layer, and alike whoever executes."""

    class Odd(RandomTokens):
        name = "odd"

        def again(self, visit):
            return 1.0 if visit.number == 0 else answer

    model, inputs = (
        attach(HOSTS["llama"].build(), RandomTokens(0.5)),
        HOSTS["llama"].inputs(batch=2),
    )
    with (
        depth(model, Odd()),
        executor(model, which),
        pytest.raises(UsageError, match=f"odd answered {told}"),
    ):
        model(**inputs)
