"""Checks one model's golden set, case by case."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from trol.family import TrolForConditionalGeneration

from .chunk import check_chunk
from .folder import publish
from .forward import check_forward
from .generation import check_beams_with_images, check_generation
from .pictures import check_pictures
from .prompts import check_prompts
from .report import Report
from .sets import Case, GoldenSet
from .training import check_training


def check_model(folder: Path) -> Report:
    """The report on a golden set; `NotGolden` where the folder is none."""
    golden = GoldenSet(folder)
    report = Report([*golden.expected, *golden.facts])
    with TemporaryDirectory() as published, report.checking("set"), warnings.catch_warnings():
        publish(golden, Path(published))
        # Gates that differ are a warning in a published checkpoint; a set says that it has them.
        warnings.filterwarnings("ignore", "the gates in .* differ")
        model = TrolForConditionalGeneration.from_pretrained(published)
        check_all(model.eval(), golden, report)
    report.finish()
    return report


def check_all(model: Any, golden: GoldenSet, report: Report) -> None:
    """Every case of the set, each for itself: one that breaks down does not hide the others."""
    for case in golden.cases:
        for check in _checks(golden, case):
            with report.checking(f"{case.name}.{check.__name__}"):
                check(model, golden, case, report)
    with report.checking("pictures"):
        check_pictures(model, golden, report)
    with report.checking("prompts"):
        check_prompts(model, golden, report)
    for name in sorted(golden.inputs):
        if name.endswith(".labels"):
            case = name.removesuffix(".labels")
            with report.checking(case):
                check_training(model, golden, case, report)


def _checks(golden: GoldenSet, case: Case) -> list[Callable[..., None]]:
    if f"{case.name}.past_length" in golden.inputs:
        return [check_chunk]
    beams = [check_beams_with_images] if max(case.images) > 1 else []
    return [check_forward, check_generation, *beams]
