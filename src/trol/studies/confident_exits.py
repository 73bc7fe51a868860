"""Exits by confidence: what a record of the full model promises, and what running them gives."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np

from trol.evaluation.exit_calibration import EXIT_THRESHOLDS, with_threshold
from trol.evaluation.hidden_states import ExitOutcome, record_exits, run_exits
from trol.policies.exits import EarlyExit
from trol.studies.study import Arm, Claim, Estimate, Evidence, Study, Table, resampled
from trol.studies.subject import Subject, rounded

RECORDED, CALIBRATED = "recorded", "calibrated"
QUALITIES = (0.99, 0.95)
"""Wanted shares of tokens that agree with the full model, in the record of the other text."""

KINDS = ("project", "hole")
MEASURE = "margin"


def _exits(subject: Subject, **settings: Any) -> EarlyExit:
    # A window's tokens are all answer but the first, which no token precedes.
    first = subject.layers // 2
    return EarlyExit(MEASURE, first=first, scope="answer", **settings)


def _thresholds(subject: Subject, _: object) -> dict[str, float | None]:
    """Quality -> the most lenient threshold that keeps it in the record of the choosing text."""
    record = record_exits(*subject.opened, subject.windows("validation"), _exits(subject))
    return {
        str(quality): next(
            (t for t in reversed(EXIT_THRESHOLDS) if record.outcome(t).quality >= quality), None
        )
        for quality in QUALITIES
    }


def _recorded(subject: Subject, values: Mapping[str, Any]) -> dict[str, Any]:
    """What these thresholds keep and save in the record of the judging text."""
    record = record_exits(*subject.opened, subject.windows(), _exits(subject))
    return {
        quality: _outcome(record.outcome(threshold or 1.0))
        for quality, threshold in values[CALIBRATED].items()
    }


def _ran(subject: Subject, quality: str, kind: str, values: Mapping[str, Any]) -> dict[str, Any]:
    threshold = values[CALIBRATED][quality]
    policy = with_threshold(_exits(subject, skipped_kv=kind), threshold or 1.0)
    outcome = run_exits(*subject.opened, subject.windows(), policy)
    return {**_outcome(outcome), "losses": subject.losses(policy)}


def _outcome(outcome: ExitOutcome) -> dict[str, list[float]]:
    """Agreement and executed layers of each window."""
    return {
        "agreement": rounded(outcome.qualities.tolist()),
        "executed": rounded(outcome.shares.tolist()),
    }


def _arm_of(quality: object, kind: str) -> str:
    return f"run at {quality}, {kind}"


def _arms(subject: Subject) -> list[Arm]:
    arms = [
        Arm("full", lambda _: subject.losses("plain")),
        Arm(CALIBRATED, partial(_thresholds, subject)),
        Arm(RECORDED, partial(_recorded, subject), needs=(CALIBRATED,)),
    ]
    for quality in map(str, QUALITIES):
        for kind in KINDS:
            ran = partial(_ran, subject, quality, kind)
            arms.append(Arm(_arm_of(quality, kind), ran, needs=(CALIBRATED,)))
    return arms


def _each(evidence: Evidence, name: str, part: str, quality: object = None) -> np.ndarray:
    """A figure of each window; of the record, at a quality."""
    value = evidence.values[name]
    return np.array((value if quality is None else value[str(quality)])[part])


def _mean(values: np.ndarray) -> Estimate:
    return resampled(lambda units: float(values[units].mean()), len(values))


def _kept(evidence: Evidence) -> Estimate:
    return _mean(_each(evidence, _arm_of(QUALITIES[0], "project"), "agreement"))


def _optimism(evidence: Evidence) -> Estimate:
    recorded = _each(evidence, RECORDED, "agreement", QUALITIES[0])
    return _mean(recorded - _each(evidence, _arm_of(QUALITIES[0], "project"), "agreement"))


def _holes(evidence: Evidence) -> Estimate:
    hole, project = (
        _each(evidence, _arm_of(QUALITIES[0], kind), "agreement") for kind in ("hole", "project")
    )
    return _mean(hole - project)


def _saved(evidence: Evidence) -> Estimate:
    return _mean(1 - _each(evidence, _arm_of(QUALITIES[0], "hole"), "executed"))


def _tables(evidence: Evidence) -> list[Table]:
    rows = []
    full = evidence.mean("full")
    for quality in map(str, QUALITIES):
        threshold = evidence.values[CALIBRATED][quality]
        known = "none keeps it" if threshold is None else f"{threshold}"
        recorded = [_each(evidence, RECORDED, part, quality) for part in ("agreement", "executed")]
        means = [f"{recorded[0].mean():.3f}", f"{1 - recorded[1].mean():.3f}", ""]
        rows.append([quality, known, "record", *means])
        for kind in KINDS:
            name = _arm_of(quality, kind)
            agreed, executed = (_each(evidence, name, part) for part in ("agreement", "executed"))
            above = _each(evidence, name, "losses").mean() - full
            means = [f"{agreed.mean():.3f}", f"{1 - executed.mean():.3f}", f"{above:+.3f}"]
            rows.append([quality, known, f"run, {kind}", *means])
    heading = ["wanted", "threshold", "how", "agreement", "layers saved", "nats above full"]
    return [Table(f"Exits by {MEASURE} in the upper half of the layers", heading, rows)]


STUDY = Study(
    name="confident-exits",
    hypothesis=(
        "A threshold that keeps 99 % of the words in a record of the full model keeps fewer when "
        "tokens really leave, because later tokens then read other keys and values."
    ),
    design=(
        "Tokens leave before a layer of the upper half whose input predicts a word with a margin "
        "above a threshold. The threshold is the most lenient that keeps 99 % (and 95 %) of the "
        "full model's words in the record of the choosing text; on the judging text it is read "
        "from the record and really run, with keys and values projected and with holes."
    ),
    controls="The record of the same windows, in which no token leaves; the full model's loss.",
    amounts={
        "tiny": {"windows": 4, "window": 32, "chosen_by": 2},
        "real": {"windows": 8, "window": 128, "chosen_by": 8},
    },
    arms=_arms,
    claims=(
        Claim(
            "A threshold calibrated at 99 % in a record keeps 98 % of the words when it is run",
            "how CALM's thresholds (arXiv 2207.07061) are found without running them",
            "share of the words that agree, keys and values projected",
            "above",
            0.98,
            _kept,
        ),
        Claim(
            "The record promises more than running gives",
            "first runs of trol",
            "share of the words that agree, in the record less in the run",
            "above",
            0.0,
            _optimism,
        ),
        Claim(
            "Tokens that leave had better leave holes than projected keys and values",
            "first runs of trol",
            "share of the words that agree, with holes less with projected ones",
            "above",
            0.0,
            _holes,
        ),
        Claim(
            "Confident exits save a tenth of the layers at 99 %",
            "what would make them worth their looks",
            "share of the layers saved in the run",
            "above",
            0.1,
            _saved,
        ),
    ),
    tables=_tables,
)
