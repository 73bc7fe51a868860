"""How two visits are mixed: what weighs them, and who decides (TroL's Table 4(d))."""

from functools import partial

from trol.studies.gate_controls import LearnedWeights
from trol.studies.hop_learners import (
    DESIGN,
    ONE_VISIT,
    RANDOM,
    REAL,
    SECOND_ALONE,
    TINY,
    TRAVERSED,
    TWO_VISITS,
    WITHOUT,
    Learner,
    arms_of,
    constant,
    gain,
    heading,
    table_rows,
)
from trol.studies.study import Arm, Claim, Study, Table
from trol.studies.subject import Subject

LEARNED, UNIFORM = "one number", "one half"

LEARNERS = (
    TWO_VISITS,
    Learner(LEARNED, {"policy": LearnedWeights.name, "sharing": "shared", "scope": "all"}),
    RANDOM,
    constant(UNIFORM, 0.5),
    SECOND_ALONE,
    ONE_VISIT,
)


def _arms(subject: Subject) -> list[Arm]:
    return arms_of(subject, LEARNERS)


def _claim(text: str, less: str, bound: float = 0.0) -> Claim:
    statistic = f"share of right letters, above {less}"
    source = "TroL, Table 4(d) (arXiv 2406.12246)"
    return Claim(text, source, statistic, "above", bound, partial(gain, TRAVERSED, less))


STUDY = Study(
    name="mixing",
    hypothesis="A gate that reads the token mixes two visits better than one that does not.",
    design=(
        DESIGN + "and traverse from the first step on. The weight of the second visit comes from a "
        "gate (TroL), is a learned number, a number drawn for each token, one half, one (second "
        "visit alone) or none (one visit). What layers may share is in *where*, which has several."
    ),
    controls="The same steps, seeds and questions; only the weight differs.",
    amounts={"tiny": TINY, "real": REAL},
    arms=_arms,
    claims=(
        _claim("The gate is better than the second visit alone", SECOND_ALONE.name),
        _claim("It is better than the first visit alone", WITHOUT),
        _claim("It is better than random weights", RANDOM.name),
        _claim("It is better than a weight of one half", UNIFORM),
        _claim("It is better than one learned number", LEARNED),
    ),
    tables=lambda evidence: [
        Table(
            "Share of right letters, by steps asked for",
            heading(evidence, "weight"),
            table_rows(evidence, [one.name for one in LEARNERS]),
        )
    ],
    pretrained=False,
)
