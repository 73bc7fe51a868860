"""How many visits: 1 to 6, learnt and at test time, with what they cost (TroL's Table 8)."""

from functools import partial

from trol.policies.mixer import TrolMixer
from trol.studies.hop_learners import (
    DESIGN,
    REAL,
    TINY,
    TRAVERSED,
    TROL,
    WITHOUT,
    Learner,
    arms_of,
    asked_under,
    gain,
    heading,
    table_rows,
)
from trol.studies.study import Arm, Claim, Evidence, Study, Table
from trol.studies.subject import Subject

VISITS = (1, 2, 3, 4, 6)
NAMES = {1: WITHOUT, 2: TRAVERSED, 3: "three visits", 4: "four visits", 6: "six visits"}
LEARNERS = {n: Learner(name, {**TROL, "passes": n}) for n, name in NAMES.items()}
LEARNT = (2, 3)
"""Visits with which those learnt that are asked with other numbers of visits."""


def _with(visits: int, asked: int) -> str:
    return f"{NAMES[visits]}, asked with {asked}"


def _arms(subject: Subject) -> list[Arm]:
    arms = arms_of(subject, list(LEARNERS.values()))
    for visits in LEARNT:
        others = {_with(visits, n): TrolMixer(n, scope="all") for n in VISITS if n != visits}
        arms += asked_under(subject, LEARNERS[visits], others)
    return arms


def _tables(evidence: Evidence) -> list[Table]:
    learnt = table_rows(evidence, list(NAMES.values()))
    asked = table_rows(evidence, [_with(m, n) for m in LEARNT for n in VISITS if n != m])
    return [
        Table("Learnt and asked with as many visits", heading(evidence, "visits"), learnt),
        Table("Asked with others", heading(evidence, "visits"), asked),
    ]


STUDY = Study(
    name="passes",
    hypothesis="A second visit gains most; further ones gain little for what they cost.",
    design=(
        DESIGN + "with 1, 2, 3, 4 or 6 visits of each layer, and are asked with as many; those "
        "with two and three also with all the others. Cost: layer visits of a token, FLOPs."
    ),
    controls="The same steps, seeds and questions.",
    amounts={"tiny": TINY, "real": REAL},
    arms=_arms,
    claims=(
        Claim(
            "Two visits are better than one",
            "TroL, Table 4(b) (arXiv 2406.12246)",
            "share of right letters above one visit",
            "above",
            0.0,
            partial(gain, NAMES[2], NAMES[1]),
        ),
        Claim(
            "A third visit gains something",
            "TroL, Table 8 (arXiv 2406.12246)",
            "share of right letters above two visits",
            "above",
            0.0,
            partial(gain, NAMES[3], NAMES[2]),
        ),
        Claim(
            "But less than .05",
            "TroL, Table 8: .2 to .7 points",
            "share of right letters above two visits",
            "below",
            0.05,
            partial(gain, NAMES[3], NAMES[2]),
        ),
        Claim(
            "Six visits are no worse than three",
            "TroL, Table 8, carried on",
            "share of right letters above three visits",
            "above",
            -0.02,
            partial(gain, NAMES[6], NAMES[3]),
        ),
        Claim(
            "A model that learnt with two visits gains from a third at test time",
            "looped models (arXiv 2502.05171)",
            "share of right letters above its own two visits",
            "above",
            0.0,
            partial(gain, _with(2, 3), NAMES[2]),
        ),
        Claim(
            "Asked with one visit it keeps more than one that learnt so has",
            "TroL, Table 9 (arXiv 2406.12246)",
            "share of right letters above learnt with one visit",
            "above",
            0.0,
            partial(gain, _with(2, 1), NAMES[1]),
        ),
    ),
    tables=_tables,
    pretrained=False,
)
