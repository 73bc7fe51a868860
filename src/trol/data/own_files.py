"""Files of one's own to measure a model on: plain text, and chats or prompts with references.

One question with its one answer, in text alone.

The sets of Glavas et al. (arXiv 2410.20022) as pairs, from local files in the paper's format.

A conversation is BOS + template + <SEP> + prompt + response template + <SEP> + response + EOS; the
question holds what stands between BOS and the second <SEP>.
"""

from __future__ import annotations

import csv
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from trol.data.formats import Messages, RowError, read_row, sound
from trol.data.images import open_picture
from trol.data.mixture_file import CHATS
from trol.data.row_files import JsonArray, JsonLines, Table
from trol.errors import DataError, UsageError, unknown

PROMPT, REFERENCE = "prompt", "reference"
"""Columns of a row that is no chat."""


@dataclass(frozen=True)
class Chat:
    """A conversation up to where the assistant is to speak, and what it should say."""

    turns: Messages
    """At most a system message, then user and assistant in turn; the user is last."""
    answer: str
    type: str
    """What the row is: a chat or a prompt."""

    @property
    def question(self) -> str:
        """What the user said last."""
        return text_of(self.turns[-1])

    def shown(self, folder: Path) -> Messages:
        """The turns with their pictures opened; relative paths begin at `folder`."""
        return [
            {**turn, "content": [_open(p, folder) for p in turn["content"]]} for turn in self.turns
        ]


def text_of(message: Mapping[str, Any]) -> str:
    """What a message says, pictures left out."""
    return "".join(part["text"] for part in message["content"] if part["type"] == "text")


def read_text(path: Path) -> str:
    """The whole text of a file.

    Raises:
        DataError: it is missing, empty, or not UTF-8.
    """
    try:
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is no text in UTF-8: {error}; save it as such.") from error
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}; name a file of text.") from error
    if not text.strip():
        raise DataError(f"{path} is empty; name a file with text in it.")
    return text


def read_chats(path: Path) -> tuple[Chat, ...]:
    """The sound rows of a .jsonl or .json file, each with its last answer as the reference.

    A row is what `trol train` learns from (OpenAI messages), or has a "prompt" and a "reference".
    Damaged rows are left out, counted in a warning.

    Raises:
        DataError: the file is missing, has another ending, or no sound row.
    """
    if path.suffix not in CHATS:
        raise DataError(
            f"{path} is none of {', '.join(CHATS)}; name a file of chats, or text:{path}."
        )
    if not path.is_file():
        raise DataError(f"there is no {path}; name a file of chats.")
    return _read(path, path.stat().st_mtime_ns)


@lru_cache(maxsize=4)
def _read(path: Path, changed: int) -> tuple[Chat, ...]:
    del changed  # a file that was written anew is read anew
    rows = (JsonArray if path.suffix == ".json" else JsonLines)(path).rows()
    return tuple(sound(path, (row for _, _, row in rows), _chat, "chats"))


def _chat(row: Mapping[str, Any]) -> Chat:
    if PROMPT in row and REFERENCE in row:
        said = [("user", row[PROMPT]), ("assistant", row[REFERENCE])]
        row = {"messages": [{"role": role, "content": text} for role, text in said]}
        return _split(row, "prompt")
    if "messages" not in row:
        raise RowError(
            "wrong_format",
            f"the row has the columns {', '.join(map(str, row)) or 'none'}; give messages, or "
            f"{PROMPT} and {REFERENCE}.",
        )
    return _split(row, "chat")


def _split(row: Mapping[str, Any], kind: str) -> Chat:
    *turns, last = read_row(row, "messages", {}, "<image>")
    return Chat(turns, text_of(last), kind)


def _open(part: dict[str, Any], folder: Path) -> dict[str, Any]:
    if part["type"] != "image":
        return part
    return {**part, "image": open_picture(part["image"], folder, allow_urls=False)}


SPLITS: dict[str, float] = {"train": 0.7, "validation": 0.15, "test": 0.15}
"""Share of the pairs that each split has, as in Glavas et al. (arXiv 2410.20022)."""


@dataclass(frozen=True)
class Pair:
    """A question, its answer, and the type of question that it is."""

    question: str
    answer: str
    type: str

    def messages(self, *, answered: bool = True) -> list[dict[str, Any]]:
        """The pair as a conversation of user and assistant; of the user alone if not answered."""
        said = [("user", self.question), ("assistant", self.answer)][: 1 + answered]
        return [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in said]


def check_split(split: str) -> None:
    """Raises `UsageError` unless `split` is one of `SPLITS`."""
    if split not in SPLITS:
        raise unknown("split", split, SPLITS)


def drawn(pairs: Iterable[Pair], limit: int | None, seed: int) -> list[Pair]:
    """The pairs in an order that the seed gives, at most `limit` of them."""
    if limit is not None and limit < 1:
        raise UsageError(f"limit is {limit}; give 1 or more, or None for all pairs.")
    shuffled = list(pairs)
    random.Random(f"pairs/{seed}").shuffle(shuffled)
    return shuffled[:limit]


def shortened(pair: Pair, tokenizer: Any, *, question: int, answer: int | None = None) -> Pair:
    """The pair cut to at most `question` and `answer` tokens; the answer loses its end.

    The question's last paragraph stays (`### Response:` says where to begin): what stands before
    it loses its end.

    Raises:
        UsageError: not even the last paragraph fits.
    """
    text = pair.question
    if _count(tokenizer, text) > question:
        head, gap, tail = text.rpartition("\n\n")
        if not gap:
            head, tail = text, ""
        room = question - _count(tokenizer, gap + tail)
        if room < 1:
            raise UsageError(
                f"a question may have {question} tokens here, which its last paragraph fills "
                "alone; allow longer questions (max_tokens, prompt_share)."
            )
        text = _cut(tokenizer, head, room) + gap + tail
    said = pair.answer if answer is None else _cut(tokenizer, pair.answer, answer)
    return Pair(text, said, pair.type)


def _count(tokenizer: Any, text: str) -> int:
    return len(tokenizer(text, add_special_tokens=False)["input_ids"])


def _cut(tokenizer: Any, text: str, most: int) -> str:
    """The first `most` tokens of the text, as a piece of the text itself."""
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ends = [end for _, end in encoded["offset_mapping"]]
    return text if len(ends) <= most else text[: ends[most - 1]]


SEPARATOR = "<SEP>"
"""Stands between the template and the prompt, and between the prompt and the response."""

SPLIT_SEED = 42
"""Of the paper's split of Alpaca into 70/15/15."""

ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    f"the request.{SEPARATOR}### Instruction:\n{{instruction}}\n\n### Response:"
)
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request."
    f"{SEPARATOR}### Instruction:\n{{instruction}}\n\n### Input:\n{{input}}\n\n### Response:"
)
SUMMARY = f"Summarize the following {{kind}}.{SEPARATOR}{{text}}\n\n### Summary:"

Row = Mapping[str, Any]


def read_alpaca(row: Row) -> Pair:
    """`instruction`, `input` (may be empty) and `output`."""
    _check_columns(row, ("instruction", "output"))
    given = {"instruction": _text(row, "instruction"), "input": _text(row, "input")}
    form = ALPACA_WITH_INPUT if given["input"] else ALPACA
    question = form.format(**given) if given["instruction"] else ""
    return _pair(question, _text(row, "output"), "input" if given["input"] else "no input")


def read_cnn_dailymail(row: Row) -> Pair:
    """`article` and `highlights`."""
    return _summary(row, "article", "highlights")


def read_samsum(row: Row) -> Pair:
    """`dialogue` and `summary`."""
    return _summary(row, "dialogue", "summary")


FORMATS: dict[str, Callable[[Row], Pair]] = {
    "alpaca": read_alpaca,
    "cnn_dailymail": read_cnn_dailymail,
    "samsum": read_samsum,
}
"""Name of a set -> how its rows are read."""


def read_pairs(form: str, path: Path, split: str) -> list[Pair]:
    """The pairs of a split, in the order of a permutation drawn with seed 42.

    A folder, or a file named for its split beside files of the others (`test.csv`,
    `train-00000-of-00001.parquet`), has splits of its own; the sound and distinct rows of any
    other file are cut by `SPLITS`. (How the paper's authors permuted theirs is not known.)
    Damaged rows are left out, counted in a warning.

    Raises:
        DataError: no such file or split, or no sound row in it.
    """
    check_there(form, path)
    if path.is_dir() or _named_for(path) is not None:
        return _sound(form, path, _own_split(path, split))
    pairs = _sound(form, path, _rows(path))
    order = np.random.default_rng(SPLIT_SEED).permutation(len(pairs))
    ends = np.round(np.cumsum(list(SPLITS.values())) * len(pairs)).astype(int)
    owned = dict(zip(SPLITS, np.split(order, ends[:-1]), strict=True))[split]
    if not len(owned):
        raise DataError(f"{path} has {len(pairs)} sound rows, too few for a {split} split.")
    return [pairs[number] for number in owned]


def check_there(form: str, path: Path) -> None:
    """Raises `DataError` where there is no such file or folder."""
    if not path.exists():
        raise DataError(f"there is no {path}; download the {form} set and name its file.")


def _sound(form: str, path: Path, rows: Iterator[Row | RowError]) -> list[Pair]:
    """The distinct pairs of the rows that are whole."""
    return list(dict.fromkeys(sound(path, rows, FORMATS[form], form)))


def _own_split(path: Path, split: str) -> Iterator[Row | RowError]:
    """Rows of a split that has files, or a table in a saved folder, of its own."""
    if path.is_dir() and any((path / n).exists() for n in ("state.json", "dataset_dict.json")):
        return (row for _, _, row in Table(str(path), split).rows())
    folder = path if path.is_dir() else path.parent
    files = sorted(p for p in folder.iterdir() if p.suffix in _READ and _named_for(p) == split)
    files = files if path.is_dir() else [p for p in files if p.suffix == path.suffix]
    if not files:
        raise DataError(
            f"{folder} has no file of the {split} split; put {split}.jsonl (.json, .csv, .parquet) "
            "there, or name one file whose name says no split, which is cut into all three."
        )
    return (row for file in files for row in _rows(file))


def _named_for(path: Path) -> str | None:
    """The split that a file's name begins with."""
    begins = path.name.lower()
    short = {"train": "train", "val": "validation", "test": "test"}
    word = begins.replace("_", "-").replace(".", "-").partition("-")[0]
    return next((split for name, split in short.items() if word in (name, split)), None)


def _rows(path: Path) -> Iterator[Row | RowError]:
    if path.suffix not in _READ:
        raise DataError(f"{path} is none of {', '.join(_READ)}; convert it, or name another file.")
    return _READ[path.suffix](path)


def _csv_rows(path: Path) -> Iterator[Row | RowError]:
    with path.open(encoding="utf-8", newline="") as file:
        try:
            for row in csv.DictReader(file):
                yield row if None not in row else RowError("wrong_format", "a row is too long.")
        except (csv.Error, UnicodeDecodeError) as error:
            raise DataError(f"{path} is no CSV in UTF-8: {error}; save it again.") from error


_READ: dict[str, Callable[[Path], Iterator[Row | RowError]]] = {
    ".jsonl": lambda path: (row for _, _, row in JsonLines(path).rows()),
    ".json": lambda path: (row for _, _, row in JsonArray(path).rows()),
    ".parquet": lambda path: (row for _, _, row in Table(str(path)).rows()),
    ".csv": _csv_rows,
}


def _summary(row: Row, asked: str, answered: str) -> Pair:
    _check_columns(row, (asked, answered))
    text = _text(row, asked)
    question = SUMMARY.format(kind=asked, text=text) if text else ""
    return _pair(question, _text(row, answered), asked)


def _check_columns(row: Row, names: tuple[str, ...]) -> None:
    missing = [name for name in names if name not in row]
    if missing:
        raise RowError(
            "wrong_format",
            f"the row has no {' and no '.join(missing)}, but {', '.join(map(str, row))}; "
            "name a file of the set as it is published.",
        )


def _text(row: Row, name: str) -> str:
    value = row.get(name)
    if value is not None and not isinstance(value, str):
        raise RowError("wrong_format", f"{name} is {value!r}, which is no text.")
    return (value or "").strip()


def _pair(question: str, answer: str, kind: str) -> Pair:
    if not question:
        raise RowError("empty_question", "nothing is asked; delete the row.")
    if not answer:
        raise RowError("empty_answer", "there is no reference answer; delete the row.")
    return Pair(question, answer, kind)
