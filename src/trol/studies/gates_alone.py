"""TroL's gates trained alone on a frozen pretrained decoder, beside low-rank updates alone."""

from functools import partial
from typing import Any

from trol.studies.study import Arm, Claim, Evidence, Study, Table
from trol.studies.subject import Subject
from trol.studies.tuned import held_out, tuned

BEFORE = "before"
WAYS = ("gates", "LoRA of rank 1")
MIXER = {"policy": "trol_mixer", "passes": 2, "scope": "all", "initial_gate": 0.01}


def _learns(subject: Subject, way: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Policy and stage of an arm."""
    if way == "gates":
        rate = subject.amounts["gate_rate"]
        return MIXER, {"train": ("mixers",), "mixer_learning_rate": rate}
    return {"policy": "plain"}, {
        "train": ("decoder",),
        "lora": 1,
        "learning_rate": subject.amounts["rate"],
    }


def _trained(subject: Subject, way: str, seed: int, _: object) -> list[float]:
    policy, stage = _learns(subject, way)
    return tuned(subject, way, policy, seed=seed, **stage)


def _before(subject: Subject, _: object) -> list[float]:
    return held_out(subject, subject.model, subject.processor)


def _arms(subject: Subject) -> list[Arm]:
    return [
        Arm(BEFORE, partial(_before, subject)),
        *(
            Arm(f"{way}, seed {seed}", partial(_trained, subject, way, seed))
            for seed in range(subject.seeds)
            for way in WAYS
        ),
    ]


def _of(way: str, evidence: Evidence) -> list[str]:
    return [f"{way}, seed {seed}" for seed in range(evidence.seeds)]


def _tables(evidence: Evidence) -> list[Table]:
    rows = [[BEFORE, f"{evidence.mean(BEFORE):.3f}", ""]]
    for way in WAYS:
        change = evidence.difference(_of(way, evidence), BEFORE)
        interval = f"{change.value:+.3f} [{change.low:+.3f}, {change.high:+.3f}]"
        rows.append([way, f"{evidence.units(*_of(way, evidence)).mean():.3f}", interval])
    return [Table("Nats per token of held-out answers", ["learnt", "loss", "change"], rows)]


STUDY = Study(
    name="gates-alone",
    hypothesis="A frozen pretrained decoder gains from second visits once their gates are trained.",
    design=(
        "One gate for each layer, begun at .01, learns on questions about Python's library while "
        "the decoder is frozen; all tokens are traversed. Nats per token of answers that were not "
        "learnt from."
    ),
    controls=(
        "The model as it was; LoRA of rank 1 on the same frozen decoder without second visits, for "
        "as many steps: more parameters than the gates (18 times on SmolLM2-135M), and about half "
        "of their compute."
    ),
    amounts={
        "tiny": {
            "questions": 6,
            "steps": 2,
            "batch": 2,
            "rate": 1e-3,
            "gate_rate": 3e-4,
        },
        "real": {
            "questions": 60,
            "steps": 24,
            "batch": 4,
            "rate": 1e-3,
            "gate_rate": 3e-4,
        },
    },
    arms=_arms,
    claims=(
        Claim(
            "Gates trained alone lower the loss of a frozen pretrained decoder",
            "TroL, arXiv 2406.12246, as a claim about gates alone",
            "nats above the model as it was",
            "below",
            0.0,
            lambda e: e.difference(_of("gates", e), BEFORE),
        ),
        Claim(
            "They lower it as much as LoRA of rank 1 does in as many steps",
            "what would make second visits worth their time",
            "nats with gates above those with LoRA",
            "below",
            0.0,
            lambda e: e.difference(_of("gates", e), _of("LoRA of rank 1", e)),
        ),
    ),
    tables=_tables,
)
