"""How much of step 2's data traversal needs: shares of the boards, with it and without."""

from functools import partial

from trol.studies import boards
from trol.studies.boards import accuracies, combined, gained, signed
from trol.studies.study import Arm, Claim, Evidence, Study, Table, of_seed
from trol.studies.subject import Subject

BEFORE = "before"
SHARES = (0.1, 0.3, 0.5, 1.0)
ON, OFF = "with traversal", "without"
LONG = 0.1
"""The share that is also learnt from in as many steps as all of the data take."""


def _way(share: float, traversal: str, *, long: bool = False) -> str:
    return f"{100 * share:.0f} % of the boards{', in all steps' if long else ''}, {traversal}"


def _before(subject: Subject, seed: int, _: object) -> list[float]:
    start = boards.start_of(subject, seed)
    return boards.right(start, boards.questions(subject), "plain")


def _right(
    subject: Subject, share: float, traversal: str, long: bool, seed: int, _: object
) -> list[float]:
    stage = boards.recipe_of(subject, seed).stages["step2"]
    how = {"boards": max(stage.batch, round(share * stage.boards))}
    if long:
        how["steps"] = -(-stage.boards // stage.batch)
    on = traversal == ON
    model = boards.both_steps(subject, seed, traverse=on, **how)
    return boards.right(model, boards.questions(subject), None if on else "plain")


def _arms(subject: Subject) -> list[Arm]:
    arms: list[Arm] = []
    for seed in range(subject.seeds):
        start = of_seed(BEFORE, seed)
        arms.append(Arm(start, partial(_before, subject, seed)))
        for share, long in (*((share, False) for share in SHARES), (LONG, True)):
            for traversal in (ON, OFF):
                measure = partial(_right, subject, share, traversal, long, seed)
                name = of_seed(_way(share, traversal, long=long), seed)
                arms.append(Arm(name, measure, (start,)))
    return arms


def _tables(evidence: Evidence) -> list[Table]:
    rows = [[BEFORE, *accuracies(evidence, BEFORE), ""]]
    for share, long in (*((share, False) for share in SHARES), (LONG, True)):
        on, off = (_way(share, traversal, long=long) for traversal in (ON, OFF))
        rows.append([on, *accuracies(evidence, on), signed(gained(evidence, on, off))])
        rows.append([off, *accuracies(evidence, off), ""])
    heading = ["learnt from", *boards.seed_headings(evidence), "traversal's gain"]
    return [Table("Questions answered rightly", heading, rows)]


def _made_up(short: float, long: float, whole: float) -> float:
    return (long - short) / (whole - short) if whole > short else float("nan")


def _gain(share: float) -> Claim:
    return Claim(
        f"Traversal gains with {100 * share:.0f} % of the data",
        "TroL's Table 4(b) (arXiv 2406.12246), at a share of its data",
        "share of right answers with traversal above that without",
        "above",
        0.0,
        lambda e: gained(e, _way(share, ON), _way(share, OFF)),
    )


STUDY = Study(
    name="data",
    hypothesis=(
        "Traversal gains whatever the share of the data; with traversal half of the data give "
        "nearly all that the whole gives."
    ),
    design=(
        boards.DESIGN + "After step 1, step 2 learns from a share of its boards, each seen once: "
        "the paper trains one epoch of whatever share, so a tenth of the data is a tenth of the "
        "optimiser steps. A tenth is also learnt from in as many steps as the whole takes, ten "
        f"epochs. Judged by {boards.QUESTIONS}."
    ),
    controls=(
        "A twin of each arm without second visits in both steps; the same start, boards (smaller "
        "shares are parts of larger ones) and questions for all arms of a seed."
    ),
    amounts={"tiny": boards.TINY, "real": boards.REAL},
    arms=_arms,
    claims=(
        _gain(1.0),
        _gain(0.3),
        _gain(0.1),
        Claim(
            "Half of the data give nearly all that the whole gives",
            "TroL's Table 4(e) (arXiv 2406.12246): 50.8 and 51.3 on MMStar",
            "share of right answers with all of the data above that with half",
            "below",
            0.02,
            lambda e: gained(e, _way(1.0, ON), _way(0.5, ON)),
        ),
        Claim(
            "A tenth of the data is far from enough",
            "TroL's Table 4(e) (arXiv 2406.12246): 39.9 and 50.8 on MMStar",
            "share of right answers with half of the data above that with a tenth",
            "above",
            0.05,
            lambda e: gained(e, _way(0.5, ON), _way(0.1, ON)),
        ),
        Claim(
            "What a tenth lacks is optimiser steps more than boards",
            "what would make Table 4(e) a table of steps",
            "share of the gap to the whole that all steps close with a tenth of the boards",
            "above",
            0.5,
            lambda e: combined(
                e, _made_up, _way(0.1, ON), _way(LONG, ON, long=True), _way(1.0, ON)
            ),
        ),
    ),
    tables=_tables,
    pretrained=False,
)
