"""How few layers would do, were each answer's level chosen with the reference at hand."""

import random
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from trol.depth import Plan
from trol.evaluation import knapsack
from trol.evaluation.items import Item
from trol.evaluation.oracle import Menu, Questions, answer_all, read_menu
from trol.evaluation.oracle_report import RIGHT
from trol.evaluation.plan_search import ChosenPlan, chosen_plan
from trol.evaluation.store import Measurements, OracleRow, Store, unique
from trol.studies.study import NOTHING, Arm, Claim, Estimate, Evidence, Study, Table, resampled
from trol.studies.subject import Subject

MENUS = {"evenly spaced": "uniform", "by influence": "influence"}
"""What the levels of a menu are -> the method that makes them."""

METRIC = "contains"
NEW_TOKENS = 16
LARGEST = 9
"""Summands are whole numbers from 1 to this one."""

PAPERS = MENUS["evenly spaced"]


def sums(count: int) -> list[Item]:
    """Small sums in words: questions with one right answer, some of which a small model knows."""
    pairs = [(a, b) for a in range(1, LARGEST + 1) for b in range(1, LARGEST + 1)]
    random.Random("sums").shuffle(pairs)
    return [
        Item(None, f"What is {a} + {b}?", str(a + b), "carry" if a + b > LARGEST else "no carry")
        for a, b in pairs[:count]
    ]


def _menu(subject: Subject, method: str) -> Menu:
    kept = Measurements()

    def choose(name: str, share: float) -> ChosenPlan:
        text = subject.windows("validation")
        return chosen_plan(name, *subject.opened, text, share, scope="answer", measured=kept)

    levels = subject.amounts["levels"]
    text = f"{method}:{levels}"
    return read_menu(text, subject.layers, read=Plan, choose=choose)


def _answers(subject: Subject, method: str, _: object) -> dict[str, Any]:
    """Scores of each question at each level, and of answers drawn at full depth."""
    menu = _menu(subject, method)
    items = sums(subject.amounts["questions"])
    drawn = len(menu.levels) - 1
    questions = Questions(items, (METRIC,), NEW_TOKENS, samples=drawn)
    store = Store(subject.folder / f"answers-{method}", questions.header(subject.model, menu))
    answer_all(*subject.opened, questions, menu, store)
    rows = unique(store.rows())
    levels = [level.text for level in menu.levels]
    return {
        "plans": levels,
        "costs": menu.costs,
        "full": menu.full,
        "scores": _table(rows, len(items), [(text, 0) for text in levels]),
        "drawn": _table(rows, len(items), [(levels[menu.full], n + 1) for n in range(drawn)]),
    }


ENOUGH = 10
"""Questions that the full model must have right for their mean to be judged."""


def _table(
    rows: Sequence[OracleRow], count: int, columns: Sequence[tuple[str, int]]
) -> list[list[float]]:
    """Scores by question and (plan, sample)."""
    scores = {row.key: row.scores[METRIC] for row in rows}
    return [[scores[item, plan, n] for plan, n in columns] for item in range(count)]


def _arms(subject: Subject) -> list[Arm]:
    return [Arm(name, partial(_answers, subject, method)) for name, method in MENUS.items()]


class Answers:
    """What an arm gave, and what an oracle makes of it."""

    def __init__(self, evidence: Evidence, name: str) -> None:
        value = evidence.values[name]
        self.costs, self.layers = np.array(value["costs"]), evidence.layers
        self.scores, self.drawn = np.array(value["scores"]), np.array(value["drawn"])
        self.greedy = self.scores[:, value["full"]]
        self.n = len(self.scores)
        good = self.scores >= self.greedy[:, None]
        self.cheapest = np.where(good, self.costs, self.costs.max() + 1).min(axis=1)
        """Layers of each question's cheapest level as good as the full model. Shape: [N]."""

    def equal_share(self, units: np.ndarray) -> float:
        """The smallest mean share of the layers that equals the full model in the mean."""
        solved = knapsack.solve(self.costs, self.scores[units])
        total = float(self.greedy[units].sum())
        return solved.cheapest(total) / len(units) / self.layers

    @property
    def shares_where_right(self) -> np.ndarray:
        """The cheapest level as good, for each question that the full model has right."""
        return self.cheapest[self.greedy >= RIGHT] / self.layers

    def gain(self, units: np.ndarray) -> float:
        """Best of all levels, less the best of as many outputs of the full model."""
        outputs = np.column_stack([self.greedy, self.drawn])[units].max(axis=1).mean()
        return float(self.scores[units].max(axis=1).mean() - outputs)


def _over(statistic: str, menu: str, evidence: Evidence) -> Estimate:
    answers = Answers(evidence, menu)
    return resampled(getattr(answers, statistic), answers.n)


def _where_right(menu: str, evidence: Evidence) -> Estimate:
    """Over the questions that the full model has right, if there are enough to say something."""
    shares = Answers(evidence, menu).shares_where_right
    if len(shares) < ENOUGH:
        return NOTHING
    return resampled(lambda units: float(shares[units].mean()), len(shares))


def _tables(evidence: Evidence) -> list[Table]:
    rows, levels = [], []
    for name in MENUS:
        answers, value = Answers(evidence, name), evidence.values[name]
        all_of_them = np.arange(answers.n)
        right = answers.shares_where_right
        outputs = np.column_stack([answers.greedy, answers.drawn]).max(axis=1).mean()
        rows.append(
            [
                name,
                f"{len(right)} of {answers.n}",
                f"{100 * answers.equal_share(all_of_them):.1f} %",
                f"{100 * answers.cheapest.mean() / answers.layers:.1f} %",
                f"{100 * right.mean():.1f} %" if len(right) else "",
                f"{answers.scores.max(axis=1).mean():.3f}",
                f"{outputs:.3f}",
            ]
        )
        means = answers.scores.mean(axis=0)
        levels += [
            [name, plan, str(cost), f"{mean:.3f}"]
            for plan, cost, mean in zip(value["plans"], value["costs"], means, strict=True)
        ]
    heading = [
        "levels",
        "full model right",
        "equal in the mean",
        "cheapest as good, each",
        "each that is right",
        "best level",
        "best of as many at full depth",
    ]
    return [
        Table("Layers that the oracle takes, and what choosing gains", heading, rows),
        Table("Share of right answers by level", ["levels", "plan", "layers", METRIC], levels),
    ]


EVEN, CHOSEN = MENUS

STUDY = Study(
    name="oracle",
    hypothesis=(
        "The few layers with which an oracle equals the full model come from questions that the "
        "full model does not answer; where it is right, nearly all layers are needed."
    ),
    design=(
        "Small sums in words are answered at eight levels, evenly spaced layers as in the paper "
        "or layers chosen by influence; prompts visit all layers. The oracle takes the levels that "
        "cost least and score as the full model does (a multiple-choice knapsack). An answer is "
        "right if it contains the sum."
    ),
    controls=(
        "As many answers drawn at full depth (temperature .7), of which the best is taken with the "
        "reference at hand as well; the split by what the full model gets right."
    ),
    amounts={
        "tiny": {"questions": 12, "levels": 4, "windows": 2, "window": 32, "chosen_by": 2},
        "real": {"questions": 64, "levels": 8, "windows": 4, "window": 128, "chosen_by": 4},
    },
    arms=_arms,
    claims=(
        Claim(
            "An oracle equals the full model with a quarter of the layers (23.3 % of 24)",
            "Glavas et al., arXiv 2410.20022",
            "share of the layers at which it equals the full model, levels evenly spaced",
            "below",
            0.35,
            partial(_over, "equal_share", EVEN),
        ),
        Claim(
            "It does so with few layers where the full model is right, too",
            "what the claim above would mean",
            "share of the layers, each question that the full model has right, evenly spaced",
            "below",
            0.5,
            partial(_where_right, EVEN),
        ),
        Claim(
            "The same with levels that were chosen for the model",
            "what the claim above would mean",
            "share of the layers, each question that the full model has right, by influence",
            "below",
            0.6,
            partial(_where_right, CHOSEN),
        ),
        Claim(
            "Choosing among depths gains more than choosing among as many outputs at full depth",
            "what would show that depth has to vary",
            "share of right answers, best level less best output, levels by influence",
            "above",
            0.0,
            partial(_over, "gain", CHOSEN),
        ),
    ),
    tables=_tables,
)
