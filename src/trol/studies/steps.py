"""TroL's two steps of training against one, and who learns in the first."""

from functools import partial
from pathlib import Path
from typing import Any

from trol.evaluation.gates import TRACED, gate_spread
from trol.family.loading import load_model
from trol.studies import boards
from trol.studies.boards import accuracies, gained, signed
from trol.studies.study import Arm, Claim, Evidence, Study, Table, of_seed, of_seeds
from trol.studies.subject import Subject

BEFORE = "before"
FIRST = {
    "two steps, as published": boards.STEP1,
    "projector first": ("projector",),
    "mixers first": ("mixers",),
}
"""Way -> what learns in its first step."""

PUBLISHED, ONE = next(iter(FIRST)), "one step"
WAYS = (PUBLISHED, ONE, *list(FIRST)[1:])


def _model(subject: Subject, way: str, seed: int) -> Path:
    if way != ONE:
        return boards.step2(subject, seed, boards.step1(subject, seed, FIRST[way]))
    recipe = boards.recipe_of(subject, seed)
    one, two = recipe.stages["step1"], recipe.stages["step2"]
    steps = one.steps + -(-two.boards // two.batch)
    return boards.step2(subject, seed, boards.start_of(subject, seed), steps=steps)


def _before(subject: Subject, seed: int, _: object) -> list[float]:
    start = boards.start_of(subject, seed)
    return boards.right(start, boards.questions(subject), "plain")


def _right(subject: Subject, way: str, seed: int, _: object) -> list[float]:
    return boards.right(_model(subject, way, seed), boards.questions(subject))


def _gates(subject: Subject, way: str, seed: int, _: object) -> list[float]:
    items = boards.questions(subject)[:TRACED]
    return gate_spread(*load_model(_model(subject, way, seed)), items)["mean"]


def _arms(subject: Subject) -> list[Arm]:
    arms: list[Arm] = []
    for seed in range(subject.seeds):
        start = of_seed(BEFORE, seed)
        arms.append(Arm(start, partial(_before, subject, seed)))
        for way in WAYS:
            name = of_seed(way, seed)
            arms.append(Arm(name, partial(_right, subject, way, seed), (start,)))
            gates = partial(_gates, subject, way, seed)
            arms.append(Arm(f"gates after {name}", gates, (name,)))
    return arms


def _range(*means: float) -> float:
    return max(means) - min(means)


def _tables(evidence: Evidence) -> list[Table]:
    rows = [[BEFORE, *accuracies(evidence, BEFORE), ""]]
    rows += [
        [way, *accuracies(evidence, way), signed(gained(evidence, way, PUBLISHED))] for way in WAYS
    ]
    heading = ["first step", *boards.seed_headings(evidence), "above two steps as published"]
    gates = [[way, *(_means(evidence, name) for name in of_seeds(way, evidence))] for way in WAYS]
    return [
        Table("Questions answered rightly", heading, rows),
        Table("Mean gate of each layer", ["first step", *heading[2:-1]], gates),
    ]


def _means(evidence: Evidence, name: str) -> str:
    means: list[Any] = evidence.values[f"gates after {name}"]
    return ", ".join(f"{mean:.2f}" for mean in means)


STUDY = Study(
    name="steps",
    hypothesis="Two steps of training, projector and mixers first, are better than one.",
    design=(
        boards.DESIGN + "Its first step trains projector and mixers (as published), the projector "
        "alone, or the mixers alone; the second trains these and the decoder. One step trains all "
        f"from the beginning, for as many steps as both have. Judged by {boards.QUESTIONS}."
    ),
    controls=(
        "The same decoder, boards, number of optimiser steps and questions for all arms of a seed; "
        "what the decoder answers before both steps."
    ),
    amounts={"tiny": boards.TINY, "real": boards.REAL},
    arms=_arms,
    claims=(
        Claim(
            "Two steps, as published, are better than one",
            "TroL, arXiv 2406.12246, section 3, which trains so and has no ablation of it",
            "share of right answers above that of one step",
            "above",
            0.0,
            lambda e: gained(e, PUBLISHED, ONE),
        ),
        Claim(
            "Mixers have to learn beside the projector in the first step",
            "TroL, arXiv 2406.12246, section 3, which trains so and has no ablation of it",
            "share of right answers as published above that of the projector alone first",
            "above",
            0.0,
            lambda e: gained(e, PUBLISHED, "projector first"),
        ),
        Claim(
            "Mixers that learn first, alone, learn the wrong thing",
            "what a first step without a picture to read would mean",
            "share of right answers above that of the projector alone first",
            "below",
            0.0,
            lambda e: gained(e, "mixers first", "projector first"),
        ),
        Claim(
            "Who learns first matters little: the four orders are within 3 points",
            "trol's lab book of 2026-11-21, three seeds",
            "share of right answers, best order above worst",
            "below",
            0.03,
            lambda e: boards.combined(e, _range, *WAYS),
        ),
        Claim(
            "Both steps teach a decoder that could not see to answer from pictures",
            "what any of these comparisons needs",
            "share of right answers as published above that before",
            "above",
            0.2,
            lambda e: gained(e, PUBLISHED, BEFORE),
        ),
    ),
    tables=_tables,
    pretrained=False,
)
