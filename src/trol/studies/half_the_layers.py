"""Two layers that are visited twice, beside four layers and beside the two that they are."""

from functools import partial

from trol.studies.hop_learners import (
    DEEP,
    ONE_VISIT,
    REAL,
    SECOND_ALONE,
    TINY,
    TRAVERSED,
    TWICE_THE_LAYERS,
    TWO_VISITS,
    WITHOUT,
    arms_of,
    gain,
    heading,
    table_rows,
)
from trol.studies.study import Claim, Study, Table

LEARNERS = (TWO_VISITS, SECOND_ALONE, ONE_VISIT, TWICE_THE_LAYERS)


def _claim(text: str, source: str, more: str, less: str, bound: float = 0.0) -> Claim:
    statistic = f"share of right {DEEP}, {more} above {less}"
    return Claim(text, source, statistic, "above", bound, partial(gain, more, less, deeper=True))


TROL = "TroL, Table 4(b) (arXiv 2406.12246)"
ASKED = "trol's open question"

STUDY = Study(
    name="half-the-layers",
    hypothesis="Half of the layers, each visited twice, answer what all of the layers answer.",
    design=(
        "Decoders of two layers, each visited twice from the first step on, mixed by a gate "
        "(TroL) or the second visit alone. They learn questions of one and two look-ups (data "
        "`hops`) and then of one to four (`hops4`), from nothing: without the easy questions "
        "first, none of this size had learnt three. Share of right letters of questions whose "
        "tables nobody learnt from; the same questions for all arms."
    ),
    controls=(
        "The same two layers with the same gates but one visit, for as many steps; four layers, "
        "which cost a token what two visits of two do and have twice the parameters."
    ),
    amounts={
        "tiny": {**TINY, "most": 4, "layers": 2, "easy_steps": 2000, "steps": 3000},
        "real": {**REAL, "most": 4, "layers": 2, "easy_steps": 4000},
    },
    arms=lambda subject: arms_of(subject, LEARNERS),
    claims=(
        _claim("Two visits of two layers gain over one", TROL, TRAVERSED, WITHOUT),
        _claim("The second visit alone gains over one", ASKED, SECOND_ALONE.name, WITHOUT),
        _claim(
            "Two visits of two layers are no worse than four layers",
            ASKED,
            TRAVERSED,
            TWICE_THE_LAYERS.name,
            -0.05,
        ),
        _claim(
            "The second visit alone is no worse than four layers",
            ASKED,
            SECOND_ALONE.name,
            TWICE_THE_LAYERS.name,
            -0.05,
        ),
    ),
    tables=lambda evidence: [
        Table(
            "Share of right letters, by steps asked for",
            heading(evidence, "learnt"),
            table_rows(evidence, [learner.name for learner in LEARNERS]),
        )
    ],
    pretrained=False,
)
