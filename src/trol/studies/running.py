"""Runs a study: measures what is not there yet, keeps it, and draws the verdicts."""

from collections.abc import Mapping
from copy import copy
from dataclasses import asdict
from typing import Any

from trol.evaluation.answers import StepsDone
from trol.evaluation.shards import WHOLE, Shard
from trol.evaluation.store import Measurements, SharedMeasurements
from trol.studies.study import RULE, Arm, Evidence, Study
from trol.studies.subject import Subject


def run(
    study: Study,
    subject: Subject,
    *,
    shard: Shard = WHOLE,
    progress: StepsDone = lambda done, of: None,
) -> dict[str, Any] | None:
    """Measures the arms that `subject.folder` does not hold, and returns the study's result.

    Each measurement is on the disk before the next begins. Several processes, or machines that
    share the folder, may take a shard each.

    Args:
        study: the study.
        subject: what is measured, and where measurements are kept.
        shard: which part of the arms this process measures: (0, 2) is the first of two.
        progress: takes how many arms of this shard are measured, and of how many.

    Returns:
        The result as `result` makes it; None while other shards have not finished.

    Raises:
        UsageError: the folder keeps measurements of another model, text or amount.
        DataError: its file is damaged.
    """
    header = {"study": study.name, "layers": subject.layers, **subject.header()}
    kept = SharedMeasurements(subject.folder, header, shard)
    arms = {arm.name: arm for arm in study.arms(subject)}
    mine = list(arms.values())[shard[0] :: shard[1]]
    for number, arm in enumerate(mine):
        progress(number, len(mine))
        _measured(arm, arms, kept)
    progress(len(mine), len(mine))
    kept.look_again()
    if any(name not in kept.values for name in arms):
        return None
    values = {name: kept.values[name] for name in arms}
    evidence = Evidence(values, subject.layers, subject.seeds, subject.amounts)
    return {**result(study, evidence), "seeds": _seeds(study, subject)}


def _seeds(study: Study, subject: Subject) -> int | None:
    """How many seeds were drawn; None where another seed measures nothing else."""
    more = copy(subject)
    more.seeds += 1
    same = {arm.name for arm in study.arms(more)} == {arm.name for arm in study.arms(subject)}
    return None if same else subject.seeds


def _measured(arm: Arm, arms: Mapping[str, Arm], kept: Measurements) -> Any:
    """The value of an arm, measured here where nobody has, and so what it needs."""
    if arm.name not in kept.values:
        needed = {name: _measured(arms[name], arms, kept) for name in arm.needs}
        kept.value(arm.name, lambda: arm.measure(needed))
    return kept.values[arm.name]


def result(study: Study, evidence: Evidence) -> dict[str, Any]:
    """What a study says, as JSON: hypothesis to rule, the claims with their verdicts, tables."""
    return {
        "study": study.name,
        "hypothesis": study.hypothesis,
        "design": study.design,
        "controls": study.controls,
        "rule": RULE,
        "layers": evidence.layers,
        "amounts": dict(evidence.amounts),
        "claims": [claim.json(evidence) for claim in study.claims],
        "tables": [asdict(table) for table in study.tables(evidence)],
    }
