"""Which layers are traversed: first, middle, last, blocks or all, and what their gates say."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np

from trol.evaluation.gates import gate_spread
from trol.evaluation.hidden_states import influences
from trol.studies.gate_controls import LearnedWeights
from trol.studies.hop_learners import (
    REAL,
    TINY,
    TROL,
    Learner,
    arms_of,
    gain,
    heading,
    of_seed,
    opened,
    questions,
    table_rows,
)
from trol.studies.study import Arm, Claim, Estimate, Evidence, Study, Table, resampled
from trol.studies.subject import Subject

NONE, ALL = "no layer", "all layers"
FIRST, LAST = "first layer", "last layer"
SHALLOW, DEEP = "first two layers", "last two layers"
PLACES = {
    NONE: (0, 0, 0),
    FIRST: (1, 0, 0),
    "middle layer": (0, 1, 0),
    LAST: (0, 0, 1),
    SHALLOW: (1, 1, 0),
    DEEP: (0, 1, 1),
    ALL: (1, 1, 1),
}
"""Name -> which thirds of the layers are traversed."""

SHARED, BY_LAYER = "all layers, one gate", "all layers, a number each"

SHARING = (
    Learner(SHARED, {**TROL, "sharing": "shared"}),
    Learner(BY_LAYER, {"policy": LearnedWeights.name, "scope": "all"}),
)
"""What all layers share, and what tells layers apart and no tokens."""

LOOKED_AT = 64
"""Questions whose gates and states are read."""


def _learners(layers: int) -> dict[str, Learner]:
    """A learner for each place."""
    learners = {}
    for name, thirds in PLACES.items():
        chosen = [bool(thirds[3 * layer // layers]) for layer in range(layers)]
        tau = [0.0 if traversed else None for traversed in chosen]
        policy = {**TROL, "tau": tau} if any(chosen) else {**TROL, "passes": 1}
        learners[name] = Learner(name, policy)
    return learners


def _gates(subject: Subject, seed: int, _: Mapping[str, Any]) -> dict[str, list[float]]:
    """Mean gate, and influence (1 - cosine of input and output), of each layer; all traversed."""
    model, processor = opened(subject, _learners(subject.layers)[ALL], seed)
    items = questions(subject.amounts["most"], subject.amounts["questions"])[:LOOKED_AT]
    changes = influences(model, processor, items, "question")
    return {
        "gates": gate_spread(model, processor, items)["mean"],
        "influences": [change["mean"] for change in changes],
    }


def _gates_of(seed: int) -> str:
    return of_seed("gates", seed)


def _arms(subject: Subject) -> list[Arm]:
    arms = arms_of(subject, [*_learners(subject.layers).values(), *SHARING])
    looks = (Arm(_gates_of(s), partial(_gates, subject, s)) for s in range(subject.seeds))
    return [*arms, *looks]


def _both(evidence: Evidence, what: str) -> np.ndarray:
    """Gates or influences of all seeds. Shape: [seeds, layers]."""
    return np.array([evidence.values[_gates_of(s)][what] for s in range(evidence.seeds)])


def _agreement(evidence: Evidence) -> Estimate:
    """Correlation of gate and influence over layers and seeds."""
    gates, changes = _both(evidence, "gates"), _both(evidence, "influences")

    def statistic(seeds: np.ndarray) -> float:
        rows = gates[seeds].ravel(), changes[seeds].ravel()
        varies = all(np.ptp(row) > 0 for row in rows)
        return float(np.corrcoef(*rows)[0, 1]) if varies else float("nan")

    return resampled(statistic, evidence.seeds)


def _shallower(evidence: Evidence) -> Estimate:
    """Mean gate of the first layer above the last one's."""
    gates = _both(evidence, "gates")
    return resampled(lambda seeds: float((gates[seeds, 0] - gates[seeds, -1]).mean()), len(gates))


def _tables(evidence: Evidence) -> list[Table]:
    places = table_rows(evidence, [*PLACES, *(one.name for one in SHARING)])
    gates, changes = _both(evidence, "gates"), _both(evidence, "influences")
    layers = [
        [str(layer), *(f"{part[:, layer].mean():.3f}" for part in (gates, changes))]
        for layer in range(gates.shape[1])
    ]
    return [
        Table("Share of right letters, by steps asked for", heading(evidence, "traversed"), places),
        Table("All layers traversed", ["layer", "mean gate", "influence"], layers),
    ]


def _gain(text: str, source: str, more: str, less: str, bound: float = 0.0) -> Claim:
    statistic = f"share of right letters, {more} above {less}"
    return Claim(text, source, statistic, "above", bound, partial(gain, more, less))


STUDY = Study(
    name="where",
    hypothesis="Second visits gain where layers change their input most: in shallow layers.",
    design=(
        "Questions of 1 to 4 look-ups (data `hops4`), decoders of three layers that learn them "
        "from nothing and traverse the first, the middle, the last, the first two, the last two "
        "or all; all also with one gate for all layers, and with a learned number for each. After "
        "training, with all traversed: the mean gate of each layer over question tokens beside its "
        "influence, 1 - cosine of its input and output."
    ),
    controls="No layer traversed; the same steps, seeds and questions.",
    amounts={"tiny": {**TINY, "most": 4, "layers": 3}, "real": {**REAL, "most": 4, "layers": 3}},
    arms=_arms,
    claims=(
        _gain("Traversing all layers gains", "TroL, Table 4(b)", ALL, NONE),
        _gain("The first layer gains more than the last", "TroL, figure 6", FIRST, LAST),
        _gain("The first two layers gain more than the last two", "TroL, figure 6", SHALLOW, DEEP),
        _gain("The last two layers are enough", "trol's open question", DEEP, ALL, -0.02),
        _gain("One gate for all layers is enough", "TroL's released weights", SHARED, ALL, -0.02),
        _gain("A gate is better than a number a layer", "TroL, Table 4(d)", ALL, BY_LAYER),
        Claim(
            "Gates are wider in shallow layers",
            "TroL, figure 6 (arXiv 2406.12246)",
            "mean gate of the first layer above the last one's",
            "above",
            0.0,
            _shallower,
        ),
        Claim(
            "A gate is the wider, the more its layer changes its input",
            "trol's open question",
            "correlation of gate and influence, over layers and seeds",
            "above",
            0.0,
            _agreement,
        ),
    ),
    tables=_tables,
    pretrained=False,
)
