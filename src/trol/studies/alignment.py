"""What step 1 alone aligns, and what traversal does to a host that never learnt to traverse."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from trol.data.boards import chance_by_type
from trol.evaluation.items import Item
from trol.studies import boards
from trol.studies.boards import accuracies, combined, gained, signed
from trol.studies.study import Arm, Claim, Evidence, Study, Table, of_seed, of_seeds
from trol.studies.subject import Subject

TYPES = "types of the questions"
BEFORE, ALIGNED, PLAIN = "before step 1", "after step 1", "after step 1 without traversal"
BOTH, BOTH_PLAIN = "after both steps", "after both steps without traversal"
SWAPPED, SWITCHED = "{}, another picture", "{}, traversal switched on"

MODELS: dict[str, Callable[[Subject, int], Path]] = {
    BEFORE: boards.start_of,
    ALIGNED: boards.step1,
    PLAIN: partial(boards.step1, traverse=False),
    BOTH: boards.both_steps,
    BOTH_PLAIN: partial(boards.both_steps, traverse=False),
}
UNTRAINED = (BEFORE, BOTH_PLAIN)
"""Hosts whose layers never learnt to traverse."""

WAYS = (*MODELS, *map(SWAPPED.format, MODELS), *map(SWITCHED.format, UNTRAINED))


def _right(subject: Subject, way: str, seed: int, _: object) -> list[float]:
    name = way.split(", ", maxsplit=1)[0]
    traverses = name in (ALIGNED, BOTH) or way == SWITCHED.format(name)
    items = boards.questions(subject)
    if way == SWAPPED.format(name):
        items = boards.swapped(items)
    return boards.right(MODELS[name](subject, seed), items, None if traverses else "plain")


def _types(subject: Subject, _: object) -> list[str]:
    items: list[Item] = boards.questions(subject)
    return [item.type for item in items]


def _arms(subject: Subject) -> list[Arm]:
    arms = [Arm(TYPES, partial(_types, subject))]
    for seed in range(subject.seeds):
        start = of_seed(BEFORE, seed)
        for way in WAYS:
            needs = () if way == BEFORE else (start,)
            arms.append(Arm(of_seed(way, seed), partial(_right, subject, way, seed), needs))
    return arms


def _share(before: float, aligned: float, both: float) -> float:
    return (aligned - before) / (both - before) if both > before else float("nan")


def _tables(evidence: Evidence) -> list[Table]:
    rows = [[way, *accuracies(evidence, way), _beside(evidence, way)] for way in WAYS]
    heading = ["answers", *boards.seed_headings(evidence), "above another picture's"]
    types = np.array(evidence.values[TYPES])
    chance = chance_by_type()
    own = [BEFORE, ALIGNED, SWAPPED.format(ALIGNED), PLAIN, BOTH]
    means = {way: evidence.units(*of_seeds(way, evidence)).mean(0) for way in own}
    by_type = [
        [kind, f"{chance[kind]:.2f}", *(f"{means[way][types == kind].mean():.2f}" for way in own)]
        for kind in dict.fromkeys(evidence.values[TYPES])
    ]
    return [
        Table("Questions answered rightly", heading, rows),
        Table("By type of question, mean of all seeds", ["type", "chance", *own], by_type),
    ]


def _beside(evidence: Evidence, way: str) -> str:
    if way not in MODELS:
        return ""
    return signed(gained(evidence, way, SWAPPED.format(way)))


STUDY = Study(
    name="alignment",
    hypothesis=(
        "Step 1 alone, projector and mixers, makes a frozen decoder answer from pictures, and "
        "traversal helps it; a host that never learnt to traverse is harmed by it."
    ),
    design=(
        boards.DESIGN + "Step 1 trains the projector with mixers and second visits, or alone "
        "without; the decoder is frozen. An answer comes from the picture as far as it is right "
        "more often beside its own picture than beside that of another board. Second visits are "
        "switched on, gates as nn.Linear makes them, in the decoder before step 1 and in one that "
        f"made both steps without. Judged by {boards.QUESTIONS}."
    ),
    controls=(
        "The same questions beside the pictures of other boards; the model before step 1; the "
        "model after both steps; the same start and boards for all arms of a seed."
    ),
    amounts={"tiny": boards.TINY, "real": boards.REAL},
    arms=_arms,
    claims=(
        Claim(
            "After step 1 alone a model answers from its picture",
            "TroL, arXiv 2406.12246, section 3: step 1 aligns vision and language",
            "share of right answers above that beside another board's picture",
            "above",
            0.05,
            lambda e: gained(e, ALIGNED, SWAPPED.format(ALIGNED)),
        ),
        Claim(
            "Before it, no model does",
            "what the claim above needs",
            "share of right answers before step 1 above that beside another board's picture",
            "below",
            0.05,
            lambda e: gained(e, BEFORE, SWAPPED.format(BEFORE)),
        ),
        Claim(
            "Traversal in step 1 makes the alignment better",
            "the first experiment that this project asked for",
            "share of right answers after step 1 above that without traversal",
            "above",
            0.0,
            lambda e: gained(e, ALIGNED, PLAIN),
        ),
        Claim(
            "Step 1 does at least half of what both steps do",
            "what alignment before tuning would mean",
            "share of the gain of both steps that step 1 has made",
            "above",
            0.5,
            lambda e: combined(e, _share, BEFORE, ALIGNED, BOTH),
        ),
        Claim(
            "Traversal harms a host that learnt all else without it",
            "TroL's Table 7 (arXiv 2406.12246), on a model that can lose something",
            "share of right answers with second visits switched on above that without",
            "below",
            0.0,
            lambda e: gained(e, SWITCHED.format(BOTH_PLAIN), BOTH_PLAIN),
        ),
        Claim(
            "Traversal harms a backbone before it was trained to see",
            "TroL's Table 7 (arXiv 2406.12246), whose backbones score at chance",
            "share of right answers with second visits switched on above that without",
            "below",
            0.0,
            lambda e: gained(e, SWITCHED.format(BEFORE), BEFORE),
        ),
    ),
    tables=_tables,
    pretrained=False,
)
