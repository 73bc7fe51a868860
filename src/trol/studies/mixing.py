"""How two visits are mixed: what weighs them, and who decides (TroL's Table 4(d))."""

from functools import partial

from trol.studies.gate_controls import LearnedWeights
from trol.studies.hop_learners import (
    ONE_VISIT,
    RANDOM,
    REAL,
    TINY_OF_TWO,
    TRAVERSED,
    TROL,
    TWO_VISITS,
    WITHOUT,
    Learner,
    arms_of,
    constant,
    gain,
    heading,
    table_rows,
)
from trol.studies.study import Claim, Study, Table

SHARED, BY_LAYER, LEARNED = "one gate for all layers", "a number a layer", "one number"
UNIFORM, SECOND = "one half", "second visit alone"

LEARNERS = (
    TWO_VISITS,
    Learner(SHARED, {**TROL, "sharing": "shared"}),
    Learner(BY_LAYER, {"policy": LearnedWeights.name, "scope": "all"}),
    Learner(LEARNED, {"policy": LearnedWeights.name, "sharing": "shared", "scope": "all"}),
    RANDOM,
    constant(UNIFORM, 0.5),
    constant(SECOND, 1.0),
    ONE_VISIT,
)


def _claim(text: str, less: str, bound: float = 0.0) -> Claim:
    statistic = f"share of right letters, above {less}"
    source = "TroL, Table 4(d) (arXiv 2406.12246)"
    return Claim(text, source, statistic, "above", bound, partial(gain, TRAVERSED, less))


STUDY = Study(
    name="mixing",
    hypothesis="A gate that reads the token mixes two visits better than one that does not.",
    design=(
        "Questions of one to four look-ups (data `hops4`), decoders of two layers that learn "
        "them from nothing. The weight of the second visit comes from a gate a layer (TroL), one "
        "gate for all layers, a learned number a layer or for all, a number drawn for each token, "
        "or is one half, one (second visit alone) or none (one visit)."
    ),
    controls="The same steps, seeds and questions; only the weight differs.",
    amounts={"tiny": TINY_OF_TWO, "real": REAL},
    arms=lambda subject: arms_of(subject, LEARNERS),
    claims=(
        _claim("The gate is better than the second visit alone", SECOND),
        _claim("It is better than the first visit alone", WITHOUT),
        _claim("It is better than random weights", RANDOM.name),
        _claim("It is better than a weight of one half", UNIFORM),
        _claim("It is better than one learned number", LEARNED),
        _claim("It is better than a learned number a layer", BY_LAYER),
        Claim(
            "One gate for all layers does as well as one a layer",
            "TroL's released checkpoints, which share one gate",
            f"share of right letters, {SHARED} above a gate a layer",
            "above",
            -0.05,
            partial(gain, SHARED, TRAVERSED),
        ),
    ),
    tables=lambda evidence: [
        Table(
            "Share of right letters, by steps asked for",
            heading(evidence, "weight"),
            table_rows(evidence, [learner.name for learner in LEARNERS]),
        )
    ],
    pretrained=False,
)
