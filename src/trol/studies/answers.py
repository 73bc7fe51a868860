"""Whose tokens are traversed: questions, answers or all, learning and asked (Tables 9 and 10)."""

from functools import partial
from itertools import product

from trol.depth import Scope
from trol.policies.mixer import TrolMixer
from trol.studies.hop_learners import (
    DESIGN,
    ONE_VISIT,
    REAL,
    TINY,
    TROL,
    WITHOUT,
    Learner,
    arms_of,
    asked_under,
    gain,
    heading,
    table_rows,
)
from trol.studies.study import Arm, Claim, Estimate, Evidence, Study, Table, of_seed
from trol.studies.subject import Subject

SCOPES: tuple[Scope, ...] = ("question", "answer", "all")


def _name(learnt: str, asked: str) -> str:
    return f"learnt on {learnt}, asked on {asked}"


LEARNERS = {
    scope: Learner(_name(scope, scope), {**TROL, "scope": scope, "training_scope": scope})
    for scope in SCOPES
}
OFF = "nothing"


def _arms(subject: Subject) -> list[Arm]:
    arms = arms_of(subject, [ONE_VISIT, *LEARNERS.values()])
    for learnt, learner in LEARNERS.items():
        others = {_name(learnt, s): TrolMixer(scope=s) for s in SCOPES if s != learnt}
        arms += asked_under(subject, learner, {**others, _name(learnt, OFF): "plain"})
    return arms


def _flops(evidence: Evidence) -> Estimate:
    """The same for all seeds and questions, so without an interval."""
    more, less = (evidence.values[of_seed(_name("all", s), 0)] for s in ("all", "question"))
    ratio = more["flops"] / less["flops"]
    return Estimate(ratio, ratio, ratio)


def _tables(evidence: Evidence) -> list[Table]:
    names = [_name(learnt, asked) for learnt, asked in product(SCOPES, (*SCOPES, OFF))]
    rows = table_rows(evidence, [WITHOUT, *names])
    return [Table("Share of right letters, by steps asked for", heading(evidence, "scope"), rows)]


PUBLISHED = "TroL, Tables 9 and 10 (arXiv 2406.12246)"


def _claim(
    text: str, more: str, less: str, bound: float = 0.0, *, source: str = PUBLISHED
) -> Claim:
    return Claim(
        text,
        source,
        f"share of right letters, {more}, above {less}",
        "above",
        bound,
        partial(gain, more, less),
    )


STUDY = Study(
    name="answers",
    hypothesis="Traversing the question is enough: answers then decode at the plain cost.",
    design=(
        DESIGN + "and traverse question tokens, answer tokens or all; each is asked with every "
        "scope and with traversal off. Of an answer's three letters the first is predicted at the "
        "question's last token, the others at answer tokens."
    ),
    controls="One visit, learnt and asked; the same steps, seeds and questions.",
    amounts={"tiny": TINY, "real": REAL},
    arms=_arms,
    claims=(
        _claim(
            "A model that learnt with all tokens keeps its gain if questions alone are traversed",
            _name("all", "question"),
            WITHOUT,
        ),
        _claim(
            "Traversing answers as well gains more",
            _name("all", "all"),
            _name("all", "question"),
        ),
        Claim(
            "Traversing answers as well takes more than twice the FLOPs",
            "TroL, Tables 9 and 10: 4.9 to 5.7 times the time",
            f"FLOPs of a question, {_name('all', 'all')}, by those of {_name('all', 'question')}",
            "above",
            2.0,
            _flops,
        ),
        _claim(
            "With traversal off it still is better than one that never traversed",
            _name("all", OFF),
            WITHOUT,
        ),
        _claim(
            "Learning with questions alone does as well as learning with all tokens",
            _name("question", "question"),
            _name("all", "question"),
            -0.02,
            source="trol's open question",
        ),
        _claim(
            "Answers alone gain, too",
            _name("answer", "answer"),
            WITHOUT,
            source="trol's open question",
        ),
    ),
    tables=_tables,
    pretrained=False,
)
