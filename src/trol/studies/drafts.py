"""Drafts with fewer layers of the same model: how often they are right, and whether they pay."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np

from trol.evaluation.plan_search import chosen_plan
from trol.evaluation.store import Measurements
from trol.evaluation.timing import measured_speed
from trol.policies.planned import plan_keeping
from trol.studies.oracle import sums
from trol.studies.study import Arm, Claim, Estimate, Evidence, Study, Table, resampled
from trol.studies.subject import Subject

GONE = (1, 8)
"""One layer, and one in so many."""

TOKENS = 2
"""Tokens of a draft."""

ROUNDS = 2

FIGURES = ("acceptance", "tokens_per_round", "ratio", "identical")


def _count(layers: int, which: int) -> int:
    return 1 if which == 1 else max(1, round(layers / which))


def _plans(subject: Subject, _: object) -> dict[str, str]:
    """Draft -> its plan: layers chosen by influence, or the last ones."""
    text, layers, kept = subject.windows("validation"), subject.layers, Measurements()
    plans: dict[str, str] = {}
    for which in GONE:
        count = _count(layers, which)
        share = 1 - count / layers
        chosen = chosen_plan("influence", *subject.opened, text, share, scope="all", measured=kept)
        plans[_name("skip", which)] = str(chosen.plan)
        plans[_name("exit", which)] = str(plan_keeping(range(layers - count), layers))
    return plans


def _name(kind: str, which: int) -> str:
    return f"{kind}, {'one layer' if which == 1 else f'one in {which}'} out"


def _speed(subject: Subject, draft: str, values: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Acceptance and paired speed of each prompt, answered alone."""
    how = {"new_tokens": subject.amounts["new_tokens"], "rounds": ROUNDS}
    each = (
        measured_speed(*subject.opened, [item], values["plans"][draft], TOKENS, **how)
        for item in sums(subject.amounts["questions"])
    )
    return [{figure: one[figure] for figure in FIGURES} for one in each]


def _arms(subject: Subject) -> list[Arm]:
    drafts = [_name(kind, which) for which in GONE for kind in ("skip", "exit")]
    return [
        Arm("plans", partial(_plans, subject)),
        *(Arm(draft, partial(_speed, subject, draft), needs=("plans",)) for draft in drafts),
    ]


def _each(evidence: Evidence, draft: str, key: str) -> np.ndarray:
    return np.array([prompt[key] for prompt in evidence.values[draft]], dtype=float)


def _speed_of(draft: str, evidence: Evidence) -> Estimate:
    ratios = _each(evidence, draft, "ratio")
    return resampled(lambda units: float(np.median(ratios[units])), len(ratios))


def _more_accepted(which: int, evidence: Evidence) -> Estimate:
    skip, leave = (_each(evidence, _name(kind, which), "acceptance") for kind in ("skip", "exit"))
    return resampled(lambda units: float((skip - leave)[units].mean()), len(skip))


def _same(evidence: Evidence) -> Estimate:
    same = np.array([_each(evidence, d, "identical") for d in evidence.values if d != "plans"])
    return resampled(lambda units: float(same[:, units].mean()), same.shape[1])


def _tables(evidence: Evidence) -> list[Table]:
    rows = []
    for draft, plan in evidence.values["plans"].items():
        speed = _speed_of(draft, evidence)
        rows.append(
            [
                draft,
                plan,
                f"{_each(evidence, draft, 'acceptance').mean():.2f}",
                f"{_each(evidence, draft, 'tokens_per_round').mean():.2f}",
                f"{speed.value:.2f} [{speed.low:.2f}, {speed.high:.2f}]",
            ]
        )
    heading = ["draft", "plan", "accepted", "tokens a round", "speed"]
    return [Table(f"Drafts of {TOKENS} tokens; speed in that of plain decoding", heading, rows)]


ONE, SOME = GONE

STUDY = Study(
    name="drafts",
    hypothesis=(
        "A model of thin layers cannot draft for itself: what leaving layers out saves, its wrong "
        "guesses and the checking cost again."
    ),
    design=(
        "Greedy answers to short prompts, one at a time, with drafts of two tokens made by the "
        "model with some layers left out, checked by the whole model. Speed: seconds of plain "
        "decoding over those with drafts, rounds of both in turn; the median over prompts."
    ),
    controls="Plain decoding of the same prompts in turn; the answers must be the same tokens.",
    amounts={
        "tiny": {"questions": 3, "new_tokens": 8, "windows": 2, "window": 32, "chosen_by": 2},
        "real": {"questions": 10, "new_tokens": 16, "windows": 4, "window": 128, "chosen_by": 4},
    },
    arms=_arms,
    claims=(
        Claim(
            "Drafts of the same model change no token of an answer",
            "trol's law of drafts",
            "share of the answers that are the same",
            "above",
            0.999,
            _same,
        ),
        Claim(
            "A draft that leaves out one layer makes decoding faster",
            "Draft & Verify, arXiv 2309.08168 (of larger models)",
            "times as fast as plain decoding",
            "above",
            1.0,
            partial(_speed_of, _name("skip", ONE)),
        ),
        Claim(
            "A draft that leaves out an eighth of the layers makes decoding faster",
            "Draft & Verify, arXiv 2309.08168 (of larger models)",
            "times as fast as plain decoding",
            "above",
            1.0,
            partial(_speed_of, _name("skip", SOME)),
        ),
        Claim(
            "More words of a skipping draft are accepted than of an exiting one that costs as much",
            "Glavas et al., arXiv 2410.20022, as drafts",
            "share of the words accepted, skip less exit, an eighth of the layers out",
            "above",
            0.0,
            partial(_more_accepted, SOME),
        ),
    ),
    tables=_tables,
)
