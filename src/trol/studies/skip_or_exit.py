"""Skip or exit: which layers a pretrained decoder can do without, untuned."""

from functools import partial

from trol.depth import Plan
from trol.policies.planned import static_plan
from trol.studies.study import NOTHING, Arm, Claim, Estimate, Evidence, Study, Table
from trol.studies.subject import Subject, planned

FULL = "full"
WAYS = {"skip": "uniform", "exit": "exit", "middle block": "middle"}
"""What is left out -> the method of static plans."""

PARTS = (8, 4, 2)
"""One layer in so many is left out."""


def plan_of(way: str, part: int, layers: int) -> Plan:
    """The plan that leaves one layer in `part` out."""
    return static_plan(WAYS[way], layers, 1 - gone(part, layers) / layers)


def gone(part: int, layers: int) -> int:
    """How many layers are left out where one in `part` is."""
    return max(1, round(layers / part))


def _losses(subject: Subject, way: str, part: int, _: object) -> list[float]:
    return subject.losses(planned(plan_of(way, part, subject.layers)))


def _name(way: str, part: int) -> str:
    return f"{way}, 1 in {part}"


def _arms(subject: Subject) -> list[Arm]:
    arms = [Arm(FULL, lambda _: subject.losses("plain"))]
    for part in PARTS:
        arms += [Arm(_name(way, part), partial(_losses, subject, way, part)) for way in WAYS]
    return arms


def _above(more: str, less: str, part: int, evidence: Evidence) -> Estimate:
    """Nats of one way above those of another, where one layer in `part` is a layer at least."""
    if evidence.layers < part:
        return NOTHING
    return evidence.difference(_name(more, part), _name(less, part))


def _tables(evidence: Evidence) -> list[Table]:
    full = evidence.mean(FULL)
    rows = [
        [way, *(f"{evidence.mean(_name(way, part)) - full:.3f}" for part in PARTS)] for way in WAYS
    ]
    heading = ["left out", *(f"{gone(part, evidence.layers)} layers" for part in PARTS)]
    return [Table(f"Nats per token above the full model's {full:.3f}", heading, rows)]


STUDY = Study(
    name="skip-or-exit",
    hypothesis=(
        "At equal cost a pretrained decoder stands evenly spaced skipped layers better than an "
        "early exit, without being tuned for either."
    ),
    design=(
        "An eighth, a quarter and half of the layers are left out by all tokens: evenly spaced "
        "ones (skip), the last ones (exit), a block in the middle. The loss of each window of "
        "text, in nats per token."
    ),
    controls="The full model on the same windows; a block in the middle, which is neither.",
    amounts={"tiny": {"windows": 4, "window": 32}, "real": {"windows": 10, "window": 128}},
    arms=_arms,
    claims=(
        *(
            Claim(
                f"A pretrained decoder stands skips better than exits, 1 layer in {part} left out",
                "Glavas et al., arXiv 2410.20022",
                "nats of exit above evenly spaced skip",
                "above",
                0.0,
                partial(_above, "exit", "skip", part),
            )
            for part in PARTS
        ),
        Claim(
            "A block in the middle is better to leave out than evenly spaced layers, 1 layer in 8",
            "first runs of trol",
            "nats of evenly spaced skip above the block",
            "above",
            0.0,
            partial(_above, "skip", "middle block", PARTS[0]),
        ),
    ),
    tables=_tables,
)
