"""Who decides on a second visit: TroL's gate, chance, a gate that never learnt, or an oracle."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from trol.studies.gate_controls import ConstantWeights, RandomWeights
from trol.studies.hop_learners import (
    DESIGN,
    ONE_VISIT,
    RANDOM,
    REAL,
    TINY,
    TRAVERSED,
    TROL,
    TWO_VISITS,
    WITHOUT,
    Learner,
    answered,
    arms_of,
    gain,
    heading,
    of_seed,
    opened,
    table_rows,
)
from trol.studies.study import Arm, Claim, Evidence, Study, Table
from trol.studies.subject import Subject

FROZEN, ORACLE, BEST_OF_RANDOM = "frozen gate", "oracle gate", "best of four random gates"
WEIGHTS = (0.0, 1 / 3, 2 / 3, 1.0)
"""Gates that the oracle chooses among for each question, for all tokens and layers."""

LEARNERS = (
    TWO_VISITS,
    RANDOM,
    Learner(FROZEN, {**TROL, "initial_gate": None}, train=("decoder",)),
    ONE_VISIT,
)


def _best(each: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The best answer to each question, by its reference; of equals the first."""
    right, visits = {}, []
    for kind in each[0]["right"]:
        shares = np.array([one["right"][kind] for one in each])
        right[kind] = shares.max(0).tolist()
        visits += [each[way]["visits"] for way in shares.argmax(0)]
    return {"right": right, "visits": round(float(np.mean(visits)), 3), "flops": None}


def _oracle(subject: Subject, seed: int, _: object) -> dict[str, Any]:
    model, processor = opened(subject, TWO_VISITS, seed)
    ways = [ConstantWeights(weight, scope="all") for weight in WEIGHTS]
    return _best([answered(subject, model, processor, way) for way in ways])


def _best_of_random(subject: Subject, seed: int, _: object) -> dict[str, Any]:
    model, processor = opened(subject, TWO_VISITS, seed)
    way = RandomWeights(scope="all")
    draws = range(len(WEIGHTS))
    return _best([answered(subject, model, processor, way, draw=draw) for draw in draws])


def _arms(subject: Subject) -> list[Arm]:
    arms = arms_of(subject, LEARNERS)
    for seed in range(subject.seeds):
        arms.append(Arm(of_seed(ORACLE, seed), partial(_oracle, subject, seed)))
        arms.append(Arm(of_seed(BEST_OF_RANDOM, seed), partial(_best_of_random, subject, seed)))
    return arms


def _tables(evidence: Evidence) -> list[Table]:
    names = [*(learner.name for learner in LEARNERS), ORACLE, BEST_OF_RANDOM]
    rows = table_rows(evidence, names)
    return [Table("Share of right letters, by steps asked for", heading(evidence, "gate"), rows)]


def _claim(text: str, source: str, more: str, less: str) -> Claim:
    statistic = f"share of right letters, {more} above {less}"
    return Claim(text, source, statistic, "above", 0.0, partial(gain, more, less))


STUDY = Study(
    name="gatekeepers",
    hypothesis="What a gate learns to say matters, beyond there being a second visit.",
    design=(
        DESIGN + "with TroL's gate, with weights drawn at random, and with a gate that keeps its "
        "first values. The oracle asks TroL's model four times, with constant gates of 0, 1/3, "
        "2/3 and 1, and takes the best answer by its reference."
    ),
    controls=(
        "One visit; for the oracle, the best of four answers of the same model with random "
        "weights, which chooses among outputs and not among depths."
    ),
    amounts={"tiny": TINY, "real": REAL},
    arms=_arms,
    claims=(
        _claim(
            "A learnt gate is better than random weights",
            "TroL, Table 4(d) (arXiv 2406.12246)",
            TRAVERSED,
            RANDOM.name,
        ),
        _claim(
            "A learnt gate is better than one that keeps its first values",
            "trol's open question",
            TRAVERSED,
            FROZEN,
        ),
        _claim(
            "A frozen gate still gains over one visit",
            "trol's open question",
            FROZEN,
            WITHOUT,
        ),
        _claim(
            "An oracle that chooses depths gains over the learnt gate",
            "Glavas et al., arXiv 2410.20022, as gates",
            ORACLE,
            TRAVERSED,
        ),
        _claim(
            "It gains more than choosing among as many random gates",
            "what would show that depth has to vary",
            ORACLE,
            BEST_OF_RANDOM,
        ),
    ),
    tables=_tables,
    pretrained=False,
)
