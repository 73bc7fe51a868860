"""Is it the second visit that gains: all of TroL without it, and twins that cost more."""

from functools import partial

from trol.studies.hop_learners import (
    DEEP,
    DESIGN,
    EXPERTS,
    ONE_VISIT,
    PLAIN,
    REAL,
    SECOND_ALONE,
    TINY,
    TRAVERSED,
    TROL,
    TWICE_THE_LAYERS,
    TWO_VISITS,
    WITHOUT,
    Learner,
    arms_of,
    gain,
    heading,
    right,
    table_rows,
)
from trol.studies.study import Claim, Evidence, Study, Table, of_seeds

LONGER, WIDER = "one visit, twice the steps", "half as wide again"
EXPERT = "four experts"
LEARNERS = (
    TWO_VISITS,
    ONE_VISIT,
    Learner(LONGER, {**TROL, "passes": 1}, length=2.0),
    Learner(WIDER, PLAIN, width=1.5),
    TWICE_THE_LAYERS,
    Learner(EXPERT, PLAIN, experts=EXPERTS),
    SECOND_ALONE,
)


def _tables(evidence: Evidence) -> list[Table]:
    rows = table_rows(evidence, [learner.name for learner in LEARNERS])
    return [Table("Share of right letters, by steps asked for", heading(evidence, "learnt"), rows)]


def _claim(
    text: str, source: str, less: str, bound: float = 0.0, *, more: str = TRAVERSED
) -> Claim:
    statistic = f"share of right {DEEP}, {more} above {less}"
    return Claim(text, source, statistic, "above", bound, partial(gain, more, less, deeper=True))


ASKED = "trol's open question"
TWINS = {
    "gains at equal compute of training": (ASKED, LONGER),
    "gains against a wider model": (ASKED, WIDER),
    "gains against a mixture of experts": ("TroL, Table 5 (arXiv 2406.12246)", EXPERT),
    "is no worse than a model of twice the layers": (ASKED, TWICE_THE_LAYERS.name, -0.05),
}
"""What is claimed of the second visit -> who asks, the learner it is compared with, the bound."""


STUDY = Study(
    name="isolate",
    hypothesis=(
        "The second visit itself is what gains, where an answer needs more depth than there is."
    ),
    design=(
        DESIGN
        + "and traverse from the first step on: one layer of two visits faces one layer and two "
        "(of size real: two of two visits face two and four). Two visits are mixed by TroL's gate; "
        "or the second one's output counts alone. Share of right letters of questions "
        "whose tables nobody learnt from; the same questions for all arms."
    ),
    controls=(
        "The same model with the same gates but one visit, for as many steps and for twice as "
        "many (equal compute of training); without traversal: half as wide again (2.2 times the "
        "FLOPs of a token), twice the layers (twice the FLOPs and parameters), four experts of "
        "which each token takes three."
    ),
    amounts={"tiny": TINY, "real": REAL},
    arms=lambda subject: arms_of(subject, LEARNERS),
    claims=(
        _claim(
            "The second visit gains at equal parameters and equal steps",
            "TroL, Table 4(b) (arXiv 2406.12246)",
            WITHOUT,
        ),
        *(_claim(f"It {text}", *twin) for text, twin in TWINS.items()),
        _claim(
            "The second visit alone gains at equal parameters and equal steps",
            ASKED,
            WITHOUT,
            more=SECOND_ALONE.name,
        ),
        *(
            _claim(f"The second visit alone {text}", *twin, more=SECOND_ALONE.name)
            for text, twin in TWINS.items()
        ),
        Claim(
            "Where layers suffice, the second visit gains nothing",
            "first runs of trol",
            f"share of right letters, 1 hop, above {WITHOUT}",
            "below",
            0.02,
            lambda e: right(e, "1 hop").difference(of_seeds(TRAVERSED, e), of_seeds(WITHOUT, e)),
        ),
    ),
    tables=_tables,
    pretrained=False,
)
