"""Files of one's own: windows against a plain loop, chats and their references, no template."""

import json
import math
import operator
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import LlamaForCausalLM

from trol.depth import Plan, depth, trace
from trol.errors import DataError, UsageError
from trol.evaluation import check_tasks, evaluate
from trol.evaluation import curve as points
from trol.evaluation.answers import answers, losses
from trol.evaluation.curve import curve
from trol.evaluation.curve_methods import Request
from trol.evaluation.exit_calibration import calibrate_exits
from trol.evaluation.items import WHOLE, fitted, labelled, messages, prompts
from trol.evaluation.oracle import Batch
from trol.evaluation.plan_search import CHOOSING, JUDGING, chosen_plan, plan_loss
from trol.evaluation.shared_layers import PlanLosses
from trol.evaluation.tasks import FORMS, default_task, questions_of, task_of
from trol.family import tiny_processor
from trol.family.presets import byte_level_tokenizer, text_decoder
from trol.policies.exits import EarlyExit
from trol.policies.planned import Planned

POSITIONS = 160
TEXT = "What does it do? Return the sum of it, s\u0101\u1e41 \u2211, and no more.\n" * 9
CHAT = [("system", "Be brief."), ("user", "What?"), ("assistant", "It."), ("user", "Sum of it?")]


def reader_of(*, marks: bool) -> tuple[Any, Any]:
    """A model that was trained on no chats; `marks`: its tokenizer puts <bos> before a text."""
    tokenizer = byte_level_tokenizer([TEXT], 300)
    tokenizer.chat_template = None
    if marks:
        begin = (tokenizer.bos_token, tokenizer.bos_token_id)
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=f"{begin[0]} $A", special_tokens=[begin]
        )
    torch.manual_seed(0)
    config = text_decoder(tokenizer, hidden_size=32, layers=3, heads=2, positions=POSITIONS)
    return LlamaForCausalLM(config).eval(), tokenizer


@pytest.fixture(scope="module", params=[False, True], ids=["bare", "begun"])
def reader(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    return reader_of(marks=request.param)


@pytest.fixture
def text(tmp_path: Path) -> str:
    (tmp_path / "notes.txt").write_text(TEXT, encoding="utf-8")
    return f"text:{tmp_path / 'notes.txt'}"


@pytest.fixture
def chats(tmp_path: Path) -> str:
    said = [*CHAT, ("assistant", "Return it.")]
    rows = [
        {"messages": [{"role": role, "content": words} for role, words in said]},
        {"prompt": "What does it do?", "reference": "Sum."},
    ]
    path = tmp_path / "chat.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return f"chat:{path}"


def by_hand(model: Any, tokenizer: Any, window: int) -> tuple[float, int]:
    """Nats and predicted tokens of all windows, by transformers alone."""
    start = tokenizer("")["input_ids"]
    ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    step, nats, tokens = window - len(start), 0.0, 0
    for at in range(0, len(ids), step):
        row = torch.tensor([[*start, *ids[at : at + step]]])
        predicted = row.shape[1] - 1
        if predicted:
            with torch.no_grad():
                nats += model(row, labels=row).loss.item() * predicted
            tokens += predicted
    return nats, tokens


@pytest.mark.parametrize("window", [2, 7, 64, None])
def test_perplexity_is_that_of_a_plain_loop(
    reader: tuple[Any, Any], text: str, window: int | None
) -> None:
    result = evaluate(*reader, [text], questions=10_000, window=window)["tasks"][text]
    nats, tokens = by_hand(*reader, window or POSITIONS)
    assert result["tokens"] == tokens
    assert result["metrics"]["loss"] == pytest.approx(nats / tokens, rel=1e-5)
    assert result["metrics"]["perplexity"] == pytest.approx(math.exp(nats / tokens), rel=1e-4)


@pytest.mark.parametrize("window", [64, POSITIONS])
def test_all_that_names_a_loss_per_token_takes_the_mean_over_tokens(
    reader: tuple[Any, Any], text: str, window: int
) -> None:
    """The last window is shorter; `eval`, `plan`, `export` and `curve` say one number of all."""
    items = questions_of(*reader, text, 10_000, seed=0, window=window)
    assert len({len(item.ids) for item in items}) > 1
    nats, tokens = by_hand(*reader, window)
    plan, task = Plan("0 2"), task_of(text)
    result = evaluate(*reader, [text], questions=10_000, window=window)["tasks"][text]
    sample = points.Sample(*reader, task, items)
    for policy in (Plan("all"), plan):
        with depth(reader[0], Planned(policy, scope="all")):
            each = losses(*reader, items)
            curved = points.window_losses_and_visits(sample, reader[0])[0]
        counts = [len(item.ids) - 1 for item in items]
        expected = sum(map(operator.mul, each, counts)) / tokens
        assert abs(sum(each) / len(each) - expected) > 1e-4  # the mean of windows is another
        assert plan_loss(*reader, items, policy, "all") == pytest.approx(expected, rel=1e-5)
        searched = PlanLosses(*reader, items, "all").of(policy, Plan("all"))
        assert [searched, curved] == pytest.approx([expected] * 2, rel=1e-5)
        if policy != plan:
            assert expected == pytest.approx(nats / tokens, rel=1e-5)
            assert result["metrics"]["loss"] == pytest.approx(expected, rel=1e-5)


def test_bits_per_byte_count_the_bytes_that_are_predicted(
    reader: tuple[Any, Any], text: str
) -> None:
    window = POSITIONS
    result = evaluate(*reader, [text], window=window)["tasks"][text]
    items = questions_of(*reader, text, 1000, seed=0, window=window)
    assert "".join(item.question + item.answer for item in items) == TEXT
    size = len(TEXT.encode()) - sum(len(item.question.encode()) for item in items)
    bits = result["metrics"]["loss"] * result["tokens"] / math.log(2) / size
    assert result["metrics"]["bits_per_byte"] == pytest.approx(bits)


def test_nothing_is_generated_for_a_plain_text(
    reader: tuple[Any, Any], text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each window is read once, and of one a few tokens more, for the cost."""
    model, tokenizer = reader
    monkeypatch.setattr(model, "generate", None)
    read: list[int] = []
    hook = model.get_input_embeddings().register_forward_hook(
        lambda _, given, __: read.append(given[0].numel())
    )
    result = evaluate(model, tokenizer, [text], questions=3, window=32)
    hook.remove()
    assert result["tasks"][text]["depth_columns"]["tokens"] == 32
    assert sum(read) == (3 + 1) * 32


def test_a_short_text_is_one_short_window_and_few_windows_are_drawn(
    reader: tuple[Any, Any], text: str, tmp_path: Path
) -> None:
    path = tmp_path / "short.txt"
    path.write_text("Return the sum.")
    (item,) = questions_of(*reader, f"text:{path}", 10, seed=0)
    assert item.question + item.answer == "Return the sum."
    every = questions_of(*reader, text, 1000, seed=0, window=16)
    some = questions_of(*reader, text, 5, seed=0, window=16)
    assert len(some) == 5
    assert [item for item in every if item in some] == some
    assert some != questions_of(*reader, text, 5, seed=1, window=16)
    with pytest.raises(UsageError, match=f"the model has {POSITIONS} positions"):
        questions_of(*reader, text, 5, seed=0, window=POSITIONS + 1)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("text:FILE", None, "cannot read"),
        ("text:FILE", b"", "is empty"),
        ("text:FILE", b" \n", "is empty"),
        ("text:FILE", b"\xff\xfe", "is no text in UTF-8"),
        ("text:", b"", "names no file; write text:FILE"),
        ("chat:FILE", b"", "is none of .json, .jsonl"),
        ("chat:FILE.jsonl", None, "there is no"),
        ("chat:FILE.jsonl", b'{"a": 1}\n', "give messages, or prompt and reference"),
        ("chat:FILE.jsonl", b'{"prompt": "a", "reference": ""}\n', "assistant says nothing"),
        (
            "chat:FILE.jsonl",
            b"\n\nnone\n",
            "line 3: broken JSON .*character 1 of the row",
        ),
        ("alpaca:FILE", None, "there is no"),
        ("FILE", b"a", "Did you mean text:"),
        ("texts:FILE", b"a", "unknown task"),
    ],
)
def test_a_file_that_is_none_is_refused_without_a_model(
    name: str, content: bytes | None, says: str, tmp_path: Path
) -> None:
    path = tmp_path / Path(name.partition(":")[2] or name).name
    if content is not None and path.name:
        path.write_bytes(content)
    with pytest.raises((DataError, UsageError), match=says) as raised:
        check_tasks([name.replace("FILE", str(tmp_path / "FILE"))])
    if "unknown" in str(raised.value):
        assert all(form in str(raised.value) for form in FORMS)


def test_the_last_answer_of_a_chat_is_the_reference(reader: tuple[Any, Any], chats: str) -> None:
    model, tokenizer = reader
    items = {item.type: item for item in questions_of(*reader, chats, 9, seed=0)}
    assert (items["chat"].question, items["chat"].answer) == ("Sum of it?", "Return it.")
    assert (items["prompt"].question, items["prompt"].answer) == ("What does it do?", "Sum.")
    begin = tokenizer.decode(tokenizer("")["input_ids"])
    (prompt,) = tokenizer.batch_decode(prompts(tokenizer, [items["chat"]])["input_ids"])
    assert prompt == begin + "Be brief.\nWhat?\nIt.\nSum of it?\n"
    read = labelled(model, tokenizer, [items["chat"]])
    said = read["input_ids"][read["labels"] != -100]
    assert tokenizer.decode(said) == "Return it.\n"  # and no earlier answer
    result = evaluate(*reader, [chats], new_tokens=3)["tasks"][chats]
    assert set(result["metrics"]) == {"rougeL", "rouge1", "rouge2", "exact", "contains", "loss"}
    assert result["n_by_type"] == {"chat": 1, "prompt": 1}


def test_damaged_rows_are_left_out_and_named(reader: tuple[Any, Any], chats: str) -> None:
    path = Path(chats.partition(":")[2])
    path.write_text(path.read_text() + '{"prompt": "a"}\n\nnone\n')
    told = r"1 wrong_format \(line 3\), 1 broken_row \(line 5\); 2 sound ones are used"
    with pytest.warns(UserWarning, match=told):
        assert len(questions_of(*reader, chats, 9, seed=0)) == 2


def test_a_chat_too_long_for_the_model_loses_its_oldest_turns(reader: tuple[Any, Any]) -> None:
    from trol.evaluation.items import Item

    turns = [("system", "Sum."), ("user", "it " * 200), ("assistant", "no"), ("user", "What? ")]
    turns_of = tuple({"role": r, "content": [{"type": "text", "text": t}]} for r, t in turns)
    item = Item(None, "What? ", "It.", "chat", turns=turns_of)
    short = fitted(*reader, item, 8)
    assert [turn["role"] for turn in messages(short)] == ["system", "user"]
    assert short.question == "What? "
    long = Item(None, "sum " * 300, "It.", "chat", turns=(turns_of[0], *turns_of[3:]))
    assert prompts(reader[1], [fitted(*reader, long, 8)])["input_ids"].shape[1] + 8 <= POSITIONS


def test_new_tokens_bound_the_answers(reader: tuple[Any, Any], chats: str) -> None:
    for most in (1, 4):
        heard: list[tuple[float, int]] = []
        result = evaluate(
            *reader,
            [chats],
            metrics=["contains"],
            new_tokens=most,
            progress=lambda _, done, of, heard=heard: heard.append((done, of)),
        )
        columns = result["tasks"][chats]["depth_columns"]
        assert columns["tokens"] <= columns["questions"] * (most + 40)
        assert heard[-1] == (2, 2)
        assert len(heard) <= most


@pytest.mark.parametrize("kind", ["text", "chats"])
def test_all_that_measures_takes_them_without_a_template(
    reader: tuple[Any, Any], kind: str, request: pytest.FixtureRequest, monkeypatch: Any
) -> None:
    name = request.getfixturevalue(kind)
    items = questions_of(*reader, name, 4, seed=0, split="validation")
    for method in ("influence", "greedy"):
        assert sum(chosen_plan(method, *reader, items, 0.67).plan.visits) == 2
    assert len(answers(*reader, items, new_tokens=2)) == len(items)
    batch = Batch(*reader, items, scope="answer", new_tokens=2)
    policy = Planned(chosen_plan("influence", *reader, items, 0.67).plan, scope="answer")
    assert len(batch.answers(policy)) == len(items)
    calibrate_exits(*reader, items, EarlyExit("margin", 1.0), cost=0.9)
    monkeypatch.setattr(points, "ROUNDS", 1)
    drawn = curve(*reader, [name], Request(("exit",), keeps=(0.67,), questions=2, seeds=1))
    assert "loss" in drawn["tasks"][name]["metrics"]
    one = drawn["tasks"][name]["methods"]["exit"]["points"][0]
    assert one["visits"]["mean"] == pytest.approx(2)


@pytest.mark.parametrize("kind", ["text", "chats"])
def test_plans_are_judged_by_another_part_of_a_file_than_chosen_by(
    reader: tuple[Any, Any], kind: str, request: pytest.FixtureRequest
) -> None:
    """Whatever the windows' lengths, no token of the file is in both, and together they are it."""
    name = request.getfixturevalue(kind)
    marks = len(reader[1]("")["input_ids"])

    def read(part: tuple[float, float], window: int | None) -> list[Any]:
        items = questions_of(*reader, name, 1000, seed=0, window=window, part=part)
        if window is None:
            return [item.answer for item in items]
        return [token for item in items for token in item.ids[marks:]]

    for chosen, judged in ((30, 40), (40, 30), (50, 50)) if kind == "text" else ((None, None),):
        first, rest, whole = read(CHOOSING, chosen), read(JUDGING, judged), read(WHOLE, judged)
        assert first
        assert rest
        if kind == "chats":
            assert sorted(first + rest) == sorted(whole)
        else:
            assert abs(len(whole) - len(first + rest)) <= 2  # a last token alone is no window
            assert whole[: len(first)] == first
            assert whole[-len(rest) :] == rest or whole[-len(rest) - 1 : -1] == rest


def test_plain_text_is_answer_but_for_what_begins_it(reader: tuple[Any, Any], text: str) -> None:
    model, tokenizer = reader
    from trol.depth import attach, detach
    from trol.evaluation.answers import losses

    items = questions_of(*reader, text, 1, seed=0)
    attach(model, Planned("0 2", scope="answer"))
    try:
        with trace(model) as seen:
            losses(model, tokenizer, items)
        assert (seen.visits[1] == 0).sum() == len(items[0].ids) - 1
    finally:
        detach(model)


def test_a_model_that_reads_is_never_shown_boards_by_default(reader: tuple[Any, Any]) -> None:
    assert default_task(reader[1]) == "docstrings"
    assert default_task(tiny_processor(["what is it?"])) == "boards"
