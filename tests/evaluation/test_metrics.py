"""Metrics against values by hand, losses against the model's own, tasks in text."""

import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from trol.depth import attach, detach, trace
from trol.errors import HostError, UsageError
from trol.evaluation import evaluate
from trol.evaluation.answers import METRICS, answers, losses, scores
from trol.evaluation.items import Item, fitted, messages, prompts
from trol.evaluation.tasks import TASKS, check_metric, task_of, validate
from trol.family.presets import byte_level_tokenizer, text_decoder
from trol.policies.planned import Planned


@pytest.fixture(scope="module")
def reader() -> tuple:
    tokenizer = byte_level_tokenizer(["What does it do? Return the sum of it."], 300)
    torch.manual_seed(0)
    config = text_decoder(tokenizer, hidden_size=32, layers=3, heads=2, positions=160)
    return LlamaForCausalLM(config).eval(), tokenizer


def item(answer: str, question: str = "What does f() do?", kind: str = "function") -> Item:
    return Item(None, question, answer, kind)


@pytest.mark.parametrize(
    ("metric", "given", "wanted", "value"),
    [
        # 3 of 4 words given are among the 5 wanted: P = 3/4, R = 3/5.
        ("rouge1", "the cat sat down", "The cat sat on it.", 2 * 0.75 * 0.6 / 1.35),
        # Bigrams: "the cat", "cat sat" of 3 given and 4 wanted.
        ("rouge2", "the cat sat down", "The cat sat on it.", 2 * (2 / 3) * 0.5 / (2 / 3 + 0.5)),
        # Longest common subsequence of "b a c" and "a b c": two words.
        ("rougeL", "b a c", "a b c", 2 / 3),
        ("rougeL", "", "a b c", 0.0),
        ("rouge1", "running", "runs", 0.0),  # no stemmer
        ("exact", " RED  7.", "red 7", 1.0),
        ("exact", "red", "red 7", 0.0),
        ("contains", "It is the RED  7.", "red 7", 1.0),
        ("contains", "It is Paris, of course", "paris.", 1.0),
        ("contains", "red 77", "red 7", 0.0),  # inside of a longer word
        ("contains", "7 red", "red 7", 0.0),
        ("contains", "anything", ".", 0.0),
    ],
)
def test_a_score_by_hand(metric: str, given: str, wanted: str, value: float) -> None:
    assert scores(metric, [given], [item(wanted)]) == [pytest.approx(value)]


def test_losses_are_the_models_own(reader: tuple) -> None:
    model, tokenizer = reader
    items = [item("Return it."), item("Return the sum of it.", "What?"), item("It.")]
    result = losses(model, tokenizer, items, batch=2)
    for one, loss in zip(items, result, strict=True):
        question = tokenizer(f"<bos>{one.question}<SEP>", return_tensors="pt")["input_ids"]
        answer = tokenizer(f"{one.answer}<eos>", return_tensors="pt")["input_ids"]
        ids = torch.cat([question, answer], 1)
        labels = ids.clone()
        labels[:, : question.shape[1]] = -100
        with torch.no_grad():
            assert loss == pytest.approx(model(ids, labels=labels).loss.item(), abs=1e-5)


def test_roles_hold_in_the_loss_as_in_generate(reader: tuple) -> None:
    """A plan of scope answer is in force for the reference's tokens alone."""
    model, tokenizer = reader
    plain = losses(model, tokenizer, [item("Return it.")])
    attach(model, Planned("0 2", scope="answer"))
    try:
        with trace(model) as seen:
            skipped = losses(model, tokenizer, [item("Return it.")])
        answer = len(tokenizer("Return it.<eos>")["input_ids"])
        assert (seen.visits[1] == 0).sum() == answer
        assert skipped != plain
    finally:
        detach(model)


def test_prompts_are_padded_on_the_left_and_end_where_the_answer_begins(reader: tuple) -> None:
    _, tokenizer = reader
    tokenizer.padding_side = "right"
    batch = prompts(tokenizer, [item("a", "What does it do?"), item("b", "What?")])
    assert batch["attention_mask"][:, -1].all()
    assert batch["attention_mask"][1, 0] == 0
    assert (batch["input_ids"][:, -1] == tokenizer.sep_token_id).all()
    assert tokenizer.decode(batch["input_ids"][0]) == "<bos>What does it do?<SEP>"


def test_answers_in_a_batch_are_those_alone(reader: tuple) -> None:
    model, tokenizer = reader
    items = [item("a", "What does it do?"), item("b", "Sum"), item("c", "What is it of?")]
    batched = answers(model, tokenizer, items, new_tokens=6)
    assert batched == [answers(model, tokenizer, [i], new_tokens=6)[0] for i in items]


def test_a_question_that_is_too_long_for_the_model_is_cut(reader: tuple) -> None:
    model, tokenizer = reader
    long = item("x", "sum " * 200 + "\n\n### Response:")
    short = fitted(model, tokenizer, long, 8)
    assert short.question.endswith("\n\n### Response:")
    assert prompts(tokenizer, [short])["input_ids"].shape[1] + 8 <= 160
    assert answers(model, tokenizer, [long], new_tokens=8)
    with pytest.raises(UsageError, match="leave no room"):
        fitted(model, tokenizer, long, 150)


def test_text_tasks_are_measured_by_their_metrics(reader: tuple) -> None:
    result = evaluate(*reader, ["docstrings"], questions=6, metrics=["rougeL", "loss"])
    task = result["tasks"]["docstrings"]
    assert set(task["metrics"]) == {"rougeL", "loss"}
    assert (task["metric"], task["n"], sum(task["n_by_type"].values())) == ("rougeL", 6, 6)
    weighed = sum(task["by_type"][kind] * n for kind, n in task["n_by_type"].items()) / 6
    assert weighed == pytest.approx(task["metrics"]["rougeL"])
    assert 4 < task["metrics"]["loss"] < 8  # ln 300 = 5.7
    assert task["depth_columns"]["layer_visits_per_token"] >= 1
    assert set(validate(*reader, questions=3, task="docstrings")["metrics"]) == set(METRICS)


def test_a_file_is_a_task(reader: tuple, tmp_path: Path) -> None:
    rows = [{"instruction": f"Sum {n}.", "input": "", "output": f"{n}."} for n in range(20)]
    path = tmp_path / "alpaca.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    task = task_of(f"alpaca:{path}")
    items = task.items(100, 0)
    assert (len(items), task.new_tokens, items[0].picture) == (3, 300, None)
    assert messages(items[0], answered=True)[1]["role"] == "assistant"


def test_what_a_task_has_no_references_for_is_refused(reader: tuple) -> None:
    for metric in ("rougeL", "rouge1"):
        with pytest.raises(UsageError, match="boards has no references for rouge"):
            check_metric("boards", metric)
    with pytest.raises(UsageError, match="Did you mean 'rougeL'"):
        check_metric("docstrings", "rogueL")
    with pytest.raises(UsageError, match="loss is no score of an answer"):
        scores("loss", ["a"], [item("a")])
    with pytest.raises(HostError, match="reads text alone"):
        evaluate(*reader, ["boards"], questions=1)
    for metric in METRICS[:5]:
        assert metric in TASKS["docstrings"].metrics
    assert all(0 < chance < 0.5 for chance in TASKS["docstrings"].chance().values())
