"""Runs a study: measures what is not there yet, keeps it, and draws the verdicts."""

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from trol.evaluation.answers import StepsDone
from trol.evaluation.store import Measurements
from trol.files import folder
from trol.studies.study import RULE, Arm, Evidence, Study
from trol.studies.subject import Subject


def run(
    study: Study,
    subject: Subject,
    *,
    shard: tuple[int, int] = (0, 1),
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
    place, (index, of) = folder(subject.folder), shard
    own = Measurements(place / f"measured-{index}-of-{of}.jsonl", header)
    arms = list(study.arms(subject))
    mine = arms[index::of]

    def there() -> dict[str, Any]:
        paths = [path for path in sorted(place.glob("measured-*.jsonl")) if path != own.path]
        kept = (Measurements(path, header).values for path in paths)
        return {name: value for one in (*kept, own.values) for name, value in one.items()}

    known = there()
    for number, arm in enumerate(mine):
        progress(number, len(mine))
        _measured(arm, {arm.name: arm for arm in arms}, known, own)
    progress(len(mine), len(mine))
    known = there()
    if any(arm.name not in known for arm in arms):
        return None
    values = {arm.name: known[arm.name] for arm in arms}
    return result(study, Evidence(values, subject.layers, subject.seeds, subject.amounts))


def _measured(arm: Arm, arms: Mapping[str, Arm], known: dict[str, Any], own: Measurements) -> Any:
    """The value of an arm, measured here where nobody has, and so what it needs."""
    if arm.name not in known:
        needed = {name: _measured(arms[name], arms, known, own) for name in arm.needs}
        measure: Callable[[], Any] = lambda: arm.measure(needed)  # noqa: E731
        known[arm.name] = own.value(arm.name, measure)
    return known[arm.name]


def result(study: Study, evidence: Evidence) -> dict[str, Any]:
    """What a study says, as JSON: hypothesis to rule, the claims with their verdicts, tables."""
    return {
        "study": study.name,
        "hypothesis": study.hypothesis,
        "design": study.design,
        "controls": study.controls,
        "rule": RULE,
        "layers": evidence.layers,
        "seeds": evidence.seeds,
        "amounts": dict(evidence.amounts),
        "claims": [claim.json(evidence) for claim in study.claims],
        "tables": [asdict(table) for table in study.tables(evidence)],
    }
