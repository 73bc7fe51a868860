"""The formats that rows of training data come in, and what can be wrong with a row, by name.

A row becomes messages `{"role", "content"}` whose content is a list of parts, `{"type": "text",
"text"}` and `{"type": "image", "image"}`, where `image` is a path, an address, a data URL or the
bytes of a file: nothing is opened here.
"""

import warnings
from collections import defaultdict
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
"""Kind of damage -> its meaning."""


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
    """Turns every error in the block into a `RowError`; those without a kind are a wrong format."""
    try:
        yield
    except (RowError, MemoryError):
        raise
    except DataError as error:
        raise RowError("wrong_format", str(error)) from error
    except Exception as error:  # rows meet the templates and processors of many families
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise RowError("wrong_format", f"{what}: {reason}") from error


LOCATED = 3
"""Damaged rows of each kind whose places a warning says."""


def read_sound(
    path: object,
    rows: Iterable[tuple[Callable[[], str], Mapping[str, Any] | RowError]],
    read: Callable[[Mapping[str, Any]], Read],
    what: str,
) -> list[Read]:
    """The results of `read` for all rows without damage; a warning counts and places the others.

    Args:
        path: what holds the rows, for messages.
        rows: what says where a row lies, and the row there or what is wrong with it.
        read: makes of a row what is wanted.
        what: what the rows should be.

    Raises:
        DataError: every row is damaged.
    """
    results: list[Read] = []
    damaged: dict[str, list[Callable[[], str]]] = defaultdict(list)
    first = None
    for place, row in rows:
        try:
            if isinstance(row, RowError):
                raise row
            results.append(read(row))
        except RowError as error:
            damaged[error.kind].append(place)
            first = first or f"{place()}: {error}"
    if not results:
        raise DataError(f"{path} has no sound row of {what}: {first or 'it is empty.'}")
    if damaged:
        parts = (f"{len(found)} {kind} ({_places(found)})" for kind, found in damaged.items())
        warnings.warn(
            f"rows of {path} left out: {', '.join(parts)}; {len(results)} sound ones are used "
            f"(the first damaged one is {first})",
            stacklevel=4,
        )
    return results


def _places(places: Sequence[Callable[[], str]]) -> str:
    more = ["..."] if len(places) > LOCATED else []
    return ", ".join([*(place() for place in places[:LOCATED]), *more])


Messages = list[dict[str, Any]]
Turn = tuple[str, Any]
"""Role, and a text or a list of parts."""


def text_of(message: Mapping[str, Any]) -> str:
    """All text of a message, pictures left out."""
    return "".join(part["text"] for part in message["content"] if part["type"] == "text")


def read_messages(row: Mapping[str, Any]) -> list[Turn]:
    """OpenAI messages: role, and a text or a list of text and image parts."""
    messages = _dicts(row, "messages")
    if any(message.get("tool_calls") for message in messages):
        raise RowError("wrong_format", "it calls tools, which is not trained on; take it out.")
    return [(str(m.get("role")), m.get("content")) for m in messages]


SPEAKERS = {"human": "user", "gpt": "assistant"}
"""ShareGPT's name of a role -> ours, where they differ."""


def read_sharegpt(row: Mapping[str, Any]) -> list[Turn]:
    """ShareGPT, LLaVA and ShareGPT4V conversations: `from` and `value`."""
    turns = [(str(m.get("from")), m.get("value")) for m in _dicts(row, "conversations")]
    return [(SPEAKERS.get(role, role), content) for role, content in turns]


def read_alpaca(row: Mapping[str, Any]) -> list[Turn]:
    """Alpaca: one instruction with an input (a list is choices A, B, C ...) and one output."""
    question, details = row.get("instruction"), row.get("input")
    if isinstance(details, Sequence) and not isinstance(details, str):
        details = "\n".join(f"{chr(ord('A') + n)}. {choice}" for n, choice in enumerate(details))
    if details and isinstance(question, str):
        question = f"{question}\n{details}"
    turns: list[Turn] = [("user", question), ("assistant", row.get("output"))]
    return [("system", row["system"]), *turns] if row.get("system") else turns


@dataclass(frozen=True)
class Format:
    """One row format."""

    read: Callable[[Mapping[str, Any]], list[Turn]]
    """A row's turns."""
    columns: tuple[str, ...]
    """The columns that it reads; the pictures for the placeholders are in `image` or `images`."""
    needs_placeholders: bool = True
    """Whether a picture without a placeholder is an error; else it goes before the question."""


FORMATS = {
    "messages": Format(read_messages, ("messages", "image", "images")),
    "sharegpt": Format(read_sharegpt, ("conversations", "image", "images")),
    "alpaca": Format(
        read_alpaca,
        ("instruction", "input", "output", "system", "image", "images"),
        needs_placeholders=False,
    ),
}
"""The formats by name."""


def read_row(
    row: Mapping[str, Any], format_name: str, columns: Mapping[str, str], placeholder: str
) -> Messages:
    """The row's messages; `columns` maps a column of the format to its name in the row.

    Raises:
        RowError: another format, wrong order of roles, an empty text, or a number of pictures
            that differs from the number of placeholders.
    """
    form = FORMATS[format_name]
    if columns:
        row = {**row, **{ours: row.get(theirs) for ours, theirs in columns.items()}}
    turns = form.read(row)
    _check_order([role for role, _ in turns])
    pictures = _pictures(row)
    messages = [
        {"role": role, "content": _parts(role, content, placeholder)} for role, content in turns
    ]
    parts = [part for message in messages for part in message["content"]]
    empty = [part for part in parts if part["type"] == "image" and part["image"] is None]
    if not empty and pictures and not form.needs_placeholders:
        empty = [{"type": "image", "image": None} for _ in pictures]
        next(m for m in messages if m["role"] == "user")["content"][:0] = empty
    if len(empty) != len(pictures):
        raise RowError(
            "image_count",
            f"{len(pictures)} images for {len(empty)} placeholders {placeholder!r}; "
            "give one placeholder for each image.",
        )
    for part, picture in zip(empty, pictures, strict=True):
        part["image"] = picture
    for message in messages:
        if not text_of(message).strip() and message["role"] == "user":
            raise RowError("empty_question", "the user says nothing; delete the row.")
        if not text_of(message).strip() and message["role"] == "assistant":
            raise RowError("empty_answer", "the assistant says nothing; delete the row.")
    return messages


def _dicts(row: Mapping[str, Any], column: str) -> list[Mapping[str, Any]]:
    value = row.get(column)
    if not isinstance(value, list) or not value or not all(isinstance(m, Mapping) for m in value):
        raise RowError(
            "wrong_format",
            f"{column!r} is {_short(value)}, not a list of messages; the row has the columns "
            f"{', '.join(map(str, row)) or 'none'}: set `format` or `columns` of the source.",
        )
    return value


def _check_order(roles: Sequence[str]) -> None:
    turns = list(roles[1:] if roles[0] == "system" else roles)
    for role in roles:
        if role not in ("system", "user", "assistant"):
            raise RowError(
                "wrong_format", f"the role {role!r} is none of system, user and assistant."
            )
    if not turns or turns != ["user", "assistant"] * (len(turns) // 2):
        raise RowError(
            "role_order",
            f"the roles are {', '.join(roles)}; give a user and an assistant in turn, the "
            "assistant last, and at most one system message before them.",
        )


def _pictures(row: Mapping[str, Any]) -> list[Any]:
    """References to the pictures that fill the placeholders."""
    value = row.get("image") or row.get("images") or []
    return [_reference(one) for one in (value if isinstance(value, list) else [value])]


def _reference(value: Any, *, needed: bool = True) -> str | bytes | None:
    """A path, an address, or bytes; `datasets` keeps pictures as `{"bytes", "path"}`."""
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    if not isinstance(value, str | bytes) and (needed or value is not None):
        raise RowError("wrong_format", f"the image {_short(value)} is no path and no bytes.")
    return value


def _parts(role: str, content: Any, placeholder: str) -> list[dict[str, Any]]:
    """The parts of a message; `image` is None where one of the row's pictures belongs."""
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


def _inline(part: Mapping[str, Any]) -> str | bytes | None:
    """The reference that an image part carries itself, if any."""
    keys = ("image", "path", "url", "image_url")
    value = next((part[key] for key in keys if part.get(key)), None)
    if isinstance(value, Mapping) and "url" in value:
        value = value["url"]
    return _reference(value, needed=False)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
