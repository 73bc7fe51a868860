"""Answers at every level: what is shared, resumed or split never shows in them."""

from pathlib import Path
from typing import Any

import pytest
import torch

import trol
from evaluation.oracle_standins import decoder, items
from trol.errors import DataError, UsageError
from trol.evaluation.items import prompts
from trol.evaluation.oracle import Batch, GumbelNoise, Questions, answer_all, read_menu
from trol.evaluation.shards import shard_of
from trol.evaluation.store import Store, read_rows, rows_of, unique
from trol.policies.planned import Planned

LAYERS, NEW_TOKENS = 4, 8
MENU = read_menu("exit@0,0,0 3,1:2,all", LAYERS)


@pytest.fixture(scope="module")
def hosted() -> tuple[Any, Any]:
    return decoder(LAYERS)


def asked(**settings: Any) -> Questions:
    return Questions(items(), ("rougeL", "exact", "loss"), NEW_TOKENS, **settings)


def finished(hosted: tuple[Any, Any], folder: Path, questions: Questions, **settings: Any) -> list:
    store = Store(folder, questions.header(hosted[0], MENU), settings.get("shard", (0, 1)))
    answer_all(*hosted, questions, MENU, store, **settings)
    return unique(store.rows())


@pytest.mark.parametrize("scope", ["answer", "all"])
def test_a_level_equals_generating_it_from_nothing(hosted: tuple[Any, Any], scope: Any) -> None:
    model, tokenizer = hosted
    batch = Batch(model, tokenizer, items(), scope=scope, new_tokens=NEW_TOKENS)
    assert (batch._prefix is not None) == (scope == "answer")
    inputs = prompts(tokenizer, items())
    assert int(inputs["attention_mask"].min()) == 0  # rows are padded on the left
    seen = set()
    for level in (*MENU.levels, *MENU.levels):  # twice: no level may write into what they share
        with trol.depth(model, Planned(level.plan, scope=scope)), torch.inference_mode():
            tokens = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
        new = tokens[:, inputs["input_ids"].shape[1] :]
        wanted = tokenizer.batch_decode(new, skip_special_tokens=True)
        given = batch.answers(level.policy(scope))
        assert [one.text for one in given] == [text.strip() for text in wanted]
        ends = [row.index(2) + 1 if 2 in row else NEW_TOKENS for row in new.tolist()]
        assert [one.tokens for one in given] == ends
        seen.add(tuple(one.text for one in given))
    assert len(seen) == len(MENU.levels)


def test_the_prompt_of_scope_answer_is_passed_once(
    hosted: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = hosted
    lengths = []
    forward = type(model).forward

    def counting(self: Any, *args: Any, **kwargs: Any) -> Any:
        lengths.append(kwargs["input_ids"].shape[1])
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(type(model), "forward", counting)
    batch = Batch(model, tokenizer, items(), scope="answer", new_tokens=2)
    for level in MENU.levels:
        batch.answers(level.policy("answer"))
    assert sum(length > 1 for length in lengths) == 1


def test_rows_do_not_depend_on_batches_or_shards(hosted: tuple[Any, Any], tmp_path: Path) -> None:
    questions = asked(samples=2)
    whole = finished(hosted, tmp_path / "whole", questions)
    small = finished(hosted, tmp_path / "small", questions, batch_size=2)
    for index in (0, 1):
        parts = finished(hosted, tmp_path / "parts", questions, shard=(index, 2), batch_size=3)
    for other in (small, parts):
        assert [(row.key, row.answer, row.new_tokens) for row in other] == [
            (row.key, row.answer, row.new_tokens) for row in whole
        ]
        for mine, theirs in zip(whole, other, strict=True):
            assert mine.scores == pytest.approx(theirs.scores, abs=1e-5)
    assert {path.name for path in (tmp_path / "parts").glob("*.jsonl")} == {
        "rows-0-of-2.jsonl",
        "rows-1-of-2.jsonl",
    }
    assert len(whole) == 7 * (len(MENU.levels) + 2)


def test_missing_shards_are_named(hosted: tuple[Any, Any], tmp_path: Path) -> None:
    questions = asked()
    store = Store(tmp_path, questions.header(hosted[0], MENU), (1, 3))
    answer_all(*hosted, questions, MENU, store, shard=(1, 3))
    assert questions.missing(MENU, store, 3) == ["0/3", "2/3"]


def test_a_killed_run_goes_on_without_repeating(
    hosted: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    questions = asked(samples=1)
    whole = finished(hosted, tmp_path / "whole", questions, batch_size=3)
    calls: list[str] = []
    answers = Batch.answers

    def failing(self: Batch, policy: Any, noise: Any = None) -> Any:
        if len(calls) == 8:
            raise KeyboardInterrupt
        calls.append(str(policy))
        return answers(self, policy, noise)

    monkeypatch.setattr(Batch, "answers", failing)
    with pytest.raises(KeyboardInterrupt):
        finished(hosted, tmp_path / "cut", questions, batch_size=3)
    path = tmp_path / "cut" / "rows-0-of-1.jsonl"
    kept = rows_of(path)
    assert len(kept) == 3 * 6 + 3 * 2  # whole batches of levels
    data = path.read_bytes()
    path.write_bytes(data[: len(data) - 40])  # the kill tore the last line
    assert rows_of(path) == kept[:-1]
    calls[:] = ["before"] * 9
    again = finished(hosted, tmp_path / "cut", questions, batch_size=3)
    assert again == whole
    # 3 batches x 6 answers, of which 7 were whole: the torn one is made anew.
    assert len(calls) - 9 == 3 * 6 - 7
    assert len(path.read_bytes().splitlines()) == len(whole)
    calls.clear()
    finished(hosted, tmp_path / "cut", questions, batch_size=3)
    assert not calls


def test_a_folder_of_another_run_is_refused(hosted: tuple[Any, Any], tmp_path: Path) -> None:
    model = hosted[0]
    Store(tmp_path, asked().header(model, MENU, task="words"))
    Store(tmp_path, asked().header(model, MENU, task="words"))
    other, _ = decoder(LAYERS)
    with torch.no_grad():
        other.lm_head.weight[0, 0] += 1
    for header, said in (
        (asked(seed=1).header(model, MENU, task="words"), "seed 0 there, 1 here"),
        (asked().header(model, MENU, task="others"), "task"),
        (asked().header(model, read_menu("all,0", LAYERS), task="words"), "menu"),
        (asked(scope="all").header(model, MENU, task="words"), "scope"),
        (asked().header(other, MENU, task="words"), "weights"),
    ):
        with pytest.raises(UsageError, match=said):
            Store(tmp_path, header)


def test_a_damaged_line_is_named_not_skipped(hosted: tuple[Any, Any], tmp_path: Path) -> None:
    rows = finished(hosted, tmp_path, asked())
    path = tmp_path / "rows-0-of-1.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([lines[0], lines[1][5:], *lines[2:]]))
    with pytest.raises(DataError, match="line 2 is not JSON"):
        read_rows(tmp_path)
    path.write_text("".join([lines[0], *lines]))
    assert read_rows(tmp_path) == rows  # a line twice is one row
    with pytest.raises(DataError, match="trol oracle"):
        read_rows(tmp_path / "nothing")


def test_samples_are_left_out_unless_asked_for(hosted: tuple[Any, Any], tmp_path: Path) -> None:
    finished(hosted, tmp_path, asked(samples=2))
    assert {row.sample for row in read_rows(tmp_path)} == {0}
    assert {row.sample for row in read_rows(tmp_path, samples=True)} == {0, 1, 2}
    drawn = [row for row in read_rows(tmp_path, samples=True) if row.sample]
    assert {row.plan for row in drawn} == {"0-3"}
    assert all(set(row.scores) == {"rougeL", "exact"} for row in drawn)


def test_noise_draws_from_the_softmax() -> None:
    scores = torch.tensor([[0.0, 1.0, 2.0]])
    rows = 4000
    noise = GumbelNoise(range(rows), 1, 0, temperature=0.5)
    drawn = noise(torch.empty(0), scores.expand(rows, -1)).argmax(1)
    shares = torch.bincount(drawn, minlength=3) / rows
    wanted = (scores[0] / 0.5).softmax(0)
    # Five standard deviations of a share.
    assert ((shares - wanted).abs() < 5 * (wanted * (1 - wanted) / rows).sqrt()).all()


def test_a_model_without_layers_left_out_has_the_loss_of_the_plain_one(
    hosted: tuple[Any, Any], tmp_path: Path
) -> None:
    from trol.evaluation.answers import losses

    rows = [row for row in finished(hosted, tmp_path, asked()) if row.plan == "0-3"]
    wanted = losses(*hosted, items())
    assert [row.scores["loss"] for row in rows] == pytest.approx(wanted, abs=1e-5)
    assert rows[0].value("loss") == -rows[0].scores["loss"]


def test_torchrun_says_which_part_a_process_does(monkeypatch: pytest.MonkeyPatch) -> None:
    assert shard_of(None) == (0, 1)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert shard_of(None) == (1, 4)
    assert shard_of("0/2") == (0, 2)


@pytest.mark.parametrize("text", ["2/2", "1", "a/2", "-1/2", "0/0", "1/", ""])
def test_a_bad_shard_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="0/2"):
        shard_of(text)
