"""Conversations to training rows: token ids, which of them are answer, and labels.

Messages are in the transformers format: `{"role": "user", "content": [{"type": "image"},
{"type": "text", "text": "..."}]}`; a plain string as content is one text. What the assistant says
is answer (`trol.data.answers`), all other tokens are question.

Rows to one padded batch; rows may have any number of pictures, or none.

Mixtures and pairs as torch datasets, of token rows or of messages.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from PIL import Image
from torch.utils.data import Dataset

from trol.data.answers import Answers, check_learnt
from trol.data.images import open_image
from trol.data.mixture import Mixture
from trol.data.own_files import Pair
from trol.errors import DataError, UsageError

ROLES = ("system", "user", "assistant")
"""The roles that a message can have."""

IGNORED = -100
"""The label of a token that no loss is taken from."""

Message = Mapping[str, Any]


@dataclass(frozen=True)
class Row:
    """One conversation, ready for the collator."""

    input_ids: list[int]
    """Token ids, T of them."""
    assistant_masks: list[int]
    """1 = answer token, 0 = question token; T of them."""
    pixel_values: torch.Tensor | None = None
    """Pictures of this row [N, ...] in order of appearance; None for text alone."""

    @property
    def labels(self) -> list[int]:
        """The ids of answer tokens, `IGNORED` elsewhere (unshifted, as transformers wants)."""
        pairs = zip(self.input_ids, self.assistant_masks, strict=True)
        return [token if answer else IGNORED for token, answer in pairs]


def turns(
    pairs: Sequence[tuple[str, str]], *, image: bool = False, system: str | None = None
) -> list[dict[str, Any]]:
    """(question, answer) pairs as one conversation, the picture in the first question."""
    messages: list[dict[str, Any]] = []
    if system is not None:
        messages.append({"role": "system", "content": [{"type": "text", "text": system}]})
    for number, (question, answer) in enumerate(pairs):
        content: list[dict[str, Any]] = [{"type": "text", "text": question}]
        if image and number == 0:
            content.insert(0, {"type": "image"})
        messages.append({"role": "user", "content": content})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return messages


def encode(
    processor: Any,
    messages: Sequence[Message],
    images: Sequence[Image.Image | str] = (),
    *,
    most_tokens: int | None = None,
    prompt: bool = False,
) -> Row:
    """The conversation as a row, through the template of a processor or a tokenizer.

    `images` fill the `{"type": "image"}` placeholders in order; `most_tokens` is the number of
    positions that the model has; `prompt` ends the row where the assistant is to speak.
    """
    batch = Answers(processor).encoded([fill(messages, images)], prompt=prompt)
    (ids,), (masks,) = batch["input_ids"], batch["assistant_masks"]
    speaks = any(message["role"] == "assistant" for message in messages)
    check_learnt(len(ids), any(masks) or not speaks, most_tokens)
    pixels = batch.get("pixel_values")
    stacked = None if pixels is None else torch.stack([torch.as_tensor(p) for p in pixels])
    return Row(list(ids), list(masks), stacked)


def fill(
    messages: Sequence[Message], images: Sequence[Image.Image | str] = ()
) -> list[dict[str, Any]]:
    """The checked conversation: content always a list, every placeholder with its picture."""
    if not messages:
        raise DataError("the conversation is empty; give at least one user message.")
    waiting = list(images)
    filled = [
        {"role": _role(message), "content": [_fill_part(part, waiting) for part in _parts(message)]}
        for message in messages
    ]
    if waiting:
        raise DataError(
            f"{len(images)} pictures given for {len(images) - len(waiting)} image placeholders; "
            'add {"type": "image"} to a message for each picture, or give fewer.'
        )
    for message in filled:
        words = [part["text"] for part in message["content"] if part["type"] == "text"]
        if message["role"] == "user" and not "".join(words).strip():
            raise DataError("the question is empty; write what you want to know.")
    return filled


def _role(message: Message) -> str:
    role = message.get("role")
    if role not in ROLES:
        raise DataError(f"a message has the role {role!r}; use one of {', '.join(ROLES)}.")
    return str(role)


def _parts(message: Message) -> list[Mapping[str, Any]]:
    content = message.get("content")
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if not isinstance(content, Sequence):
        raise DataError(
            f"a message of the {message['role']} has the content {content!r}; "
            'give a text, or a list of {"type": "text"} and {"type": "image"} parts.'
        )
    return list(content)


def _fill_part(part: Mapping[str, Any], waiting: list[Image.Image | str]) -> dict[str, Any]:
    """One part, checked; a placeholder without a picture takes the next that waits."""
    kind = part.get("type")
    if kind == "text" and isinstance(part.get("text"), str):
        return {"type": "text", "text": part["text"]}
    if kind != "image":
        raise DataError(
            f'the part {dict(part)!r} is neither {{"type": "text", "text": ...}} nor '
            '{"type": "image"}; trol reads texts and pictures.'
        )
    given = next((part[key] for key in ("image", "path", "url") if part.get(key)), None)
    if given is None and not waiting:
        raise DataError(
            "an image placeholder has no picture; give one picture per placeholder, "
            "or take the placeholder out."
        )
    return {"type": "image", "image": open_image(waiting.pop(0) if given is None else given)}


@dataclass(frozen=True)
class Collator:
    """Pads rows of T_i tokens to one batch of B rows and T = max T_i tokens.

    Gives `input_ids`, `attention_mask`, `labels`, `assistant_masks` [B, T] (int64) and, where
    any row has pictures, `pixel_values` [N, ...]: those of all rows, in row order, a row's
    pictures being any number of tiles each.
    """

    pad_token_id: int
    """What padding positions hold."""
    padding_side: Literal["left", "right"] = "right"
    """Where padding goes: right to train, left to generate."""
    multiple: int = 1
    """T is rounded up to a multiple of this many tokens."""

    def __post_init__(self) -> None:
        if self.padding_side not in ("left", "right"):
            raise UsageError(f"padding_side is {self.padding_side!r}; use 'left' or 'right'.")

    def __call__(self, rows: Sequence[Row]) -> dict[str, torch.Tensor]:
        """The batch of these rows."""
        if not rows:
            raise DataError("a batch needs at least one row, got none.")

        def stacked(lists: Sequence[Sequence[int]], fill: int) -> torch.Tensor:
            return padded(lists, fill, side=self.padding_side, multiple=self.multiple)

        batch = {
            "input_ids": stacked([row.input_ids for row in rows], self.pad_token_id),
            "attention_mask": stacked([[1] * len(row.input_ids) for row in rows], 0),
            "labels": stacked([row.labels for row in rows], IGNORED),
            "assistant_masks": stacked([row.assistant_masks for row in rows], 0),
        }
        pictures = [row.pixel_values for row in rows if row.pixel_values is not None]
        if pictures:
            if len(shapes := {tuple(part.shape[1:]) for part in pictures}) > 1:
                raise DataError(
                    f"the pictures of one batch have the shapes {sorted(shapes)}; use an image "
                    "processor that resizes all pictures, or all their tiles, to one size."
                )
            batch["pixel_values"] = torch.cat(pictures)
        return batch


def padded(
    rows: Sequence[Sequence[int]],
    fill: int,
    *,
    side: Literal["left", "right"] = "right",
    multiple: int = 1,
) -> torch.Tensor:
    """Rows of T_i integers as [B, T] (int64), `fill` on one side; T is a multiple of `multiple`."""
    width = -(-max(len(row) for row in rows) // multiple) * multiple
    if side == "left":
        return torch.tensor([[*(fill,) * (width - len(row)), *row] for row in rows])
    return torch.tensor([[*row, *(fill,) * (width - len(row))] for row in rows])


@dataclass(frozen=True)
class MixtureRows(Dataset[Row]):
    """Item i is conversation i of the mixture, encoded; nothing is read before it is asked for."""

    mixture: Mixture
    processor: Any
    """A processor, or a tokenizer where no row has pictures."""
    most_tokens: int | None = None
    """Positions that the model has; a longer row is a `RowError`."""

    def __len__(self) -> int:
        return len(self.mixture)

    def __getitem__(self, number: int) -> Row:
        part, place = self.mixture.place(number)
        with self.mixture.naming(number):
            return encode(self.processor, part.messages(place), most_tokens=self.most_tokens)


@dataclass(frozen=True)
class PairRows(Dataset[Row]):
    """Item i is pair i, encoded; kept once it is made."""

    pairs: Sequence[Pair]
    tokenizer: Any
    most_tokens: int | None = None
    """Positions that the model has; a longer row is a `RowError`."""
    made: dict[int, Row] = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, number: int) -> Row:
        if number not in self.made:
            messages = self.pairs[number].messages()
            self.made[number] = encode(self.tokenizer, messages, most_tokens=self.most_tokens)
        return self.made[number]


@dataclass(frozen=True)
class PairMessages(Dataset[list[dict[str, Any]]]):
    """Item i is pair i as messages."""

    pairs: Sequence[Pair]

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, number: int) -> list[dict[str, Any]]:
        return self.pairs[number].messages()
