"""Questions of several look-ups, who learns them, and weights that no token decides."""

from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
import torch

from trol.data.hops import ANSWER, LETTERS, hop_pairs, kinds
from trol.data.own_files import SPLITS
from trol.data.pairs import pairs_of
from trol.depth import attach, attached, detach, trace
from trol.evaluation import evaluate
from trol.evaluation.answers import answers
from trol.studies import learning
from trol.studies.gate_controls import ConstantWeights, LearnedWeights, RandomWeights
from trol.studies.hop_learners import (
    PLAIN,
    TINY,
    TROL,
    Learner,
    answered,
    asked,
    opened,
    questions,
    share_right,
    trained,
)
from trol.studies.subject import Subject
from trol.training import resolve
from trol.training.run_folder import RECIPE

AMOUNTS = {**TINY, "steps": 2, "batch": 4, "questions": 12, "width": 16}

TWICE = {"policy": "plan", "plan": "all:2"}


def table_of(question: str) -> dict[str, str]:
    return dict(word for word in question.partition(" :")[0].split())


@pytest.mark.parametrize("most", [2, 4])
def test_answers_follow_the_table_step_by_step(most: int) -> None:
    pairs = hop_pairs("test", most=most, limit=200)
    for pair in pairs:
        leads = table_of(pair.question)
        assert sorted(leads) == sorted(leads.values()) == list(LETTERS)
        steps, _, start = pair.question.partition(" : ")[2].partition(" steps from ")
        letters = [start, *pair.answer.split()]
        assert "".join(letters[::2]) in 2 * LETTERS  # one after the other, the first after the last
        ends = letters[::2]
        for _ in range(int(steps)):
            ends = [leads[end] for end in ends]
        assert letters[1::2] == ends
        assert pair.type == kinds(int(steps))[-1]
    assert {pair.type for pair in pairs} == set(kinds(most))


def test_no_table_is_in_two_splits() -> None:
    seen = {
        split: {tuple(sorted(table_of(p.question).items())) for p in hop_pairs(split, limit=2000)}
        for split in SPLITS
    }
    for one, another in (("train", "test"), ("train", "validation"), ("validation", "test")):
        assert not seen[one] & seen[another]
    assert hop_pairs("test", limit=9) == pairs_of("hops", "test", limit=9)


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    return Subject("", AMOUNTS, 1, tmp_path_factory.mktemp("hops") / "study")


def test_what_is_asked_is_what_evaluate_measures(subject: Subject) -> None:
    """Of the same texts: whole answers there, here the letters that look-ups lead to."""
    learner = Learner("TroL")
    found = asked(subject, learner, 0)
    assert sum(len(found["right"][kind]) for kind in kinds(2)) == 12
    model, processor = opened(subject, learner, 0)
    scores = evaluate(model, processor, tasks=["hops"], questions=12, seed=0)
    items = questions(2, 12)
    texts = answers(model, processor, items, new_tokens=ANSWER + 1)
    exact = [text.split() == item.answer.split() for text, item in zip(texts, items, strict=True)]
    assert scores["tasks"]["hops"]["accuracy"] == sum(exact) / 12
    for kind in kinds(2):
        pairs = [(t, i) for t, i in zip(texts, items, strict=True) if i.type == kind]
        shares = [share_right(text.split(), item.answer.split()) for text, item in pairs]
        assert found["right"][kind] == pytest.approx(shares, abs=1e-3)
    assert found["visits"] > answered(subject, model, processor, "plain")["visits"] == 1


def test_what_learns_in_another_way_is_another_model(subject: Subject) -> None:
    first = trained(subject, Learner("TroL"), 0)
    assert trained(subject, Learner("TroL"), 0) == first
    assert trained(subject, Learner("TroL", {**TROL, "passes": 3}), 0) != first
    assert trained(subject, Learner("TroL", length=2.0), 0) != first


def test_easy_questions_come_first_where_the_amounts_say_so(tmp_path: Path) -> None:
    amounts = {**AMOUNTS, "most": 4, "easy_steps": 3}
    learnt = trained(Subject("", amounts, 1, tmp_path / "study"), Learner("long", length=2.0), 0)
    stages = resolve(learnt / RECIPE).stages
    assert [(one.data, one.steps) for one in stages.values()] == [("hops", 6), ("hops4", 4)]


def test_what_has_learnt_is_found_again_where_the_folder_lies_now(
    subject: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = trained(subject, Learner("TroL"), 0)
    copytree(first.parent, tmp_path / first.parent.name)
    monkeypatch.setattr(learning, "run", lambda *a, **k: pytest.fail("trained again"))
    moved = Subject("", AMOUNTS, 1, tmp_path / "study")
    assert trained(moved, Learner("TroL"), 0).name == first.name


@pytest.mark.parametrize(
    ("learner", "layers", "width"),
    [
        (Learner("deep", PLAIN, layers=2), 2, 16),
        (Learner("wide", PLAIN, width=1.5), 1, 24),
        (Learner("experts", PLAIN, experts=4), 1, 16),
    ],
)
def test_twins_have_the_form_that_they_say(
    learner: Learner, layers: int, width: int, subject: Subject
) -> None:
    config = opened(subject, learner, 0)[0].config
    assert (config.num_hidden_layers, config.hidden_size) == (layers, width)
    assert getattr(config, "num_local_experts", 0) == learner.experts
    assert learner.is_twin


@pytest.mark.parametrize("policy", [PLAIN, TROL])
def test_a_named_model_learns_in_place_of_a_new_one(
    policy: dict[str, Any], subject: Subject, tmp_path: Path
) -> None:
    """Under each learner's policy, whatever the one that it came with."""
    host = trained(subject, Learner("before", policy), 0)
    named = Subject(str(host), AMOUNTS, 1, tmp_path / "study")
    model, _ = opened(named, Learner("all twice", TWICE, train=("decoder",)), 0)
    assert model.config.hidden_size == 16
    assert attached(model)[1].depth_policy.name == "plan"


@pytest.mark.parametrize(
    ("policy", "spread"),
    [
        (RandomWeights(scope="all"), True),
        (LearnedWeights(scope="all"), False),
        (ConstantWeights(0.5, scope="all"), False),
    ],
)
def test_weights_that_no_token_decides(policy: Any, spread: bool, subject: Subject) -> None:
    model, processor = opened(subject, Learner("plain", PLAIN), 0)
    detach(model)
    attach(model, policy)
    ids = processor([questions(2, 12)[0].question], return_tensors="pt")
    with trace(model) as seen, torch.inference_mode():
        model(**ids)
    weights = seen.weights[:, 2][:, seen.real]
    assert ((weights >= 0) & (weights <= 1)).all()
    assert (weights.std() > 0.1) == spread
    if not spread:
        assert (weights == 0.5).all()


def test_only_letters_that_look_ups_lead_to_count() -> None:
    wanted = ["d", "b", "c", "c", "a"]
    assert share_right(["d", "x", "c", "y", "a"], wanted) == 1
    assert share_right(["d", "b"], wanted) == pytest.approx(1 / 3)
    assert share_right([], wanted) == 0
