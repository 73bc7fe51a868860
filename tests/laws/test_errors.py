"""What trol cannot do rightly it refuses by name, with the reason and the cure."""

import re
from dataclasses import fields, is_dataclass
from functools import partial
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    BertConfig,
    BertModel,
    DynamicCache,
)

import trol
from hosts import HOSTS
from trol.depth import AbstractPolicy, Answer, Bounds, Visit, attach, detach, is_attached, trace
from trol.depth.planes import install_planes
from trol.depth.policy import from_settings, names, policy_class, to_settings
from trol.errors import HostError, UsageError
from trol.evaluation.calibration import check_exit_wishes
from trol.host.names import CACHE
from trol.policies.controller import Controller
from trol.policies.exits import EarlyExit
from trol.policies.mixer import TrolMixer
from trol.policies.planned import Planned
from trol.policies.random_tokens import RandomTokens
from trol.policies.router import Router

from .subjects import HOLED, NO_HOLES, POLICIES, gap, made

pytestmark = pytest.mark.usefixtures("no_grad")

SMALL = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
}


@pytest.fixture
def llama():
    return HOSTS["llama"].build()


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda m: attach(m, "trol_mixr"), "unknown policy 'trol_mixr'. Did you mean 'trol_mixer'"),
        (lambda m: attach(m, "0-40"), "layer 40 of plan '0-40' (which is exit@41): this stack has"),
        (lambda m: attach(m, "0-x"), "'0-x' in plan '0-x' is no segment"),
        (lambda m: attach(m, ""), "an empty plan"),
        (lambda m: trol.attach(m, 5), "got 5; give a policy (an instance: TrolMixer())"),
        (
            lambda m: trol.attach(m, TrolMixer),
            "got the class TrolMixer; give a policy",
        ),
        (lambda m: trol.attach(m, "replay"), "policy replay needs weights and visits"),
        (lambda m: trol.depth(m, None).__enter__(), "got None; give a policy"),
        (lambda m: trol.speculate(m, draft=None).__enter__(), "got None; give a policy"),
        (lambda _: trol.attach("x", "all"), "got str 'x'; give a transformers model"),
        (lambda m: attach(m, Planned(["all", "0-4"])), "layer 4 of plan '0-4'"),
        (
            lambda _: TrolMixer(scope="questions"),
            "unknown scope 'questions'. Did you mean 'question'",
        ),
        (lambda _: TrolMixer(training_scope="al"), "unknown scope 'al'. Did you mean 'all'"),
        (lambda _: TrolMixer(0), "passes is 0; give a whole number, 1 or more"),
        (lambda _: TrolMixer(sharing="share"), "unknown sharing 'share'. Did you mean 'shared'"),
        (lambda _: TrolMixer(tau=1.0), "tau is 1.0, but must lie in [0, 1)"),
        (lambda _: TrolMixer(tau=-0.1), "tau is -0.1"),
        (lambda _: TrolMixer(initial_gate=0), "initial_gate is 0, but must lie in (0, 1)"),
        (lambda _: Planned(skipped_kv="holes"), "unknown skipped_kv 'holes'. Did you mean 'hole'"),
        (lambda _: from_settings({"policy": "trol_mixer", "pases": 2}), "Did you mean 'passes'"),
        (lambda _: from_settings({"policy": "plann"}), "unknown policy 'plann'"),
        (detach, "no policy is attached to this model; call trol.attach"),
        (lambda m: attach(attach(m, "all"), "all"), "attached to this model already"),
    ],
)
def test_usage_errors_give_the_cure(llama, make, said: str) -> None:
    before = set(vars(llama))
    with pytest.raises(UsageError) as caught:
        make(llama)
    assert said in str(caught.value)
    if not trol.depth.is_attached(llama):
        assert set(vars(llama)) == before  # nothing half-attached


WHOLE = [
    ("passes", TrolMixer, 1),
    ("seed", partial(RandomTokens, 0.2), 0),
    ("visit", partial(RandomTokens, 0.2), 0),
    ("first", EarlyExit, 0),
    ("every", EarlyExit, 1),
    ("after", partial(Router, ["0", "all"]), 0),
    ("hidden", partial(Router, ["0", "all"]), 1),
    ("hidden_layers", Controller, 0),
    ("tokens", lambda **given: trol.speculate(torch.nn.Module(), **given).__enter__(), 1),
]
"""Settings that count something, what takes them, and their least values."""


@pytest.mark.parametrize("value", [-1, 1.5, "1", None, True])
@pytest.mark.parametrize(("name", "make", "least"), WHOLE)
def test_counts_are_whole_numbers_and_no_bools(name: str, make, least: int, value: Any) -> None:
    said = f"{name} is {value!r}; give a whole number, {least} or more"
    with pytest.raises(UsageError, match=re.escape(said)):
        make(**{name: value})


NUMBERS = {
    **{
        name: [one.name for one in fields(cls) if "float" in str(one.type)]
        for name in trol.POLICIES
        if is_dataclass(cls := policy_class(name))
    },
    "wishes": ["quality", "cost", "confidence"],
}
"""The policies and what is wished of exits, and those of their settings that are numbers."""

GIVEN: dict[str, dict[str, Any]] = {"router": {"menu": ["0", "all"]}}


def with_setting(owner: str, settings: dict[str, Any]) -> None:
    if owner == "wishes":
        quality = None if "cost" in settings else 0.9
        given = {"quality": quality, "cost": None, "confidence": 0.9, **settings}
        check_exit_wishes(**given, answers=100)
    else:
        policy_class(owner)(**GIVEN.get(owner, {}), **settings)


@pytest.mark.parametrize("value", ["x", "0.5", True, (), {}, 1j])
@pytest.mark.parametrize(
    ("owner", "name"), [(owner, name) for owner, names in NUMBERS.items() for name in names]
)
def test_numbers_are_numbers(owner: str, name: str, value: Any) -> None:
    with pytest.raises(UsageError, match=f"^(no )?{name}.*give (a number|one)"):
        with_setting(owner, {name: value})


def test_calls_that_cannot_be_right(llama) -> None:
    ids = torch.tensor([[5, 6, 7], [8, 9, 10]])
    with (
        pytest.raises(UsageError, match="has parameters that this model does not carry"),
        trol.depth(attach(llama, "all"), TrolMixer()),
    ):
        pass
    detach(llama)
    attach(llama, Planned(["all", "exit@1", "0 3"]))
    with pytest.raises(UsageError, match="given for 3 rows, but this batch has 2"):
        llama(ids)
    with pytest.raises(UsageError, match="an empty prompt"):
        llama.generate(ids[:, :0], max_new_tokens=1)
    with pytest.raises(UsageError, match="assistant_masks cover 2 tokens, the prompt has 3"):
        llama.generate(ids, assistant_masks=torch.zeros(2, 2), max_new_tokens=1)
    detach(llama)
    assert gap(llama(ids).logits, HOSTS["llama"].build()(ids).logits) == 0


def test_a_cache_that_misses_tokens_is_refused(llama) -> None:
    """Filled while all skipped a layer, then asked to run it: its past would have gaps."""
    attach(llama, "all")
    cache = DynamicCache(config=llama.config)
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    with trol.depth(llama, "0 2-3"):
        llama(ids, **{CACHE: cache})
    with pytest.raises(HostError, match=r"layers \[1\] of this cache hold 0 of 5 tokens"):
        llama(ids[:, :1], **{CACHE: cache})
    with trol.depth(llama, "0 2-3"):
        assert llama(ids[:, :1], **{CACHE: cache}).logits.isfinite().all()
    with pytest.raises(HostError, match="got a list as the cache"):
        install_planes([])


@pytest.mark.parametrize("name", NO_HOLES)
def test_holes_are_refused_where_they_cannot_be(name: str) -> None:
    model = HOSTS[name].build()
    with pytest.raises(
        HostError, match=r"skipped_kv='hole' is not possible on .*set skipped_kv='project'"
    ):
        attach(model, made("hole_answer"))
    attach(model, made("skip_answer"))
    with pytest.raises(HostError, match="not possible"), trol.depth(model, made("hole_answer")):
        pass


@pytest.mark.parametrize(
    ("model_type", "settings", "reason"),
    [
        ("gemma4_text", SMALL, "share keys and values"),
        ("gemma3n_text", SMALL | {"num_kv_shared_layers": 0}, "share keys"),
        (
            "mamba",
            {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2},
            "no attention layer",
        ),
    ],
)
def test_families_that_cannot_be_right_are_refused(model_type: str, settings, reason: str) -> None:
    config = AutoConfig.for_model(model_type, **settings)
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(HostError, match=f"{model_type} rightly: .*{reason}"):
        attach(model, "all")
    assert not trol.depth.is_attached(model)


def test_other_models_are_refused() -> None:
    t5 = AutoConfig.for_model(
        "t5", d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2, vocab_size=99
    )
    with pytest.raises(HostError, match="is an encoder-decoder"):
        attach(AutoModelForSeq2SeqLM.from_config(t5), "all")
    bert = BertConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        vocab_size=99,
    )
    with pytest.raises(HostError, match="no list of decoder layers"):
        attach(BertModel(bert), "all")
    with pytest.raises(HostError, match="no list of decoder layers"):
        attach(torch.nn.Linear(2, 2), "all")


def test_an_empty_stack_and_a_repeated_layer_are_refused() -> None:
    model = HOSTS["llama"].build()
    model.model.layers[1] = model.model.layers[0]
    with pytest.raises(HostError, match="repeats one layer object"):
        attach(model, "all")


@pytest.mark.parametrize("name", [*POLICIES, *HOLED])
def test_policies_are_values(name: str) -> None:
    """Settings make the policy again; equal settings are equal policies."""
    policy = made(name)
    assert from_settings(to_settings(policy)) == policy == made(name)
    assert policy != Planned("0:7")
    assert type(policy).__name__ in repr(policy)
    assert policy.name in names()


def test_every_registered_policy_has_laws() -> None:
    """A policy that is added to the registry must be added to the subjects of the laws."""
    elsewhere = {"replay", "layer_dropout"}  # the second is the plain model where nothing learns
    assert {made(name).name for name in (*POLICIES, *HOLED)} | elsewhere == set(trol.POLICIES)


class Answering(AbstractPolicy):
    """Answers and bounds as it is told."""

    name = "answering"

    def __init__(self, answer: float = 0.5, least: int = 1, most: int = 2) -> None:
        super().__init__()
        self.answer, self.own = answer, Bounds(least, most)

    def bounds(self, layer: int) -> Bounds:
        return self.own

    def again(self, visit: Visit) -> Answer:
        return 1.0 if visit.number == 0 else torch.full(visit.state.shape[:2], self.answer)

    def settings(self) -> dict[str, Any]:
        return {"answer": self.answer}


@pytest.mark.parametrize("bounds", [(2, 1), (-1, 1)])
def test_bounds_that_are_none_are_refused(bounds: tuple[int, int]) -> None:
    model = HOSTS["llama"].build(layers=2)
    with pytest.raises(UsageError, match=r"answering gives Bounds.*0 <= least <= most"):
        attach(model, Answering(0.5, *bounds))
    assert not is_attached(model)


@pytest.mark.parametrize("answer", [float("nan"), 1.5, -0.1])
def test_a_trace_refuses_answers_that_are_no_shares(answer: float) -> None:
    model = attach(HOSTS["llama"].build(layers=2), Answering(answer))
    with pytest.raises(UsageError, match=r"answered \[.* at layer 0; a_r lies in"), trace(model):
        model(**HOSTS["llama"].inputs())
