"""Files to measure or train on: plain text, chats with reference answers, and pairs.

A pair is a question and its answer. Its formats are those of Glavas et al. (arXiv 2410.20022),
where a conversation is BOS + template + <SEP> + prompt + response template + <SEP> + response +
EOS; a pair's question is the text between BOS and the second <SEP>.
"""

import csv
import random
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from trol.data.formats import Messages, RowError, read_row, read_sound, text_of
from trol.data.images import open_picture
from trol.data.row_files import JSON_FILES, LocatedRow, Table, located_rows
from trol.errors import DataError, UsageError, unknown

PROMPT, REFERENCE = "prompt", "reference"
"""Columns of a row that is no chat."""


@dataclass(frozen=True)
class Chat:
    """A conversation up to its last question, and the reference answer to that."""

    turns: Messages
    """At most a system message, then user and assistant in turn; the user is last."""
    answer: str
    type: str
    """`chat` or `prompt`, by the columns of the row."""

    @property
    def question(self) -> str:
        """The text of the user's last message."""
        return text_of(self.turns[-1])

    def with_pictures(self, folder: Path) -> Messages:
        """The turns with their pictures opened; relative paths begin at `folder`."""
        return [
            {**turn, "content": [_open(p, folder) for p in turn["content"]]} for turn in self.turns
        ]


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

    A row has OpenAI messages, as for `trol train`, or a "prompt" and a "reference". Damaged rows
    are left out, counted in a warning.

    Raises:
        DataError: the file is missing, has another ending, or no sound row.
    """
    if path.suffix not in JSON_FILES:
        raise DataError(
            f"{path} is none of {', '.join(JSON_FILES)}; name a file of chats, or text:{path}."
        )
    if not path.is_file():
        raise DataError(f"there is no {path}; name a file of chats.")
    return _chats(path, path.stat().st_mtime_ns)


@lru_cache(maxsize=4)
def _chats(path: Path, changed: int) -> tuple[Chat, ...]:
    del changed  # part of the cache's key: a file that has changed is read again
    rows = located_rows(JSON_FILES[path.suffix](path))
    return tuple(read_sound(path, rows, _chat, "chats"))


def _chat(row: Mapping[str, Any]) -> Chat:
    kind = "chat"
    if PROMPT in row and REFERENCE in row:
        turns = [("user", row[PROMPT]), ("assistant", row[REFERENCE])]
        row = {"messages": [{"role": role, "content": text} for role, text in turns]}
        kind = "prompt"
    elif "messages" not in row:
        raise RowError(
            "wrong_format",
            f"the row has the columns {', '.join(map(str, row)) or 'none'}; give messages, or "
            f"{PROMPT} and {REFERENCE}.",
        )
    *messages, last = read_row(row, "messages", {}, "<image>")
    return Chat(messages, text_of(last), kind)


def _open(part: dict[str, Any], folder: Path) -> dict[str, Any]:
    if part["type"] != "image":
        return part
    return {**part, "image": open_picture(part["image"], folder, allow_urls=False)}


SPLITS: dict[str, float] = {"train": 0.7, "validation": 0.15, "test": 0.15}
"""Share of the pairs that each split has, as in Glavas et al. (arXiv 2410.20022)."""


@dataclass(frozen=True)
class Pair:
    """A question, its answer, and the question's type."""

    question: str
    answer: str
    type: str

    def messages(self, *, answered: bool = True) -> list[dict[str, Any]]:
        """The pair as a conversation of user and assistant; of the user alone if not answered."""
        turns = [("user", self.question), ("assistant", self.answer)][: 1 + answered]
        return [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in turns]


def check_split(split: str) -> None:
    """Raises `UsageError` unless `split` is one of `SPLITS`."""
    if split not in SPLITS:
        raise unknown("split", split, SPLITS)


def split_of(key: str) -> str:
    """The split that a text's digest puts it in, so that it is always the same one."""
    place = zlib.crc32(key.encode()) / 2**32
    for split, share in SPLITS.items():
        place -= share
        if place < 0:
            return split
    return split


def drawn(pairs: Iterable[Pair], limit: int | None, seed: int) -> list[Pair]:
    """The pairs in an order that the seed gives, at most `limit` of them."""
    if limit is not None and limit < 1:
        raise UsageError(f"limit is {limit}; give 1 or more, or None for all pairs.")
    shuffled = list(pairs)
    random.Random(f"pairs/{seed}").shuffle(shuffled)
    return shuffled[:limit]


def shortened(pair: Pair, tokenizer: Any, *, question: int, answer: int | None = None) -> Pair:
    """The pair cut to at most `question` and `answer` tokens; the answer loses its end.

    The question's last paragraph, such as `### Response:`, stays; the text before it loses its end.

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
    short = pair.answer if answer is None else _cut(tokenizer, pair.answer, answer)
    return Pair(text, short, pair.type)


def _count(tokenizer: Any, text: str) -> int:
    return len(tokenizer(text, add_special_tokens=False)["input_ids"])


def _cut(tokenizer: Any, text: str, most: int) -> str:
    """The first `most` tokens of the text, as a piece of the text itself."""
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ends = [end for _, end in encoded["offset_mapping"]]
    return text if len(ends) <= most else text[: ends[most - 1]]


SEPARATOR = "<SEP>"
"""Divides template and prompt, and prompt and response."""

SPLIT_SEED = 42
"""Seed of the paper's split of Alpaca into 70/15/15."""

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


def alpaca_pair(row: Row) -> Pair:
    """`instruction`, `input` (may be empty) and `output`."""
    _check_columns(row, ("instruction", "output"))
    texts = {"instruction": _text(row, "instruction"), "input": _text(row, "input")}
    form = ALPACA_WITH_INPUT if texts["input"] else ALPACA
    question = form.format(**texts) if texts["instruction"] else ""
    return _pair(question, _text(row, "output"), "input" if texts["input"] else "no input")


def summary_pair(row: Row, document: str, summary: str) -> Pair:
    """Columns `document` (article or dialogue) and `summary`, by their names in the set."""
    _check_columns(row, (document, summary))
    text = _text(row, document)
    question = SUMMARY.format(kind=document, text=text) if text else ""
    return _pair(question, _text(row, summary), document)


PAIR_FORMATS: dict[str, Callable[[Row], Pair]] = {
    "alpaca": alpaca_pair,
    "cnn_dailymail": partial(summary_pair, document="article", summary="highlights"),
    "samsum": partial(summary_pair, document="dialogue", summary="summary"),
}
"""Name of a set -> row to pair."""


def read_pairs(form: str, path: Path, split: str) -> list[Pair]:
    """The pairs of a split, in the order of a permutation drawn with seed 42.

    A folder, or a file named after its split (`test.csv`, `train-00000-of-00001.parquet`), has
    splits of its own; the sound and distinct rows of any other file are cut by `SPLITS`. (The
    paper does not say how its rows were permuted.) Damaged rows are left out, counted in a warning.

    Raises:
        DataError: no such file or split, or no sound row in it.
    """
    check_there(form, path)
    if path.is_dir() or _named_for(path) is not None:
        return _sound(form, path, _own_split(path, split))
    pairs = _sound(form, path, _rows(path))
    order = np.random.default_rng(SPLIT_SEED).permutation(len(pairs))
    ends = np.round(np.cumsum(list(SPLITS.values())) * len(pairs)).astype(int)
    numbers = dict(zip(SPLITS, np.split(order, ends[:-1]), strict=True))[split]
    if not len(numbers):
        raise DataError(f"{path} has {len(pairs)} sound rows, too few for a {split} split.")
    return [pairs[number] for number in numbers]


def check_there(form: str, path: Path) -> None:
    """Raises `DataError` if there is no such file or folder."""
    if not path.exists():
        raise DataError(f"there is no {path}; download the {form} set and name its file.")


def _sound(form: str, path: Path, rows: Iterator[LocatedRow]) -> list[Pair]:
    """The distinct pairs of the rows without damage."""
    return list(dict.fromkeys(read_sound(path, rows, PAIR_FORMATS[form], form)))


def _own_split(path: Path, split: str) -> Iterator[LocatedRow]:
    """Rows of a split that has files, or a table in a saved folder, of its own."""
    if path.is_dir() and any((path / n).exists() for n in ("state.json", "dataset_dict.json")):
        return located_rows(Table(str(path), split))
    folder = path if path.is_dir() else path.parent
    files = sorted(p for p in folder.iterdir() if p.suffix in PAIR_FILES and _named_for(p) == split)
    files = files if path.is_dir() else [p for p in files if p.suffix == path.suffix]
    if not files:
        raise DataError(
            f"{folder} has no file of the {split} split; put {split}.jsonl (.json, .csv, .parquet) "
            "there, or name one file whose name says no split, which is cut into all three."
        )
    rows = ((file, where, row) for file in files for where, row in _rows(file))
    return ((partial(_within, file, where), row) for file, where, row in rows)


def _within(file: Path, where: Callable[[], str]) -> str:
    return f"{where()} of {file.name}"


def _named_for(path: Path) -> str | None:
    """The split that a file's name begins with."""
    word = re.split(r"[-_.]", path.name.lower())[0]
    return {"val": "validation"}.get(word, word if word in SPLITS else None)


PAIR_FILES = (*JSON_FILES, ".parquet", ".csv")
"""Endings of files of pairs."""


def _rows(path: Path) -> Iterator[LocatedRow]:
    if path.suffix not in PAIR_FILES:
        raise DataError(
            f"{path} is none of {', '.join(PAIR_FILES)}; convert it, or name another file."
        )
    if path.suffix == ".csv":
        return _csv_rows(path)
    table = Table(str(path)) if path.suffix == ".parquet" else JSON_FILES[path.suffix](path)
    return located_rows(table)


def _csv_rows(path: Path) -> Iterator[LocatedRow]:
    with path.open(encoding="utf-8", newline="") as file:
        try:
            for row in (reader := csv.DictReader(file)):
                sound = None not in row
                damage = RowError("wrong_format", "a row is too long.")
                yield partial("line {}".format, reader.line_num), row if sound else damage
        except (csv.Error, UnicodeDecodeError) as error:
            raise DataError(f"{path} is no CSV in UTF-8: {error}; save it again.") from error


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
