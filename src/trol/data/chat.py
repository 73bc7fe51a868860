"""Conversations to training rows: token ids, which of them are answer, and labels.

Messages are in the transformers format: `{"role": "user", "content": [{"type": "image"},
{"type": "text", "text": "..."}]}`; a plain string as content is one text. The chat template
marks what the assistant says with `{% generation %}`; those tokens are answer, all others
question.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from PIL import Image
from transformers import ProcessorMixin

from trol.data.damage import RowError
from trol.data.images import open_image
from trol.errors import DataError
from trol.host.processors import marks_answers_beside_pictures

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
    filled = fill(messages, images)
    sees = isinstance(processor, ProcessorMixin)
    if sees and _marks_wrongly(processor, filled):
        raise DataError(
            f"transformers {transformers.__version__} marks the wrong tokens as answer beside "
            "pictures; install transformers 5.18 or newer."
        )
    if not sees:
        filled = [_as_text(message) for message in filled]
    encoded: Any = processor.apply_chat_template(
        filled,
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
        add_generation_prompt=prompt,
    )
    ids, masks = _single(encoded["input_ids"]), _single(encoded["assistant_masks"])
    if not any(masks) and any(message["role"] == "assistant" for message in messages):
        raise DataError(
            "the chat template marks no token as answer; put {% generation %} ... "
            "{% endgeneration %} around what the assistant says in it."
        )
    _check_length(len(ids), most_tokens)
    pixels = encoded.get("pixel_values")
    stacked = None if pixels is None else torch.stack([torch.as_tensor(p) for p in pixels])
    return Row(ids, masks, stacked)


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


def _check_length(tokens: int, most_tokens: int | None) -> None:
    if most_tokens is not None and tokens > most_tokens:
        raise RowError(
            "too_long",
            f"the conversation is {tokens} tokens long, but the model has {most_tokens} "
            "positions; shorten the text, drop turns, or give fewer or smaller pictures.",
        )


def _marks_wrongly(processor: Any, filled: Sequence[Message]) -> bool:
    pictures = any(part["type"] == "image" for m in filled for part in m["content"])
    own = getattr(processor, "marks_answers_itself", False)
    return pictures and not own and not marks_answers_beside_pictures()


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


def _as_text(message: dict[str, Any]) -> dict[str, str]:
    """The message for a tokenizer, whose templates want the content as one string."""
    if any(part["type"] == "image" for part in message["content"]):
        raise DataError(
            "the conversation has a picture, but a tokenizer reads no pictures; "
            "give the processor of a model that does."
        )
    return {"role": message["role"], "content": "".join(p["text"] for p in message["content"])}


def _single(values: Any) -> list[int]:
    """One row of integers, whether or not the processor put it into a batch of one."""
    values = values.tolist() if isinstance(values, torch.Tensor) else list(values)
    return list(values[0]) if values and isinstance(values[0], Sequence) else values
