"""Files of one's own to measure a model on: plain text, and chats or prompts with references."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from trol.data.formats import Messages, RowError, read_row, sound
from trol.data.images import open_picture
from trol.data.mixture_file import CHATS
from trol.data.row_files import JsonArray, JsonLines
from trol.errors import DataError

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
