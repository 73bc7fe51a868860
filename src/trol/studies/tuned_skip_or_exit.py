"""Skip or exit: which layers a pretrained decoder can do without, before and after tuning."""

from functools import partial

from trol.depth import Plan, depth
from trol.policies.planned import Planned, static_plan
from trol.studies.study import Arm, Claim, Evidence, Study, Table
from trol.studies.subject import Subject, planned
from trol.studies.tuned import held_out, plan_policy, tuned

FULL, FULL_TUNED = "full", "full, tuned"
WAYS = {"skip": "uniform", "exit": "exit", "middle block": "middle"}
"""What is left out -> the method of static plans."""

PARTS = (8, 4, 2)
"""One layer in so many is left out."""

TUNED_PART = 4


def _plan(subject: Subject, way: str, part: int) -> Plan:
    layers = subject.layers
    count = max(1, round(layers / part))
    return static_plan(WAYS[way], layers, 1 - count / layers)


def _untuned(subject: Subject, way: str, part: int, _: object) -> list[float]:
    return subject.losses(planned(_plan(subject, way, part)))


def _answers(subject: Subject, way: str | None, _: object) -> list[float]:
    """Losses of held-out answers without tuning; questions visit all layers, as in the paper."""
    plan = Plan("all") if way is None else _plan(subject, way, TUNED_PART)
    with depth(subject.model, Planned(plan, scope="answer")):
        return held_out(subject, subject.model, subject.processor)


def _tuned(subject: Subject, way: str | None, seed: int, _: object) -> list[float]:
    policy = {"policy": "plain"} if way is None else plan_policy(_plan(subject, way, TUNED_PART))
    rate = subject.amounts["rate"]
    learns = {"train": ("decoder",), "lora": 8, "learning_rate": rate}
    return tuned(subject, way or "full", policy, seed=seed, **learns)


def _name(way: str, part: int) -> str:
    return f"{way}, 1 in {part}"


def _answered(way: str) -> str:
    return f"{way}, 1 in {TUNED_PART}, answers"


def _after(way: str, evidence: Evidence) -> list[str]:
    return [f"{way}, tuned, seed {seed}" for seed in range(_runs(evidence.seeds, evidence.amounts))]


def _runs(seeds: int, amounts: object) -> int:
    return min(seeds, amounts["most_runs"])  # type: ignore[index]


def _arms(subject: Subject) -> list[Arm]:
    arms = [Arm(FULL, lambda _: subject.losses("plain"))]
    for part in PARTS:
        arms += [Arm(_name(way, part), partial(_untuned, subject, way, part)) for way in WAYS]
    arms.append(Arm("full, answers", partial(_answers, subject, None)))
    arms += [Arm(_answered(way), partial(_answers, subject, way)) for way in ("skip", "exit")]
    for seed in range(_runs(subject.seeds, subject.amounts)):
        for way in (None, "skip", "exit"):
            name = f"{way or 'full'}, tuned, seed {seed}"
            arms.append(Arm(name, partial(_tuned, subject, way, seed)))
    return arms


def _tables(evidence: Evidence) -> list[Table]:
    full = evidence.mean(FULL)
    text = [
        [way, *(f"{evidence.mean(_name(way, part)) - full:.3f}" for part in PARTS)] for way in WAYS
    ]
    counts = [max(1, round(evidence.layers / part)) for part in PARTS]
    answers = [["full", f"{evidence.mean('full, answers'):.3f}", _mean(evidence, "full")]]
    answers += [
        [way, f"{evidence.mean(_answered(way)):.3f}", _mean(evidence, way)]
        for way in ("skip", "exit")
    ]
    return [
        Table(
            f"Text: nats per token above the full model's {full:.3f}",
            ["left out", *(f"{count} layers" for count in counts)],
            text,
        ),
        Table(
            "Answers: nats per token",
            [f"{max(1, round(evidence.layers / TUNED_PART))} layers left out", "untuned", "tuned"],
            answers,
        ),
    ]


def _mean(evidence: Evidence, way: str) -> str:
    return f"{evidence.units(*_after(way, evidence)).mean():.3f}"


STUDY = Study(
    name="skip-or-exit",
    hypothesis=(
        "At equal cost a pretrained decoder stands evenly spaced skipped layers better than an "
        "early exit, before it is tuned for either and after."
    ),
    design=(
        "An eighth, a quarter and half of the layers are left out: evenly spaced ones (skip), the "
        "last ones (exit), a block in the middle. Untuned: all tokens of windows of text. Tuned: "
        "answers to questions about Python's library skip a quarter of the layers, questions none, "
        "as in the paper; LoRA of rank 8 on the decoder, the same short run for each, then answers "
        "that were not learnt from. Nats per token, by window or answer."
    ),
    controls="The full model untuned, and tuned as long; the same texts and seeds for all.",
    amounts={
        "tiny": {
            "windows": 4,
            "window": 32,
            "questions": 6,
            "steps": 2,
            "batch": 2,
            "rate": 1e-3,
            "most_runs": 1,
        },
        "real": {
            "windows": 10,
            "window": 128,
            "questions": 60,
            "steps": 24,
            "batch": 4,
            "rate": 1e-3,
            "most_runs": 1,
        },
    },
    arms=_arms,
    claims=(
        *(
            Claim(
                f"A pretrained decoder stands skips better than exits, 1 layer in {part} left out",
                "Glavas et al., arXiv 2410.20022",
                "nats of exit above evenly spaced skip, untuned, text",
                "above",
                0.0,
                lambda e, part=part: e.difference(_name("exit", part), _name("skip", part)),
            )
            for part in PARTS
        ),
        Claim(
            "So it is for answers alone, 1 layer in 4 left out",
            "Glavas et al., arXiv 2410.20022",
            "nats of exit above evenly spaced skip, untuned, answers",
            "above",
            0.0,
            lambda e: e.difference(_answered("exit"), _answered("skip")),
        ),
        Claim(
            "After a short tuning of each, too",
            "Glavas et al., arXiv 2410.20022",
            "nats of exit above evenly spaced skip, tuned, answers",
            "above",
            0.0,
            lambda e: e.difference(_after("exit", e), _after("skip", e)),
        ),
    ),
    tables=_tables,
)
