"""Small models that see boards: how the arms of a study are trained, asked and compared.

All arms of a seed begin with one decoder.
"""

import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import ProcessorMixin

from trol.depth import depth
from trol.errors import HostError, UntrainedWarning
from trol.evaluation.answers import answers, scores
from trol.evaluation.items import Item, board_items
from trol.evaluation.tasks import TASKS
from trol.family import TrolProcessor
from trol.family.loading import load_model
from trol.policies.mixer import ATTACHED_GATE
from trol.studies.learning import host_of, learnt
from trol.studies.study import Estimate, Evidence, of_seeds, resampled
from trol.studies.subject import Subject
from trol.training import Recipe, Stage, resolve

BOARDS_PER_STEP = 12
"""Boards that the stages before step 1 learn from, for each of their steps, as in the demo."""

TINY = {
    "hidden_size": 64,
    "layers": 2,
    "vision_steps": 400,
    "reason_steps": 1000,
    "step1_steps": 60,
    "boards": 6000,
    "questions": 1200,
}
"""The demo's model and stages; step 2 sees each of its boards once."""

REAL = {
    "hidden_size": 256,
    "layers": 6,
    "vision_steps": 1000,
    "reason_steps": 6000,
    "step1_steps": 300,
    "boards": 48_000,
    "questions": 1800,
}

DESIGN = (
    "A vision tower and a decoder learn cells and questions about boards in words first, without "
    "second visits (stages vision and reason of the demo); all arms of a seed begin there. "
)

QUESTIONS = "questions about test boards, whose scans were never learnt from, one by one"

STEP1 = ("projector", "mixers")
"""What learns in the first step, as published."""


def recipe_of(subject: Subject, seed: int) -> Recipe:
    """The demo's recipe with the study's amounts."""
    amounts = subject.amounts
    sizes = {
        "preset.hidden_size": amounts["hidden_size"],
        "preset.layers": amounts["layers"],
        "stages.vision.steps": amounts["vision_steps"],
        "stages.vision.boards": BOARDS_PER_STEP * amounts["vision_steps"],
        "stages.reason.steps": amounts["reason_steps"],
        "stages.reason.boards": BOARDS_PER_STEP * amounts["reason_steps"],
        "stages.step1.steps": amounts["step1_steps"],
        "stages.step2.boards": amounts["boards"],
        "seed": seed,
    }
    if _sees(subject):
        sizes["policy.initial_gate"] = ATTACHED_GATE
    return resolve("demo", [f"{key}={value}" for key, value in sizes.items()])


def start_of(subject: Subject, seed: int) -> Path:
    """The folder of the model that all arms of a seed begin with.

    It is new: the stages before step 1. A subject that sees takes its place.

    Raises:
        HostError: the subject sees, but boards cannot be shown to it as step 1 shows them.
    """
    if not _sees(subject):
        recipe = recipe_of(subject, seed)
        before = {name: stage for name, stage in recipe.stages.items() if not stage.traverse}
        return learnt(subject, "decoder", replace(recipe, stages=before))
    if not isinstance(subject.processor, TrolProcessor):
        raise HostError(
            f"{subject.name} sees by {type(subject.processor).__name__}, but boards are learnt by "
            "TroL models; join its tower and decoder by `trol train` with preset.vision and "
            "preset.text, or leave --model out."
        )

    return host_of(subject)


def _sees(subject: Subject) -> bool:
    """Whether a model is named; the studies of boards make their own otherwise."""
    if subject.name and not isinstance(subject.processor, ProcessorMixin):
        raise HostError(
            f"{subject.name} reads text alone, and boards are pictures; name a TroL model with "
            "--model, or leave it out, and the study trains small ones."
        )
    return bool(subject.name)


def step1(
    subject: Subject, seed: int, train: Sequence[str] = STEP1, *, traverse: bool = True
) -> Path:
    """The folder of the model after step 1; without traversal the mixers stay as they were made."""
    parts = tuple(part for part in train if traverse or part != "mixers")
    stage = replace(recipe_of(subject, seed).stages["step1"], train=parts, traverse=traverse)
    return _step(subject, seed, "step1", stage, start_of(subject, seed))


def step2(subject: Subject, seed: int, start: Path, *, traverse: bool = True, **how: Any) -> Path:
    """The folder of the model after step 2: one epoch, unless `how` changes the stage."""
    stage = recipe_of(subject, seed).stages["step2"]
    steps = -(-how.get("boards", stage.boards) // stage.batch)
    parts = tuple(part for part in stage.train if traverse or part != "mixers")
    stage = replace(stage, **{"train": parts, "traverse": traverse, "steps": steps, **how})
    return _step(subject, seed, "step2", stage, start)


def both_steps(subject: Subject, seed: int, *, traverse: bool = True, **how: Any) -> Path:
    """The folder of the model after both steps, all of which traverse or none."""
    begun = step1(subject, seed, traverse=traverse)
    return step2(subject, seed, begun, traverse=traverse, **how)


def _step(subject: Subject, seed: int, name: str, stage: Stage, start: Path) -> Path:
    recipe = replace(recipe_of(subject, seed), stages={name: stage})
    return learnt(subject, name, recipe, start)


def questions(subject: Subject) -> list[Item]:
    """The questions that judge, the same for all arms and seeds."""
    return board_items(subject.amounts["questions"], 0)


def swapped(items: Sequence[Item]) -> list[Item]:
    """The questions, each beside the picture of the one before it."""
    return [
        replace(item, picture=other.picture)
        for item, other in zip(items, [items[-1], *items[:-1]], strict=True)
    ]


def right(model_folder: Path, items: Sequence[Item], policy: str | None = None) -> list[float]:
    """1 for each question that is answered rightly, else 0; under the model's own policy or one."""
    model, processor = load_model(model_folder)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    own = nullcontext() if policy is None else depth(model, policy)
    with own, warnings.catch_warnings():
        warnings.simplefilter("ignore", UntrainedWarning)  # such visits are what is studied
        texts = answers(model, processor, items, new_tokens=TASKS["boards"].new_tokens)
    return scores("exact", texts, items)


def combined(evidence: Evidence, statistic: Callable[..., float], *ways: str) -> Estimate:
    """A statistic of the accuracies of ways; all are drawn anew by the same seeds and questions."""
    groups = [evidence.units(*of_seeds(way, evidence)) for way in ways]

    def drawn(units: Any, seeds: Any) -> float:
        return float(statistic(*(group[np.ix_(seeds, units)].mean() for group in groups)))

    return resampled(drawn, groups[0].shape[1], evidence.seeds)


def gained(evidence: Evidence, more: str, less: str) -> Estimate:
    """Accuracy of a way above that of another."""
    return evidence.difference(of_seeds(more, evidence), of_seeds(less, evidence))


def accuracies(evidence: Evidence, way: str) -> list[str]:
    """Cells of a table: the mean over all seeds, and each seed's."""
    each = evidence.units(*of_seeds(way, evidence)).mean(1)
    return [f"{each.mean():.3f}", *(f"{one:.3f}" for one in each)]


def signed(estimate: Estimate) -> str:
    """A cell of a table: a difference with its interval."""
    return f"{estimate.value:+.3f} [{estimate.low:+.3f}, {estimate.high:+.3f}]"


def seed_headings(evidence: Evidence) -> list[str]:
    """Headings of what `accuracies` gives."""
    return ["mean", *(f"seed {seed}" for seed in range(evidence.seeds))]
