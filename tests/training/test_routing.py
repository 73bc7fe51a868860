"""A router is trained on what an oracle saw, and its report is the oracle's own arithmetic."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import trol
from training import standins
from trol.depth import attached, is_attached, trace
from trol.errors import DataError, UsageError
from trol.evaluation.store import OracleRow
from trol.policies.router import Router
from trol.training.routing import (
    RouterTrainingArgs,
    question_states,
    router_report,
    text_prompts,
    train_router,
)

EASY, HARD = "is it red or blue?", "which digit is it?"
MENU = ["0", "0-1", "all"]
ARGS = RouterTrainingArgs(epochs=12, learning_rate=1e-2)


def rows(count: int = 40) -> list[OracleRow]:
    """Easy questions are answered well by one layer, hard ones by three."""
    answers = []
    for item in range(count):
        easy = item % 3 != 0
        question = (EASY if easy else HARD) + " what comes next?" * (item % 4)
        for plan, cost, score in (("0", 1, 0.9), ("0-1", 2, 0.9), ("0-2", 3, 1.0)):
            good = score if easy or cost == 3 else 0.2
            scores = {"rougeL": 0.9 if easy else good, "loss": 1 - good}
            answers.append(
                OracleRow(item, question, "red", "red", "t", plan, cost, 0, 2, scores=scores)
            )
    return answers


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("host")
    standins.llm(place, num_hidden_layers=3)
    return place


def host(folder: Path):
    return (
        AutoModelForCausalLM.from_pretrained(folder).eval(),
        AutoTokenizer.from_pretrained(folder),
    )


def test_it_learns_which_questions_a_cheap_plan_answers(folder: Path, tmp_path: Path) -> None:
    model, tokenizer = host(folder)
    before = {name: p.clone() for name, p in model.state_dict().items()}
    training = train_router(
        model, tokenizer, rows(), metric="rougeL", menu=MENU, hidden=16, args=ARGS
    )
    assert len(training.held_out) == 8
    assert training.curve[-1]["loss"] < training.curve[0]["loss"] / 2
    report = training.report
    assert report["accuracy"] == 1
    assert report["menu"] == ["0", "0-1", "all"]
    dials = {point["dial"]: point for point in report["dials"]}
    assert dials[1.0]["cost"] == report["full"]["cost"] == 3
    assert dials[0.0]["cost"] == 1
    # At the middle it is the oracle; the same budget dealt at random is worse.
    assert dials[0.5]["cost"] == report["oracle"]["cost"]
    assert (
        dials[0.5]["score"] == pytest.approx(report["oracle"]["score"]) == report["full"]["score"]
    )
    assert dials[0.5]["random"]["score"] < dials[0.5]["score"] - 0.05
    assert dials[0.5]["random"]["cost"] == pytest.approx(dials[0.5]["cost"])
    assert sum(dials[0.5]["shares"]) == pytest.approx(1)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    trol.save(model, tmp_path)
    again, _ = host(folder)
    trol.load(again, tmp_path)
    assert attached(again)[1].depth_policy == training.router
    held = [row for row in rows() if row.item in training.held_out]
    assert router_report(again, tokenizer, held, metric="rougeL") == report
    _decides_as_reported(again, tokenizer)


def _decides_as_reported(model, tokenizer) -> None:
    """What is decoded follows what the states of the prompt were trained to say."""
    for question, visits in ((EASY, [1, 0, 0]), (HARD, [1, 1, 1])):
        inputs = text_prompts(tokenizer)([replace(rows()[0], question=question)])
        with trace(model) as seen:
            model.generate(**inputs, max_new_tokens=3, do_sample=False)
        prompt = inputs["input_ids"].shape[1]
        assert (seen.visits[:, :, :prompt] == 1).all()
        assert seen.visits[:, 0, -1].tolist() == visits


def test_the_states_are_those_that_a_running_router_sees(folder: Path) -> None:
    """Padded questions give the states that they have alone, and the later layers do not run."""
    model, tokenizer = host(folder)
    trol.attach(model, Router(MENU, after=1))
    questions = [replace(rows()[0], question=text) for text in (EASY, HARD + " what comes next?")]
    padded = question_states(model, questions, text_prompts(tokenizer))
    for row, states in zip(questions, padded, strict=True):
        inputs = text_prompts(tokenizer)([row])
        with torch.no_grad():
            wanted = model(**inputs, output_hidden_states=True).hidden_states[1][0]
        torch.testing.assert_close(states, wanted)


def test_a_tolerance_lets_cheaper_levels_suffice(folder: Path) -> None:
    """The loss counts the other way round, and all plans of the rows are the menu by default."""
    model, tokenizer = host(folder)
    settings = {"metric": "loss", "hidden": 8, "dial": 0.7}
    strict = train_router(model, tokenizer, rows(9), args=RouterTrainingArgs(epochs=1), **settings)
    assert strict.report["suffices_by_level"] == [0, 0, 1]
    assert strict.report["oracle"]["cost"] == 3
    assert strict.router.dial == 0.7
    assert [str(plan) for plan in strict.router.menu] == ["0", "0-1", "0-2"]
    trol.detach(model)
    lenient = RouterTrainingArgs(epochs=1, tolerance=0.15, validation=0.5)
    loose = train_router(model, tokenizer, rows(9), args=lenient, **settings)
    assert 0 < loose.report["suffices_by_level"][0] < 1
    assert loose.report["oracle"]["cost"] < 3


def test_the_same_seed_learns_the_same(folder: Path) -> None:
    outcomes = []
    for seed in (1, 1, 2):
        model, tokenizer = host(folder)
        args = RouterTrainingArgs(epochs=2, seed=seed)
        training = train_router(model, tokenizer, rows(12), metric="rougeL", args=args)
        outcomes.append((training.curve, training.held_out))
    assert outcomes[0] == outcomes[1] != outcomes[2]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"metric": "rouge"}, UsageError, "Did you mean 'rougeL'"),
        ({"rows": []}, UsageError, "no rows"),
        ({"rows": rows(1)}, UsageError, "1 questions are too few"),
        ({"rows": rows()[:-1]}, DataError, "question 39 was not answered at level '0-2'"),
        ({"menu": ["0", "0 2", "all"]}, DataError, "not answered at level '0 2'"),
        ({"menu": ["0", "0-1"]}, UsageError, "which comes last"),
        ({"after": 2}, UsageError, "plan '0' of the menu does not visit each of the layers 0-1"),
        ({"after": 3}, UsageError, "this stack has 3 layers"),
        ({"args": RouterTrainingArgs(epochs=0)}, UsageError, "epochs is 0"),
        ({"args": RouterTrainingArgs(validation=1.0)}, UsageError, "validation is 1.0"),
        ({"args": RouterTrainingArgs(learning_rate=-1.0)}, UsageError, "learning_rate is -1.0"),
    ],
)
def test_what_cannot_be_trained_is_told_why(folder: Path, change, error, message: str) -> None:
    model, tokenizer = host(folder)
    settings = {"rows": rows(), "metric": "rougeL"} | change
    with pytest.raises(error, match=message):
        train_router(model, tokenizer, settings.pop("rows"), **settings)
    assert not is_attached(model)


def test_only_a_router_has_a_report(folder: Path) -> None:
    model, tokenizer = host(folder)
    trol.attach(model, "all")
    with pytest.raises(UsageError, match="plan is attached, not a router"):
        router_report(model, tokenizer, rows(), metric="rougeL")
    with pytest.raises(UsageError, match="attached to this model already"):
        train_router(model, tokenizer, rows(), metric="rougeL")
