"""Evaluation: items from the test split, right scores, honest errors."""

import pytest
import torch

from trol.data.boards import ASKERS, make_board, questions
from trol.depth import attached, depth, trace
from trol.errors import UsageError
from trol.evaluation import check_tasks, evaluate, tasks
from trol.evaluation.gates import RandomSecondVisits, gate_spread, sparse_curve
from trol.family import TrolForConditionalGeneration, tiny, tiny_processor


@pytest.fixture(scope="module")
def untrained() -> tuple:
    torch.manual_seed(0)
    asked = [q for seed in range(40) for q in questions(make_board("train", seed), 9)]
    processor = tiny_processor([text for q in asked for text in (q.text, q.answer)])
    config = tiny(len(processor.tokenizer), hidden_size=32, layers=2)
    return TrolForConditionalGeneration(config).eval(), processor


def test_items_are_the_same_on_every_call_and_differ_by_seed() -> None:
    once, again, other = (tasks.board_items(18, seed) for seed in (0, 0, 1))
    assert [i.question for i in once] == [i.question for i in again]
    assert [i.question for i in once] != [i.question for i in other]
    assert {i.type for i in once} == set(ASKERS)


def test_a_model_that_says_the_answers_is_right_and_one_that_does_not_is_wrong(
    untrained: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    items = tasks.board_items(18, 0)

    def accuracy() -> float:
        task = tasks.TASKS["boards"]
        return tasks.measure_task(None, None, task, items, name="boards")["accuracy"]

    texts = [f" {i.answer.upper()}. " for i in items]
    monkeypatch.setattr(tasks, "answers", lambda *_, **__: texts)
    assert accuracy() == 1
    monkeypatch.setattr(tasks, "answers", lambda *_, **__: ["" for _ in items])
    assert accuracy() == 0


def test_an_evaluation_says_what_it_measured(untrained: tuple) -> None:
    result = evaluate(*untrained, ["boards"], questions=36)
    task = result["tasks"]["boards"]
    assert task["n"] == 36
    assert set(task["by_type"]) == set(task["chance_by_type"]) == set(ASKERS)
    assert set(result) == {"tasks"}  # what answers cost stands with each task
    assert task["depth_columns"]["layer_visits_per_token"] > 2


def test_an_unknown_task_is_named() -> None:
    with pytest.raises(UsageError, match="Did you mean 'boards'"):
        check_tasks(["bords"])
    with pytest.raises(UsageError, match="no task named"):
        check_tasks([])


def test_gates_and_sparse_curve_cover_all_layers_and_shares(untrained: tuple) -> None:
    model, processor = untrained
    spread = gate_spread(model, processor)
    assert len(spread["mean"]) == 2
    assert all(
        low <= mean <= high
        for low, mean, high in zip(spread["low"], spread["mean"], spread["high"], strict=True)
    )
    points = sparse_curve(model, processor, questions=18)
    shares = [point["share"] for point in points]
    assert shares[0] == 1.0
    assert shares == sorted(shares, reverse=True)


def test_thinning_makes_about_the_wanted_share_of_second_visits(untrained: tuple) -> None:
    model, _ = untrained
    mixer = attached(model)[1].depth_policy
    ids = torch.randint(8, 40, (8, 40))
    with (
        depth(model, RandomSecondVisits(mixer, 0.3, seed=0)),
        trace(model) as seen,
        torch.no_grad(),
    ):
        model(input_ids=ids)
    share = (seen.visits == 2).float().mean().item()
    assert share == pytest.approx(0.3, abs=0.06)
