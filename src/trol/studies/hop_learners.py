"""Decoders that learn hops from nothing, or hosts that learn them, and what they then answer."""

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from trol.data.hops import STARTS, WORDS, kinds
from trol.data.own_files import SEPARATOR
from trol.depth import PolicyLike, depth
from trol.evaluation.answers import answers
from trol.evaluation.depth_columns import DepthColumns
from trol.evaluation.items import Item, pair_items
from trol.family.presets import SEPARATED, text_decoder, word_tokenizer
from trol.studies.gate_controls import RandomWeights
from trol.studies.study import Arm, Estimate, Evidence
from trol.studies.subject import Subject
from trol.training import Recipe, Stage, reopened, run

TROL = {"policy": "trol_mixer", "passes": 2, "scope": "question", "initial_gate": 0.5}
"""Question tokens are traversed at test time, all in training, as published."""

PLAIN = {"policy": "plain"}

TRAVERSED, WITHOUT = "TroL", "one visit"
"""Names of the two learners that studies share: `TROL`, and the same with one visit."""

RATES = {"learning_rate": 2e-3, "mixer_learning_rate": 1e-4, "muon": 0.012}
"""Of decoders that learn from nothing, chosen on seed 0 by how soon two hops are learnt; faster
mixers close the gates before (LAB.md)."""

HOST_RATES = {"learning_rate": 3e-4, "mixer_learning_rate": 1e-4, "lora": 8}
"""Of a model that is named in their place."""

EXPERTS = 4
"""Of a mixture-of-experts twin, three of which each token takes, as in TroL's Table 5."""

TINY = {"most": 3, "layers": 2, "width": 64, "batch": 64, "steps": 1300, "questions": 600}
REAL = {"most": 3, "layers": 2, "width": 384, "batch": 256, "steps": 4000, "questions": 1200}
"""Decoders of .1 and of 3.6 million parameters; the second wants a GPU."""


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


RANDOM = Learner(
    "random weights",
    {"policy": RandomWeights.name, "scope": "question", "training_scope": "all"},
    train=("decoder",),
)
"""Weights drawn anew for each token; see `gate_controls`."""


def trained(subject: Subject, learner: Learner, seed: int) -> Path:
    """The folder of the learner of this seed, which learns now if it never did.

    It lies beside the studies' folders, so that studies share it.

    Raises:
        UsageError: the folder holds one that learnt in another way.
    """
    amounts = subject.amounts
    shared = subject.folder.parent / "hops"
    rates, host = (HOST_RATES, subject.name) if subject.name else (RATES, "")
    if not host:
        host = str(_new_decoder(shared, learner, amounts, seed))
    has_mixers = learner.policy["policy"] != PLAIN["policy"]
    stage = Stage(
        train=tuple(part for part in learner.train if has_mixers or part != "mixers"),
        data=_data(amounts),
        batch=amounts["batch"],
        steps=round(learner.length * amounts["steps"]),
        warmup_steps=50,
        **rates,
    )
    recipe = Recipe(host=host, policy=dict(learner.policy), seed=seed, stages={"learn": stage})
    out = shared / f"{_called(learner, amounts)}-{seed}"
    run(recipe, out, resume=True, label=f"{learner.name}, seed {seed}, ")
    return out


def _data(amounts: Mapping[str, Any]) -> str:
    return {3: "hops", 4: "hops4"}[amounts["most"]]


def _called(learner: Learner, amounts: Mapping[str, Any]) -> str:
    """The learner's name with what the size says, as the name of a folder."""
    size = "-".join(str(amounts[key]) for key in ("most", "layers", "width", "steps"))
    return "-".join([learner.name.replace(" ", "-").replace(",", ""), size])


def _new_decoder(place: Path, learner: Learner, amounts: Mapping[str, Any], seed: int) -> Path:
    """The folder of a decoder that has learnt nothing yet."""
    layers, width = learner.layers * amounts["layers"], round(learner.width * amounts["width"])
    form = f"{layers}-{width}{'-experts' * bool(learner.experts)}"
    folder = place / f"new-{form}-{seed}"
    if (folder / "config.json").is_file():
        return folder
    tokenizer = word_tokenizer(WORDS)
    tokenizer.add_special_tokens({"sep_token": SEPARATOR})
    tokenizer.chat_template = SEPARATED
    config = text_decoder(tokenizer, hidden_size=width, layers=layers, positions=64)
    make: Any = LlamaForCausalLM
    if learner.experts:
        taken = {"num_local_experts": learner.experts, "num_experts_per_tok": learner.experts - 1}
        llama = {key: value for key, value in config.to_dict().items() if key != "model_type"}
        # torch's grouped products want rows of whole 16 bytes
        taken["intermediate_size"] = 8 * round(config.intermediate_size / 8)
        config, make = MixtralConfig(**{**llama, **taken}), MixtralForCausalLM
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = make(config)
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)  # its config.json says that all is there
    return folder


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
        texts = answers(model, processor, items, new_tokens=STARTS + 1, around=columns.batch)
    right: dict[str, list[float]] = {kind: [] for kind in kinds(subject.amounts["most"])}
    for item, text in zip(items, texts, strict=True):
        right[item.type].append(round(_share_right(text.split(), item.answer.split()), 3))
    seen = columns.json()
    return {
        "right": right,
        "visits": round(seen["layer_visits_per_token"], 3),
        "flops": seen["flops_per_question"],
    }


def _share_right(given: Sequence[str], wanted: Sequence[str]) -> float:
    return sum(a == b for a, b in zip(given, wanted, strict=False)) / len(wanted)


def of_seed(name: str, seed: int) -> str:
    """The name of an arm of a seed."""
    return f"{name}, seed {seed}"


def of_seeds(name: str, evidence: Evidence) -> list[str]:
    """The arms of all seeds."""
    return [of_seed(name, seed) for seed in range(evidence.seeds)]


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


def gain(more: str, less: str, evidence: Evidence, *, kind: str | None = None) -> Estimate:
    """Share of right letters by one learner above another's, over questions and seeds.

    NaN where there is none of a name: a named model has no twins.
    """
    arms = [of_seeds(name, evidence) for name in (more, less)]
    if not all(seeds[0] in evidence.values for seeds in arms):
        return Estimate(math.nan, math.nan, math.nan)
    return right(evidence, kind).difference(*arms)


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
