"""What arms learn, that studies share it, and that half a training is never taken for whole."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import ProcessorMixin

from trol.data.boards import ASKERS
from trol.errors import HostError
from trol.studies import boards, learning, study_of
from trol.studies.boards import both_steps, recipe_of, start_of, step1, step2
from trol.studies.learning import MODELS, learnt
from trol.studies.study import Evidence, of_seed
from trol.studies.subject import Subject

AMOUNTS = {
    "hidden_size": 16,
    "layers": 2,
    "vision_steps": 1,
    "reason_steps": 1,
    "step1_steps": 1,
    "boards": 48,
    "questions": 9,
}


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    place = tmp_path_factory.mktemp("boards")
    return Subject("", AMOUNTS, 1, place / "study")


def changed(before: Path, after: Path) -> set[str]:
    """Parts whose weights differ between two saved models."""
    one, other = (load_file(place / "model.safetensors") for place in (before, after))
    names = [n for n in other if n not in one or not torch.equal(one[n], other[n])]
    kinds = {".depth.": "mixers", "projector": "projector", "vision": "vision"}
    return {next((k for key, k in kinds.items() if key in name), "decoder") for name in names}


ALL = {"projector", "mixers", "decoder"}
LEARNT: dict[str, tuple[Callable[[Subject], tuple[Path, Path]], set[str]]] = {
    "step 1": (lambda s: (start_of(s, 0), step1(s, 0)), {"projector", "mixers"}),
    "step 1, mixers": (lambda s: (start_of(s, 0), step1(s, 0, ("mixers",))), {"mixers"}),
    "step 1, projector": (lambda s: (start_of(s, 0), step1(s, 0, ("projector",))), {"projector"}),
    "step 1, plain": (lambda s: (start_of(s, 0), step1(s, 0, traverse=False)), {"projector"}),
    "step 2": (lambda s: (step1(s, 0), both_steps(s, 0)), ALL),
    "one step": (lambda s: (start_of(s, 0), step2(s, 0, start_of(s, 0), steps=3)), ALL),
    "both, plain": (
        lambda s: (step1(s, 0, traverse=False), both_steps(s, 0, traverse=False)),
        ALL - {"mixers"},
    ),
}


@pytest.mark.parametrize("name", LEARNT)
def test_each_step_changes_what_it_says(name: str, subject: Subject) -> None:
    runs, parts = LEARNT[name]
    assert changed(*runs(subject)) == parts


def test_a_run_is_made_once_and_other_amounts_make_another(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    places = [both_steps(subject, 0), both_steps(subject, 0, boards=24)]
    assert len(set(places)) == 2
    other = Subject(subject.name, {**AMOUNTS, "boards": 24}, 1, subject.folder)
    beside = Subject(subject.name, AMOUNTS, 1, subject.folder.with_name("another-study"))
    monkeypatch.setattr(learning, "run", lambda *a, **k: pytest.fail("trained again"))
    assert both_steps(beside, 0) == places[0]
    assert both_steps(other, 0) == places[1]
    with pytest.raises(pytest.fail.Exception, match="trained again"):
        both_steps(subject, 0, boards=30)


def test_a_training_that_was_stopped_leaves_nothing_to_go_on_with(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(recipe: Any, out: Path, **_: Any) -> None:
        out.mkdir()
        (out / "config.json").write_text("{}")
        raise KeyboardInterrupt

    recipe = recipe_of(subject, 5)
    monkeypatch.setattr(learning, "run", stopped)
    with pytest.raises(KeyboardInterrupt):
        learnt(subject, "stopped", recipe)
    place = subject.folder.parent / MODELS
    assert not [*place.glob("*stopped*"), *place.glob(".*")]


def test_of_two_that_train_the_same_the_first_stays(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = subject.folder.parent / MODELS

    def late(recipe: Any, out: Path, **_: Any) -> None:
        out.mkdir()
        (out / "mine").touch()
        first = place / out.name
        first.mkdir()
        (first / "theirs").touch()

    monkeypatch.setattr(learning, "run", late)
    kept = learnt(subject, "late", recipe_of(subject, 6))
    assert [file.name for file in kept.iterdir()] == ["theirs"]
    assert not list(place.glob(".*"))


def test_a_model_that_sees_takes_the_place_of_the_new_one(tmp_path: Path) -> None:
    sees = Subject("trol-tiny", AMOUNTS, 1, tmp_path / "study")
    begun = start_of(sees, 0)
    assert begun == start_of(sees, 1)
    assert changed(begun, step1(sees, 0)) == {"projector", "mixers"}  # it had none
    items = boards.questions(sees)
    assert np.mean(boards.right(begun, items, "plain")) > 0.5
    assert "initial_gate: 0.01" in recipe_of(sees, 0).yaml()


def test_a_host_that_is_no_trol_model_is_refused(tmp_path: Path) -> None:
    class Other(ProcessorMixin):
        """A processor of another family."""

        def __init__(self) -> None:
            """Has no parts."""

    subject = Subject("a-host", AMOUNTS, 1, tmp_path / "study")
    subject.__dict__["opened"] = (None, Other())
    with pytest.raises(HostError, match="leave --model out"):
        start_of(subject, 0)


def test_swapped_pictures_are_another_boards(subject: Subject) -> None:
    items = boards.questions(subject)
    assert [item.type for item in items] == list(ASKERS)
    other = boards.swapped(items)
    assert [(i.question, i.answer) for i in items] == [(i.question, i.answer) for i in other]
    for item, swap in zip(items, other, strict=True):
        pictures = {one.picture.tobytes() for one in (item, swap) if one.picture is not None}
        assert len(pictures) == 2


def test_a_statistic_of_ways_draws_seeds_and_questions_together() -> None:
    generator = np.random.default_rng(0)
    values = {
        of_seed(way, seed): list(generator.integers(0, 2, 40).astype(float))
        for way in ("a", "b")
        for seed in range(3)
    }
    evidence = Evidence(values, 2, 3, {})
    ours = boards.combined(evidence, lambda a, b: a - b, "a", "b")
    gained = boards.gained(evidence, "a", "b")
    assert ours.value == pytest.approx(gained.value)
    assert (ours.low, ours.high) == pytest.approx((gained.low, gained.high))
    same = boards.combined(evidence, lambda a, b: a - b, "a", "a")
    assert (same.low, same.high) == (0, 0)


SHARES = {"10 %": 0.40, "30 %": 0.46, "50 %": 0.508, "100 %": 0.513}


def test_the_papers_own_figures_reproduce_the_papers_claims() -> None:
    """Accuracies as in TroL's Table 4(e), each gained by traversal: the claims say so."""
    study, count = study_of("data"), 2000
    values: dict[str, list[float]] = {}

    def answered(way: str, accuracy: float) -> None:
        for seed in range(5):
            values[of_seed(way, seed)] = [float(i < accuracy * count) for i in range(count)]

    answered("before", 0.1)
    for share, accuracy in SHARES.items():
        answered(f"{share} of the boards, with traversal", accuracy)
        answered(f"{share} of the boards, without", accuracy - 0.05)
    for traversal in ("with traversal", "without"):
        answered(f"10 % of the boards, in all steps, {traversal}", 0.41)
    evidence = Evidence(values, 2, 5, {})
    verdicts = [claim.json(evidence)["verdict"] for claim in study.claims]
    assert verdicts == [*["reproduced"] * 5, "refuted"]
    assert len(study.tables(evidence)[0].rows) == 11
