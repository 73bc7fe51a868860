"""Which layers to leave out: plans by measure and by rule, with and without the first token."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from trol.evaluation.plan_search import chosen_plan
from trol.evaluation.store import Measurements
from trol.files import folder
from trol.policies.planned import static_plan
from trol.studies.study import Arm, Claim, Estimate, Evidence, Study, Table, resampled
from trol.studies.subject import Subject, planned

FULL = "full"
MEASURED = ("influence", "greedy")
BLOCK = "middle"
RULES = (BLOCK, "uniform", "exit")
KEPT = ("", ", first token spared")
PARTS = (8, 4)
"""One layer in so many is left out."""
QUARTER = PARTS[-1]
FIRST_KEPT = KEPT[-1]


def gone(layers: int, part: int) -> int:
    """How many layers are left out where one in `part` is."""
    return max(1, round(layers / part))


def keep(layers: int, part: int) -> float:
    """The share of the layers that stays."""
    return 1 - gone(layers, part) / layers


def arm_of(method: str, part: int, kept: str = "", seed: int | None = None) -> str:
    """What the arm of a method is called."""
    drawn = "" if seed is None else f" {seed}"
    return f"{method}{drawn}, 1 in {part}{kept}"


def plans_of(method: str) -> str:
    """What the arm is called in which a method chooses plans."""
    return f"plans by {method}"


def choose(subject: Subject, method: str, _: object = None) -> dict[str, str]:
    """Part -> the plan, chosen on windows of the validation split."""
    file = folder(subject.folder) / f"plans-{method}.jsonl"
    kept = Measurements(file, subject.header())
    text, plans = subject.windows("validation"), {}
    for part in PARTS:
        share = keep(subject.layers, part)
        chosen = chosen_plan(method, *subject.opened, text, share, scope="all", measured=kept)
        plans[str(part)] = str(chosen.plan)
    kept.finish()
    return plans


def under_chosen(
    subject: Subject, method: str, part: int, keep_first: int, values: Mapping[str, Any]
) -> list[float]:
    """Losses under the plan that a method chose."""
    return subject.losses(planned(values[plans_of(method)][str(part)], keep_first=keep_first))


def under_rule(
    subject: Subject, method: str, part: int, keep_first: int, seed: int, _: object
) -> list[float]:
    """Losses under the plan that a rule gives."""
    plan = static_plan(method, subject.layers, keep(subject.layers, part), seed)
    return subject.losses(planned(plan, keep_first=keep_first))


def _arms(subject: Subject) -> list[Arm]:
    arms = [Arm(FULL, lambda _: subject.losses("plain"))]
    arms += [Arm(plans_of(method), partial(choose, subject, method)) for method in MEASURED]
    for kept in KEPT:
        for part in PARTS:
            for method in MEASURED:
                chosen = partial(under_chosen, subject, method, part, int(bool(kept)))
                arms.append(Arm(arm_of(method, part, kept), chosen, needs=(plans_of(method),)))
            for method in RULES if not kept else (BLOCK,):
                ruled = partial(under_rule, subject, method, part, int(bool(kept)), 0)
                arms.append(Arm(arm_of(method, part, kept), ruled))
    for part in PARTS:
        for seed in range(subject.seeds):
            ruled = partial(under_rule, subject, "random", part, 0, seed)
            arms.append(Arm(arm_of("random", part, seed=seed), ruled))
    return arms


def _random(evidence: Evidence, part: int) -> list[str]:
    return [arm_of("random", part, seed=seed) for seed in range(evidence.seeds)]


def _tables(evidence: Evidence) -> Sequence[Table]:
    rows = []
    for method in (*MEASURED, *RULES, "random"):
        row = [method if method != "random" else f"random, mean of {evidence.seeds}"]
        for part in PARTS:
            for kept in KEPT:
                random = _random(evidence, part) if method == "random" and not kept else []
                arms = random or [arm_of(method, part, kept)]
                known = all(arm in evidence.values for arm in arms)
                row.append(f"{evidence.difference(arms, FULL).value:.3f}" if known else "")
        rows.append(row)
    counts = [gone(evidence.layers, part) for part in PARTS]
    heading = ["plan", *(f"{count} layers out{kept}" for count in counts for kept in KEPT)]
    plans = [
        [method, plan] for method in MEASURED for plan in evidence.values[plans_of(method)].values()
    ]
    title = f"Nats per token above the full model's {evidence.mean(FULL):.3f}"
    return [Table(title, heading, rows), Table("Plans that were chosen", ["by", "plan"], plans)]


def _undone(evidence: Evidence) -> Estimate:
    block, kept = arm_of(BLOCK, QUARTER), arm_of(BLOCK, QUARTER, FIRST_KEPT)
    harm, left = evidence.units(block, kept) - evidence.units(FULL)
    return resampled(lambda units: float(1 - left[units].mean() / harm[units].mean()), len(harm))


STUDY = Study(
    name="influence-or-greedy",
    hypothesis=(
        "Which layers are left out matters more than how many: one pass that measures each layer's "
        "influence chooses about as well as greedy search, evenly spaced layers are a bad choice, "
        "and a middle block is a good one once the first token is spared."
    ),
    design=(
        "One layer in eight, and one in four, is left out: by influence and by greedy search, "
        "chosen on windows of other topics with the first token spared, and a block in the middle, "
        "each by all tokens and by all but the first of each window; evenly spaced layers, the "
        "last layers, and random inner layers by all tokens. The loss of each window, in nats per "
        "token."
    ),
    controls="The full model on the same windows; random plans; topics that chose no plan.",
    amounts={
        "tiny": {"windows": 4, "window": 32, "chosen_by": 2},
        "real": {"windows": 8, "window": 128, "chosen_by": 3},
    },
    arms=_arms,
    claims=(
        Claim(
            "Influence, read in one pass, chooses a quarter of the layers as well as greedy search "
            "on as little text",
            "ShortGPT, arXiv 2403.03853; first runs of trol",
            "nats by influence above those by greedy",
            "below",
            0.1,
            lambda e: e.difference(arm_of("influence", QUARTER), arm_of("greedy", QUARTER)),
        ),
        Claim(
            "A plan chosen by influence is better than random inner layers",
            "ShortGPT, arXiv 2403.03853",
            "nats by influence above the mean of random plans, a quarter of the layers out",
            "below",
            0.0,
            lambda e: e.difference(arm_of("influence", QUARTER), _random(e, QUARTER)),
        ),
        Claim(
            "Evenly spaced layers are worse to leave out than random inner ones",
            "first runs of trol, against arXiv 2404.06954",
            "nats evenly spaced above the mean of random plans, a quarter of the layers out",
            "above",
            0.0,
            lambda e: e.difference(arm_of("uniform", QUARTER), _random(e, QUARTER)),
        ),
        Claim(
            "With the first token spared, a middle block is a better choice than greedy's",
            "first runs of trol",
            "nats of the middle block above greedy's, a quarter of the layers out",
            "below",
            0.0,
            lambda e: e.difference(
                arm_of(BLOCK, QUARTER, FIRST_KEPT), arm_of("greedy", QUARTER, FIRST_KEPT)
            ),
        ),
        Claim(
            "Most of a middle block's harm is done at the first token",
            "first runs of trol",
            "share of the harm that sparing it undoes, a quarter of the layers out",
            "above",
            0.5,
            _undone,
        ),
    ),
    tables=_tables,
)
