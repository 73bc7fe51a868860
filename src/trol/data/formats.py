"""Row formats: what a row's columns mean, as messages with references to their pictures.

A message is `{"role", "content": [{"type": "text", "text"}, {"type": "image", "image"}]}`, where
`image` is a path, an address, a data URL or the bytes of a file: nothing is opened here.

What can be wrong with one row of training data, by name.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from trol.errors import DataError, unknown

Read = TypeVar("Read")

KINDS = {
    "broken_row": "no readable row: broken JSON, or no keys and values",
    "wrong_format": "other columns, roles or contents than the format has",
    "role_order": "not user and assistant in turn, ending with the assistant",
    "empty_question": "the user says nothing",
    "empty_answer": "the assistant says nothing",
    "image_count": "another number of images than of placeholders",
    "image_missing": "no image file at the path",
    "image_unreadable": "an image that is truncated, damaged, too large or none",
    "image_url": "an address where addresses are not allowed, or that does not answer",
    "too_long": "more tokens than the model has positions",
}
"""Kind of damage -> what it means."""


class RowError(DataError):
    """One row that cannot be trained on; `kind` is one of `KINDS`."""

    def __init__(self, kind: str, message: str) -> None:
        if kind not in KINDS:
            raise unknown("kind of damage", kind, KINDS)
        super().__init__(kind, message)  # both, so that the error can be pickled
        self.kind = kind

    def __str__(self) -> str:
        return str(self.args[1])


@contextmanager
def row_errors(what: str = "it cannot be read") -> Generator[None]:
    """While open, whatever goes wrong is a `RowError`; one that has no kind is a wrong format."""
    try:
        yield
    except (RowError, MemoryError):
        raise
    except DataError as error:
        raise RowError("wrong_format", str(error)) from error
    except Exception as error:  # what a row holds meets templates and processors of many families
        told = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise RowError("wrong_format", f"{what}: {told}") from error


def sound(
    path: object,
    rows: Iterable[Mapping[str, Any] | RowError],
    read: Callable[[Mapping[str, Any]], Read],
    what: str,
) -> list[Read]:
    """What `read` makes of the rows that are whole; the others are counted in a warning.

    Raises:
        DataError: not one row is whole; `what` says what they should have been.
    """
    found: list[Read] = []
    damaged: Counter[str] = Counter()
    first = None
    for row in rows:
        try:
            if isinstance(row, RowError):
                raise row
            found.append(read(row))
        except RowError as error:
            damaged[error.kind] += 1
            first = first or error
    if not found:
        raise DataError(f"{path} has no sound row of {what}: {first or 'it is empty.'}")
    if damaged:
        told = ", ".join(f"{count} {kind}" for kind, count in damaged.items())
        warnings.warn(f"rows of {path} left out: {told} (the first: {first})", stacklevel=4)
    return found


Messages = list[dict[str, Any]]
Turn = tuple[str, Any]
"""Role, and a text or a list of parts."""


def read_messages(row: Mapping[str, Any]) -> list[Turn]:
    """OpenAI messages: role, and a text or a list of text and image parts."""
    said = _dicts(row, "messages")
    if any(message.get("tool_calls") for message in said):
        raise RowError("wrong_format", "it calls tools, which is not trained on; take it out.")
    return [(str(m.get("role")), m.get("content")) for m in said]


SPEAKERS = {"human": "user", "gpt": "assistant"}
"""How ShareGPT calls the roles that have another name here."""


def read_sharegpt(row: Mapping[str, Any]) -> list[Turn]:
    """ShareGPT, LLaVA and ShareGPT4V conversations: `from` and `value`."""
    said = _dicts(row, "conversations")
    return [(SPEAKERS.get(str(m.get("from")), str(m.get("from"))), m.get("value")) for m in said]


def read_alpaca(row: Mapping[str, Any]) -> list[Turn]:
    """Alpaca: one instruction with an input (a list is choices A, B, C ...) and one output."""
    question, given = row.get("instruction"), row.get("input")
    if isinstance(given, Sequence) and not isinstance(given, str):
        given = "\n".join(f"{chr(ord('A') + n)}. {choice}" for n, choice in enumerate(given))
    if given and isinstance(question, str):
        question = f"{question}\n{given}"
    turns: list[Turn] = [("user", question), ("assistant", row.get("output"))]
    return [("system", row["system"]), *turns] if row.get("system") else turns


@dataclass(frozen=True)
class Format:
    """How rows of one format are read."""

    read: Callable[[Mapping[str, Any]], list[Turn]]
    """A row's turns."""
    columns: tuple[str, ...]
    """What it reads; `image` or `images` holds what fills the placeholders in the texts."""
    marked: bool = True
    """Whether each picture must have a placeholder; they go before the question otherwise."""


FORMATS = {
    "messages": Format(read_messages, ("messages", "image", "images")),
    "sharegpt": Format(read_sharegpt, ("conversations", "image", "images")),
    "alpaca": Format(
        read_alpaca, ("instruction", "input", "output", "system", "image", "images"), marked=False
    ),
}
"""Format name -> how its rows are read."""


def read_row(
    row: Mapping[str, Any], format_name: str, columns: Mapping[str, str], placeholder: str
) -> Messages:
    """The row's messages; `columns` says under which name a column of the format lies in the row.

    Raises:
        RowError: another format, wrong order of roles, an empty text, or a number of pictures
            that differs from the number of placeholders.
    """
    form = FORMATS[format_name]
    if columns:
        row = {**row, **{ours: row.get(theirs) for ours, theirs in columns.items()}}
    turns = form.read(row)
    _check_order([role for role, _ in turns])
    waiting = _pictures(row)
    given = len(waiting)
    messages = [
        {"role": role, "content": _parts(role, content, placeholder)} for role, content in turns
    ]
    marks = [part for message in messages for part in message["content"] if _waits(part)]
    if not marks and given and not form.marked:
        asked = next(message for message in messages if message["role"] == "user")
        marks = [{"type": "image", "image": None} for _ in waiting]
        asked["content"][:0] = marks
    if len(marks) != given:
        raise RowError(
            "image_count",
            f"{given} images for {len(marks)} placeholders {placeholder!r}; "
            "give one placeholder for each image.",
        )
    for part, picture in zip(marks, waiting, strict=True):
        part["image"] = picture
    for message in messages:
        _check_said(message)
    return messages


def _dicts(row: Mapping[str, Any], column: str) -> list[Mapping[str, Any]]:
    said = row.get(column)
    if not isinstance(said, list) or not said or not all(isinstance(m, Mapping) for m in said):
        raise RowError(
            "wrong_format",
            f"{column!r} is {_short(said)}, not a list of messages; the row has the columns "
            f"{', '.join(map(str, row)) or 'none'}: set `format` or `columns` of the source.",
        )
    return said


def _check_order(roles: Sequence[str]) -> None:
    spoken = roles[1:] if roles[0] == "system" else roles
    for role in roles:
        if role not in ("system", "user", "assistant"):
            raise RowError(
                "wrong_format", f"the role {role!r} is none of system, user and assistant."
            )
    if not spoken or list(spoken) != ["user", "assistant"] * (len(spoken) // 2):
        raise RowError(
            "role_order",
            f"the roles are {', '.join(roles)}; give a user and an assistant in turn, the "
            "assistant last, and at most one system message before them.",
        )


def _pictures(row: Mapping[str, Any]) -> list[Any]:
    """References to the pictures that fill the placeholders."""
    given = row.get("image") or row.get("images") or []
    found = [_reference(one) for one in (given if isinstance(given, list) else [given])]
    if any(not isinstance(one, str | bytes) for one in found):
        raise RowError("wrong_format", f"the image {_short(given)} is no path and no bytes.")
    return found


def _reference(given: Any) -> Any:
    """The bytes of `{"bytes", "path"}`, as `datasets` keeps pictures, or else its path."""
    return given.get("bytes") or given.get("path") if isinstance(given, Mapping) else given


def _parts(role: str, content: Any, placeholder: str) -> list[dict[str, Any]]:
    """The parts of a message; a picture that fills from the row is None as yet."""
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, list) or not all(isinstance(part, Mapping) for part in content):
        raise RowError("wrong_format", f"the {role} says {_short(content)}, which is no text.")
    parts: list[dict[str, Any]] = []
    for part in content:
        if part.get("type") == "text" and isinstance(part.get("text"), str):
            parts += _split(part["text"], placeholder)
        elif part.get("type") in ("image", "image_url"):
            parts.append({"type": "image", "image": _inline(part)})
        else:
            raise RowError(
                "wrong_format", f"the part {_short(dict(part))} is neither text nor image."
            )
    if role != "user" and any(part["type"] == "image" for part in parts):
        raise RowError("wrong_format", f"an image in what the {role} says; only users show images.")
    return parts


def _split(text: str, placeholder: str) -> list[dict[str, Any]]:
    """Text and picture parts; line breaks around a placeholder belong to neither."""
    if placeholder not in text:
        return [{"type": "text", "text": text}]
    parts: list[dict[str, Any]] = []
    for number, piece in enumerate(text.split(placeholder)):
        if number:
            parts.append({"type": "image", "image": None})
        if words := piece.strip("\n"):
            parts.append({"type": "text", "text": words})
    return parts


def _inline(part: Mapping[str, Any]) -> Any:
    """The reference that an image part carries itself, if any."""
    given = next(
        (part[key] for key in ("image", "path", "url", "image_url") if part.get(key)), None
    )
    if isinstance(given, Mapping) and "url" in given:
        given = given["url"]
    found = _reference(given)
    if found is not None and not isinstance(found, str | bytes):
        raise RowError("wrong_format", f"the image {_short(found)} is no path and no bytes.")
    return found


def _waits(part: Mapping[str, Any]) -> bool:
    return part["type"] == "image" and part["image"] is None


def _check_said(message: Mapping[str, Any]) -> None:
    role = message["role"]
    if not any(part["type"] == "text" and part["text"].strip() for part in message["content"]):
        if role == "user":
            raise RowError("empty_question", "the user says nothing; delete the row.")
        if role == "assistant":
            raise RowError("empty_answer", "the assistant says nothing; delete the row.")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
