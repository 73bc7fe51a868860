"""Skip or exit for answers: before and after a short tuning of each."""

from functools import partial
from typing import Any

from trol.depth import Plan, depth
from trol.policies.planned import Planned
from trol.studies.skip_or_exit import plan_of
from trol.studies.study import Arm, Claim, Evidence, Study, Table
from trol.studies.subject import Subject
from trol.studies.tuned import PLAIN, held_out, tuned, untuned

WAYS = ("full", "skip", "exit")
PART = 4
"""One layer in so many is left out."""


def _plan(subject: Subject, way: str) -> Plan:
    return Plan("all") if way == "full" else plan_of(way, PART, subject.layers)


def _before(subject: Subject, way: str, _: object) -> list[float]:
    model = untuned(subject)
    with depth(model, Planned(_plan(subject, way), scope="answer")):
        return held_out(subject, model, subject.processor)


def _after(subject: Subject, way: str, seed: int, _: object) -> list[float]:
    policy: dict[str, Any] = PLAIN
    if way != "full":
        policy = {"policy": "plan", "plan": str(_plan(subject, way)), "scope": "answer"}
    rate = subject.amounts["rate"]
    learns = {"train": ("decoder",), "lora": 8, "learning_rate": rate}
    return tuned(subject, way, policy, seed=seed, **learns)


def _name(way: str, seed: int | None = None) -> str:
    return way if seed is None else f"{way}, tuned, seed {seed}"


def _arms(subject: Subject) -> list[Arm]:
    arms = [Arm(_name(way), partial(_before, subject, way)) for way in WAYS]
    for seed in range(subject.seeds):
        arms += [Arm(_name(way, seed), partial(_after, subject, way, seed)) for way in WAYS]
    return arms


def _tuned(way: str, evidence: Evidence) -> list[str]:
    return [_name(way, seed) for seed in range(evidence.seeds)]


def _tables(evidence: Evidence) -> list[Table]:
    rows = [
        [way, f"{evidence.mean(way):.3f}", f"{evidence.units(*_tuned(way, evidence)).mean():.3f}"]
        for way in WAYS
    ]
    title = "Nats per token of answers that were not learnt from"
    return [Table(title, ["", "before", "after"], rows)]


STUDY = Study(
    name="tuned-skip-or-exit",
    hypothesis=(
        "After a short tuning of each, evenly spaced skipped layers cost answers less than an "
        "early exit."
    ),
    design=(
        "Answers to questions about Python's library skip a quarter of the layers, evenly spaced "
        "(skip) or the last ones (exit); questions skip none, as in the paper. LoRA of rank 8 on "
        "the decoder, the same short run for each. Nats per token of each answer that was not "
        "learnt from."
    ),
    controls=(
        "The full model, tuned as long; the same questions and seeds for all. Weights are rounded "
        "to bfloat16 in all arms, and losses measured in float32."
    ),
    amounts={
        "tiny": {"questions": 6, "steps": 2, "batch": 2, "rate": 1e-3},
        "real": {"questions": 100, "steps": 40, "batch": 4, "rate": 3e-3},
    },
    arms=_arms,
    claims=(
        Claim(
            "A pretrained decoder's answers stand skips better than exits",
            "Glavas et al., arXiv 2410.20022",
            "nats of exit above skip, before tuning",
            "above",
            0.0,
            lambda e: e.difference("exit", "skip"),
        ),
        Claim(
            "So they do after a short tuning of each",
            "Glavas et al., arXiv 2410.20022",
            "nats of exit above skip, after tuning",
            "above",
            0.0,
            lambda e: e.difference(_tuned("exit", e), _tuned("skip", e)),
        ),
    ),
    tables=_tables,
)
