"""Decoders that learn hops from nothing, or hosts that learn them, and what they then answer."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from trol.data.hops import ANSWER, WORDS, kinds
from trol.depth import PolicyLike, depth
from trol.evaluation.answers import answers
from trol.evaluation.depth_columns import DepthColumns
from trol.evaluation.items import Item, pair_items
from trol.family.presets import text_decoder, word_tokenizer
from trol.studies.gate_controls import ConstantWeights, RandomWeights
from trol.studies.learning import host_of, kept, learnt
from trol.studies.study import NOTHING, Arm, Estimate, Evidence, of_seed, of_seeds
from trol.studies.subject import Subject
from trol.training import Recipe, Stage, reopened

TROL = {"policy": "trol_mixer", "passes": 2, "scope": "all", "initial_gate": 0.5}
"""All tokens are traversed, learning and asked: what scopes do is the study `answers`."""

PLAIN = {"policy": "plain"}

TRAVERSED, WITHOUT = "TroL", "one visit"
"""Names of learners that studies share."""

RATES = {"learning_rate": 2e-3, "mixer_learning_rate": 1e-4, "muon": 0.012}
"""Of decoders that learn from nothing, chosen on seed 0 by how soon two hops are learnt, before the
studies ran; faster mixers close the gates before that (LAB.md)."""

HOST_RATES = {"learning_rate": 3e-4, "mixer_learning_rate": 1e-4, "lora": 8}
"""Of a model that is named in their place."""

EXPERTS = 4
"""Of a mixture-of-experts twin, three of which each token takes, as in TroL's Table 5."""

TINY = {"most": 2, "layers": 1, "width": 64, "batch": 64, "steps": 2000, "questions": 600}
REAL = {"most": 4, "layers": 2, "width": 384, "batch": 256, "steps": 6000, "questions": 1200}
"""Decoders of .03 and of 2.5 million parameters; the second wants a GPU."""

NARROW = 4
"""What part of the state's width an MLP is wide: too narrow to know what tables answer, so that
look-ups are left to attention. Else one layer learns two look-ups without a second visit."""

JOINED = """\
{%- for message in messages -%}
    {%- if message.role == 'assistant' -%}
        {%- generation -%}{{- ' ' + message.content + eos_token -}}{%- endgeneration -%}
    {%- else -%}
        {{- message.content -}}
    {%- endif -%}
{%- endfor -%}
"""
"""A chat template without words of its own: the first look-up begins where the question ends."""

DESIGN = (
    "Questions of one or two look-ups that wait for each other (data `hops`), decoders of one "
    "layer, whose attention looks up one step, that learn them from nothing "
)


@dataclass(frozen=True)
class Learner:
    """One decoder of a study, and how it learns."""

    name: str
    policy: Mapping[str, Any] = field(default_factory=lambda: TROL)
    layers: int = 1
    """Times the layers that the size says."""
    width: float = 1.0
    """Times its hidden size."""
    experts: int = 0
    """Experts of each layer; 0 for none."""
    length: float = 1.0
    """Times its optimiser steps."""
    train: tuple[str, ...] = ("decoder", "mixers")
    """Parts that learn."""

    @property
    def is_twin(self) -> bool:
        """Whether it is a decoder of another form, which no named model can be made to have."""
        return (self.layers, self.width, self.experts) != (1, 1.0, 0)


TWO_VISITS, ONE_VISIT = Learner(TRAVERSED), Learner(WITHOUT, {**TROL, "passes": 1})
"""The two that studies share; the second has the same parameters, gates that nothing reads."""

TWICE_THE_LAYERS = Learner("twice the layers", PLAIN, layers=2)
"""As deep as two visits make it, with the parameters of both layers."""


def constant(name: str, weight: float) -> Learner:
    """A learner whose second visits have one given weight."""
    policy = {"policy": ConstantWeights.name, "weight": weight, "scope": "all"}
    return Learner(name, policy, train=("decoder",))


SECOND_ALONE = constant("second visit alone", 1.0)
"""As a loop of two: nothing of the first visit is left."""

RANDOM = Learner(
    "random weights",
    {"policy": RandomWeights.name, "scope": "all"},
    train=("decoder",),
)
"""Weights drawn anew for each token; see `gate_controls`."""


def trained(subject: Subject, learner: Learner, seed: int) -> Path:
    """The folder of the learner of this seed, which learns now if it never did."""
    amounts = subject.amounts
    rates: dict[str, Any] = HOST_RATES if subject.name else RATES
    host = host_of(subject) if subject.name else _new_decoder(subject, learner, seed)
    has_mixers = learner.policy["policy"] != PLAIN["policy"]
    stage = Stage(
        train=tuple(part for part in learner.train if has_mixers or part != "mixers"),
        data=_data(amounts),
        batch=amounts["batch"],
        steps=round(learner.length * amounts["steps"]),
        warmup_steps=50,
        **rates,
    )
    stages = {"learn": stage}
    if "easy_steps" in amounts:
        steps = round(learner.length * amounts["easy_steps"])
        stages = {"easy": replace(stage, data=_data({"most": 2}), steps=steps), **stages}
    recipe = Recipe(host=str(host), policy=dict(learner.policy), seed=seed, stages=stages)
    return learnt(subject, learner.name, recipe)


def _data(amounts: Mapping[str, Any]) -> str:
    return {2: "hops", 4: "hops4"}[amounts["most"]]


def _new_decoder(subject: Subject, learner: Learner, seed: int) -> Path:
    """The folder of a decoder that has learnt nothing yet."""
    layers = learner.layers * subject.amounts["layers"]
    width = round(learner.width * subject.amounts["width"])

    def save(into: Path) -> None:
        tokenizer = word_tokenizer(WORDS)
        tokenizer.chat_template = JOINED
        config = text_decoder(tokenizer, hidden_size=width, layers=layers, positions=64)
        config.intermediate_size = width // NARROW
        config.tie_word_embeddings, config.initializer_range = False, 0.02
        make: Any = LlamaForCausalLM
        if learner.experts:
            config, make = _with_experts(config, learner.experts), MixtralForCausalLM
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            make(config).save_pretrained(into)
        tokenizer.save_pretrained(into)

    form = f"{layers}-layers-{width}-wide{'-experts' * bool(learner.experts)}"
    return kept(subject, f"{form}-{seed}", save)


def _with_experts(config: LlamaConfig, experts: int) -> MixtralConfig:
    """A mixture of experts of the same form, of which each token takes all but one."""
    same = {key: value for key, value in config.to_dict().items() if key != "model_type"}
    same["intermediate_size"] = 8 * max(1, round(config.intermediate_size / 8))  # 16 bytes
    return MixtralConfig(**same, num_local_experts=experts, num_experts_per_tok=experts - 1)


@cache
def questions(most: int, count: int) -> list[Item]:
    """The questions that judge, of 1 to `most` steps; no decoder learnt from their tables."""
    return pair_items(_data({"most": most}), count, 0, "test")


def asked(
    subject: Subject, learner: Learner, seed: int, policy: PolicyLike | None = None
) -> dict[str, Any]:
    """What a learner answers, under its own policy or another.

    Returns:
        `{"right": {type: [share of right letters of each question]}, "visits": of all layers by a
        token, prompts and answers, "flops": of a question}`
    """
    return answered(subject, *opened(subject, learner, seed), policy)


def opened(subject: Subject, learner: Learner, seed: int) -> tuple[Any, Any]:
    """The learner's model, in evaluation mode, and its tokenizer."""
    model, processor = reopened(trained(subject, learner, seed))
    return model.eval(), processor


def answered(
    subject: Subject,
    model: Any,
    processor: Any,
    policy: PolicyLike | None = None,
    *,
    draw: int = 0,
) -> dict[str, Any]:
    """As `asked`, of a model that is open; `draw` is the seed of policies that draw."""
    items = questions(subject.amounts["most"], subject.amounts["questions"])
    columns = DepthColumns(model)
    torch.manual_seed(draw)
    with nullcontext() if policy is None else depth(model, policy):
        texts = answers(model, processor, items, new_tokens=ANSWER + 1, around=columns.batch)
    right: dict[str, list[float]] = {kind: [] for kind in kinds(subject.amounts["most"])}
    for item, text in zip(items, texts, strict=True):
        right[item.type].append(round(share_right(text.split(), item.answer.split()), 3))
    seen = columns.json()
    return {
        "right": right,
        "visits": round(seen["layer_visits_per_token"], 3),
        "flops": seen["flops_per_question"],
    }


def share_right(given: Sequence[str], wanted: Sequence[str]) -> float:
    """Of the letters that look-ups lead to; those between, where they begin, do not count."""
    return sum(a == b for a, b in zip(given[::2], wanted[::2], strict=False)) / len(wanted[::2])


def arms_of(subject: Subject, learners: Sequence[Learner]) -> list[Arm]:
    """One arm for each learner and seed, which is asked under its own policy."""
    return [
        Arm(of_seed(one.name, seed), lambda _, one=one, seed=seed: asked(subject, one, seed))
        for seed in range(subject.seeds)
        for one in learners
        if not (subject.name and one.is_twin)
    ]


def asked_under(
    subject: Subject, learner: Learner, policies: Mapping[str, PolicyLike]
) -> list[Arm]:
    """One arm for each seed and policy, by the name that the policy has there."""
    return [
        Arm(
            of_seed(name, seed),
            lambda _, policy=policy, seed=seed: asked(subject, learner, seed, policy),
        )
        for seed in range(subject.seeds)
        for name, policy in policies.items()
    ]


def right(evidence: Evidence, kind: str | None = None) -> Evidence:
    """Arm -> share of right letters, question by question; of one type, or of all."""
    chosen = kinds(evidence.amounts["most"]) if kind is None else [kind]
    values = {
        arm: [share for one in chosen for share in value["right"][one]]
        for arm, value in evidence.values.items()
        if "right" in value
    }
    return replace(evidence, values=values)


def deep(evidence: Evidence) -> str:
    """The type of questions of one step more than a decoder has layers."""
    return kinds(evidence.amounts["most"])[min(evidence.layers, evidence.amounts["most"] - 1)]


DEEP = "letters of questions of one step more than there are layers"
"""What `gain` compares if it is asked for `deeper` alone."""


def gain(more: str, less: str, evidence: Evidence, *, deeper: bool = False) -> Estimate:
    """Share of right letters by one learner above another's, over questions and seeds.

    Of all questions, or of those of one step more than there are layers.

    Nothing where there is none of a name, as a named model has no twins.
    """
    arms = [of_seeds(name, evidence) for name in (more, less)]
    if not all(seeds[0] in evidence.values for seeds in arms):
        return NOTHING
    return right(evidence, deep(evidence) if deeper else None).difference(*arms)


def table_rows(evidence: Evidence, names: Sequence[str]) -> list[list[str]]:
    """Name, share right by type and in all with the spread over seeds, layer visits, FLOPs."""
    rows = []
    for name in names:
        values = [
            evidence.values[arm] for arm in of_seeds(name, evidence) if arm in evidence.values
        ]
        if not values:
            continue
        shares = [
            [np.mean(value["right"][kind]) for kind in kinds(evidence.amounts["most"])]
            for value in values
        ]
        means = [f"{share:.3f}" for share in np.mean(shares, 0)]
        each = np.mean(shares, 1)
        spread = f"{each.mean():.3f} ± {each.std(ddof=1):.3f}" if len(each) > 1 else means[0]
        flops = [value["flops"] for value in values if value["flops"]]
        cost = f"{np.mean(flops) / 1e6:.2f}" if flops else ""
        rows.append([name, *means, spread, f"{np.mean([v['visits'] for v in values]):.2f}", cost])
    return rows


def heading(evidence: Evidence, what: str) -> list[str]:
    """The heading of `table_rows`."""
    return [what, *kinds(evidence.amounts["most"]), "all ± sd", "visits a token", "MFLOPs"]
