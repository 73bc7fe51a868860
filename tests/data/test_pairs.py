"""Pairs from files: the paper's formats to the letter, its split, and damaged rows left out."""

import csv
import json
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from trol.data.own_files import SPLITS, Pair, shortened
from trol.data.pairs import is_pairs, pairs_of
from trol.errors import DataError, UsageError


def alpaca(folder: Path, rows: int = 100) -> Path:
    data = [
        {"instruction": f"Add {n}.", "input": "1" * (n % 2), "output": f"It is {n}.", "text": ""}
        for n in range(rows)
    ]
    path = folder / "alpaca_data.json"
    path.write_text(json.dumps(data), encoding="utf-8")
    return path


def lines(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path


def test_alpaca_has_its_two_standard_templates(tmp_path: Path) -> None:
    name = f"alpaca:{alpaca(tmp_path, 4)}"
    found = {p.answer: p for split in ("train", "test") for p in pairs_of(name, split)}
    assert found["It is 0."] == Pair(
        "Below is an instruction that describes a task. Write a response that appropriately "
        "completes the request.<SEP>### Instruction:\nAdd 0.\n\n### Response:",
        "It is 0.",
        "no input",
    )
    assert found["It is 3."] == Pair(
        "Below is an instruction that describes a task, paired with an input that provides further "
        "context. Write a response that appropriately completes the request.<SEP>### Instruction:\n"
        "Add 3.\n\n### Input:\n1\n\n### Response:",
        "It is 3.",
        "input",
    )


def test_a_file_is_cut_into_70_15_15_that_share_nothing(tmp_path: Path) -> None:
    name = f"alpaca:{alpaca(tmp_path)}"
    split = {s: pairs_of(name, s) for s in SPLITS}
    assert [len(split[s]) for s in SPLITS] == [70, 15, 15]
    assert len({pair for pairs in split.values() for pair in pairs}) == 100
    assert pairs_of(name, "test") == split["test"]
    assert set(pairs_of(name, "test", seed=1)) == set(split["test"])
    assert pairs_of(name, "test", limit=3) == split["test"][:3]


def test_summaries_and_their_formats(tmp_path: Path) -> None:
    with (tmp_path / "samsum.csv").open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["id", "dialogue", "summary"])
        rows.writerows([[n, f"A: hi {n}\nB: hello", f"They greet {n}."] for n in range(20)])
    (pair,) = pairs_of(f"samsum:{tmp_path / 'samsum.csv'}", "test", limit=1)
    number = pair.answer.removeprefix("They greet ").rstrip(".")
    told = f"Summarize the following dialogue.<SEP>A: hi {number}\nB: hello\n\n### Summary:"
    assert (pair.question, pair.type) == (told, "dialogue")


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_a_set_with_own_splits_keeps_them(tmp_path: Path, form: str) -> None:
    for split, short in zip(SPLITS, ("train", "val", "test"), strict=True):
        rows = [{"article": f"{split} {n}", "highlights": f"{n} of {split}"} for n in range(3)]
        if form == "jsonl":
            lines(tmp_path / f"{short}.jsonl", rows)
        else:
            import pyarrow
            from pyarrow import parquet

            name = f"{split}-00000-of-00001.parquet"
            parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / name)
    for split in SPLITS:
        named = "train.jsonl" if form == "jsonl" else "train-00000-of-00001.parquet"
        for place in (tmp_path, tmp_path / named):
            pairs = pairs_of(f"cnn_dailymail:{place}", split)
            assert {p.answer for p in pairs} == {f"{n} of {split}" for n in range(3)}
    asked = "Summarize the following article.<SEP>"
    assert all(p.question.startswith(f"{asked}{split}") for p in pairs)


def test_a_folder_that_datasets_saved(tmp_path: Path) -> None:
    import datasets

    rows = {"article": ["a", "b"], "highlights": ["one", "two"]}
    made = datasets.Dataset.from_dict(rows)
    datasets.DatasetDict({"train": made, "test": made}).save_to_disk(str(tmp_path / "cnn"))
    name = f"cnn_dailymail:{tmp_path / 'cnn'}"
    assert {p.answer for p in pairs_of(name, "test")} == {"one", "two"}
    with pytest.raises(DataError, match="has no split 'validation'"):
        pairs_of(name, "validation")


def test_damaged_rows_are_left_out_and_counted(tmp_path: Path) -> None:
    good = [{"instruction": f"Say {n}.", "input": "", "output": str(n)} for n in range(10)]
    bad = [
        {"instruction": "Say it.", "input": "", "output": " "},
        {"instruction": "", "input": "", "output": "it"},
        {"instruction": "Say it.", "input": 3, "output": "it"},
        {"question": "Say it."},
    ]
    path = lines(tmp_path / "alpaca.jsonl", [*good, *bad, good[0]])
    with path.open("a", encoding="utf-8") as file:
        file.write("{broken\n")
    told = (
        "1 empty_answer (line 11), 1 empty_question (line 12), 2 wrong_format (line 13, line 14), "
        "1 broken_row (line 16); 11 sound ones are used (the first damaged one is line 11: "
    )
    with pytest.warns(UserWarning, match=re.escape(told)):
        train = pairs_of(f"alpaca:{path}", "train")
    assert len(train) == 7  # of ten: the row that is there twice counts once
    answers = {p.answer for s in SPLITS for p in _quietly(f"alpaca:{path}", s)}
    assert answers == {str(n) for n in range(10)}


DAMAGED = {
    "jsonl": ('\n{"instruction": "a", "output": "b"}\n\n', '{"instruction": "a"}\n', [4, 5, 6, 7]),
    "json": ('[{"instruction": "a",\n"output": "b"}', ',\n{"instruction":\n"a"}', [3, 5, 7, 9]),
    "csv": ('instruction,output\n"a\n",b\n', '"a",\n', [4, 5, 6, 7]),
}
"""Ending -> how a file begins, a damaged row, and the lines where such rows lie."""


@pytest.mark.parametrize("within", [True, False])
@pytest.mark.parametrize("ending", DAMAGED)
def test_the_first_damaged_rows_of_a_kind_are_placed(
    ending: str, within: bool, tmp_path: Path
) -> None:
    """Lines are counted as an editor counts them, whatever lies between the rows."""
    begins, damaged, places = DAMAGED[ending]
    path = tmp_path / f"test.{ending}"
    path.write_text(begins + damaged * 4 + "]" * (ending == "json"))
    of = f" of {path.name}"  # a set in several files
    lines_of = [f"line {at}{of}" for at in places[:3]]
    name = tmp_path if within else path
    told = (
        f"4 [a-z_]+ \\({', '.join(lines_of)}, \\.\\.\\.\\); 1 sound ones are used "
        f"\\(the first damaged one is {lines_of[0]}: "
    )
    with pytest.warns(UserWarning, match=told):
        assert len(pairs_of(f"alpaca:{name}", "test")) == 1


def _quietly(name: str, split: str) -> list[Pair]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pairs_of(name, split)


def test_what_cannot_be_read_is_told(tmp_path: Path) -> None:
    other = lines(tmp_path / "other.jsonl", [{"prompt": "a", "completion": "b"}])
    few = lines(tmp_path / "few.jsonl", [{"instruction": "a", "output": "b"}])
    lines(tmp_path / "train.jsonl", [{"instruction": "a", "output": "b"}])
    (tmp_path / "notes.txt").write_text("a", encoding="utf-8")
    for name, split, told in (
        (f"alpaca:{tmp_path / 'none.json'}", "train", "there is no"),
        (f"alpaca:{other}", "train", "has no instruction and no output, but prompt, completion"),
        (f"alpaca:{few}", "test", "too few for a test split"),
        (f"alpaca:{tmp_path / 'train.jsonl'}", "test", "no file of the test split"),
        (f"alpaca:{tmp_path / 'notes.txt'}", "test", "is none of .json"),
    ):
        with pytest.raises(DataError, match=told):
            pairs_of(name, split)
    with pytest.raises(UsageError, match="names no file; write alpaca:FILE"):
        pairs_of("alpaca:", "train")
    with pytest.raises(UsageError, match="unknown set of pairs 'docstring'"):
        pairs_of("docstring", "train")


def test_names_of_pairs() -> None:
    assert all(map(is_pairs, ("docstrings", "alpaca:x.json", "samsum:a/b", "cnn_dailymail:c")))
    assert not any(map(is_pairs, ("boards", "alpaca", "chat.jsonl", "C:alpaca")))


@pytest.fixture
def words() -> PreTrainedTokenizerFast:
    made = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made)


def test_a_long_pair_is_cut_before_the_response_begins(words: PreTrainedTokenizerFast) -> None:
    pair = Pair("one two three four five\n\n### Response:", "six seven eight", "t")
    short = shortened(pair, words, question=4, answer=2)
    assert short == Pair("one two\n\n### Response:", "six seven", "t")
    assert shortened(pair, words, question=7) == pair
    assert shortened(Pair("one two three", "x", "t"), words, question=2).question == "one two"
    with pytest.raises(UsageError, match="fills alone"):
        shortened(pair, words, question=2)
