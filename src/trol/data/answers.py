"""Where the assistant speaks in a conversation: one way for training, checks, measures and chat.

What is learnt from is exactly what the chat template makes of the whole conversation. Where the
template marks answers with `{% generation %}`, its marks hold. Otherwise the answers are found by
rendering twice more, once with stand-ins for all that is asked and once for all that is answered:
what stands between the stand-ins is what the template makes of each. An answer begins where a
prompt ends, and what ends its turn belongs to it.

What a chat template writes around the answers of a conversation, and how it wants to be told.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any
from weakref import WeakKeyDictionary

import torch
from transformers import ProcessorMixin

from trol.data.formats import RowError, row_errors
from trol.errors import DataError
from trol.host import chat_templates
from trol.host.chat_templates import Span

Messages = Sequence[Mapping[str, Any]]

STEM = "zqx"
"""What stand-ins are made of: letters alone, which no template trims, escapes or looks for."""


@dataclass(frozen=True)
class Frame:
    """What stands around an answer, from the question before to the question behind it."""

    place: int
    """Its number among the texts between questions."""
    before: str
    after: str
    opening: int
    """Characters of `before` behind which the assistant speaks: there a prompt ends."""
    closing: int
    """Characters of `after` that end the turn."""

    def span(self, text: str) -> Span:
        """Where the answer lies in the text between these two questions."""
        first = common(text, self.before)
        last = len(text) - common(text[first:][::-1], self.after[::-1])
        return min(first, self.opening), max(last, len(text) - len(self.after) + self.closing)


@dataclass(frozen=True)
class Form:
    """How a template wants conversations of one shape."""

    as_text: bool
    """Whether the content is a string, or a list of parts."""
    folded: bool
    """Whether the system message goes in front of the first question."""

    def told(self, messages: Messages) -> list[dict[str, Any]]:
        """The messages in this form."""
        told = [dict(message) for message in messages]
        if self.folded:
            system, told = told[0], told[1:]
            parts = [{"type": "text", "text": f"{said(system)}\n\n"}, *told[0]["content"]]
            told[0] = {**told[0], "content": parts}
        for message in told:
            if self.as_text and all(part["type"] == "text" for part in message["content"]):
                message["content"] = said(message)
        return told


def said(message: Mapping[str, Any]) -> str:
    """All words of a message."""
    return "".join(part["text"] for part in message["content"] if part["type"] == "text")


def stand_ins(messages: Messages, stem: str, sides: str = "qa") -> list[dict[str, Any]]:
    """The messages with a mark for each text of questions (`q`), of answers (`a`), or of both."""
    marked, count = [], 0
    for message in messages:
        side, parts = "a" if message["role"] == "assistant" else "q", []
        for part in message["content"]:
            count += 1
            stands = part["type"] == "text" and side in sides
            parts.append({"type": "text", "text": f"{stem}{side}{count}z"} if stands else part)
        marked.append({**message, "content": parts})
    return marked


def mark(stem: str, sides: str) -> str:
    """The pattern of these sides' marks."""
    return rf"{stem}[{sides}]\d+z"


def between(text: str, stem: str, sides: str) -> list[str]:
    """What stands between the marks of these sides."""
    return re.split(mark(stem, sides), text)


def lost(messages: Messages, text: str) -> str | None:
    """The role of a message that is not in the text, or of an answer that is there twice."""
    for message in messages:
        for part in message["content"]:
            times = text.count(part["text"]) if part["type"] == "text" else 1
            if not times or (times > 1 and message["role"] == "assistant"):
                return str(message["role"])
    return None


def placed(
    answered: Sequence[str], asked: Sequence[str], frames: Sequence[Frame], text: str
) -> list[Span] | None:
    """Where the answers lie; None if the text is not what is asked and answered put together.

    `answered` is what stands between questions, `asked` what stands between answers.
    """
    if len(asked) != len(frames) + 1 or frames[-1].place >= len(answered):
        return None
    spans, built, behind = [], "", ""
    for frame, question in zip(frames, asked, strict=False):
        room = len(question) - len(behind) - len(frame.before)
        if room < 0 or not (question.startswith(behind) and question.endswith(frame.before)):
            return None
        built += question[len(behind) : len(behind) + room]
        answer, behind = answered[frame.place], frame.after
        spans.append(tuple(len(built) + place for place in frame.span(answer)))
        built += answer
    return spans if built + asked[-1].removeprefix(behind) == text else None


def common(one: Sequence[Any], other: Sequence[Any]) -> int:
    """How many of their first characters or tokens are the same."""
    pairs = zip(one, other, strict=False)
    return next((at for at, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


_KNOWN: WeakKeyDictionary[Any, dict[tuple[Any, ...], tuple[Form, list[Frame]]]] = (
    WeakKeyDictionary()
)
"""Processor -> what its template writes around the answers of conversations of one shape."""


class Answers:
    """The answers that the chat template of a processor or a tokenizer leads to.

    A template without a place for a system message, or one that refuses it, gets its words in
    front of the first question. Where there is no template, `plain` text is written; else that
    is refused.
    """

    def __init__(self, processor: Any, *, plain: bool = False) -> None:
        if chat_templates.own_template(processor) is None and not plain:
            raise DataError(
                f"{type(processor).__name__} has no chat template; name a model that was trained "
                "on conversations, or give one: chat_template=FILE in a recipe or behind it, "
                "--chat-template, processor.chat_template in Python."
            )
        self.processor = processor
        self.sees = isinstance(processor, ProcessorMixin)
        self.tokenizer: Any = getattr(processor, "tokenizer", processor)
        self._known = _KNOWN.setdefault(processor, {})

    def encoded(
        self, conversations: Sequence[Messages], *, prompt: bool = False, padding: bool = False
    ) -> Any:
        """What the processor makes of conversations, and `assistant_masks`: 1 for answer tokens.

        Content is a list of parts. Padded batches are tensors [B, T], others lists; `prompt` ends
        each where the assistant is to speak.

        Raises:
            RowError: the template refuses a conversation, or no way finds its answers.
        """
        told, texts = [], []
        for conversation in conversations:
            messages, pieces = self.cut(conversation, prompt=prompt)
            told.append(messages)
            texts.append(pieces)
        form = {"padding": True, "return_tensors": "pt"} if padding else {"padding": False}
        batch = self._tokens(texts, told, **form)
        if "assistant_masks" not in batch:
            rows = zip(batch["input_ids"], texts, told, strict=True)
            batch["assistant_masks"] = [self._by_beginnings(*row) for row in rows]
        if padding:
            batch["assistant_masks"] = torch.as_tensor(batch["assistant_masks"])
        return batch

    def cut(self, messages: Messages, *, prompt: bool = False) -> tuple[Messages, list[str]]:
        """The conversation as it is told, and its text in pieces, every second one an answer.

        Raises:
            RowError: the template refuses it, or no way finds its answers.
        """
        messages = [_joined(one) if one["role"] == "assistant" else one for one in messages]
        bare = [{**one, "content": [_bare(part) for part in one["content"]]} for one in messages]
        if not self.sees and any(p["type"] == "image" for m in bare for p in m["content"]):
            raise RowError(
                "wrong_format",
                "it has a picture, but the host reads text alone: a tokenizer reads no pictures; "
                "take such rows out, or name a host that sees.",
            )
        self._check_words(bare)
        with row_errors():
            form, text, spans = self._found(bare, prompt)
        places = [0, *(place for span in spans for place in span), len(text)]
        pieces = [text[a:b] for a, b in pairwise(places)]
        return form.told(messages), pieces

    def _check_words(self, messages: Messages) -> None:
        """Refuses words that would be taken for a picture."""
        mark = getattr(self.processor, "image_token", None) if self.sees else None
        if mark and any(mark in said(message) for message in messages):
            raise RowError(
                "wrong_format",
                f"{mark!r} stands in its words, which is where the processor puts a picture; take "
                "it out, or name it as the `placeholder` of the source.",
            )

    def _found(self, messages: Messages, prompt: bool) -> tuple[Form, str, list[Span]]:
        """How the conversation is told, its text, and where the answers lie in it."""
        stem = STEM
        while any(stem in said(message) for message in messages):
            stem += "q"
        form, frames = self._frames(messages, stem, prompt)
        text, spans = self._text(form.told(messages), prompt)
        if chat_templates.marks_answers(self.processor) or not frames:
            return form, text, spans
        answered, asked = (
            between(self._text(form.told(stand_ins(messages, stem, side)), prompt)[0], stem, side)
            for side in "qa"
        )
        spans = placed(answered, asked, frames, text)
        return form, text, spans or self._by_appending(form.told(messages), text)

    def _text(self, told: Messages, prompt: bool = False) -> tuple[str, list[Span]]:
        return chat_templates.render(self.processor, told, prompt=prompt)

    # What the template writes around words, whatever the words are.

    def _frames(self, messages: Messages, stem: str, prompt: bool) -> tuple[Form, list[Frame]]:
        """The form that shows all that is said, and what it writes around each answer."""
        shape = tuple((m["role"], tuple(p["type"] for p in m["content"])) for m in messages)
        key = (shape, stem, prompt, chat_templates.template_of(self.processor))
        if key not in self._known:
            standing = stand_ins(messages, stem)
            form, text = self._form(standing, prompt)
            self._known[key] = form, self._framed(form.told(standing), text, stem, prompt)
        return self._known[key]

    def _form(self, standing: Messages, prompt: bool) -> tuple[Form, str]:
        """The first form in which everything said is there, each answer once; with its text."""
        system = len(standing) > 1 and standing[0]["role"] == "system"
        why: list[str] = []
        for folded in (False, True)[: 1 + system]:
            for as_text in (not self.sees, self.sees):
                form = Form(as_text, folded)
                try:
                    text, _ = self._text(form.told(standing), prompt)
                except DataError as error:
                    why.append(str(error))
                    continue
                if not (role := lost(standing, text)):
                    return form, text
                why.append(f"the chat template leaves out what the {role} says, or repeats it.")
        raise DataError(f"{why[0]} Set another template, or take such conversations out.")

    def _framed(self, told: Messages, text: str, stem: str, prompt: bool) -> list[Frame]:
        frames = []
        for place, part in enumerate(between(text, stem, "q")):
            answers = list(re.finditer(mark(stem, "a"), part))
            if not answers:
                continue
            before, after = part[: answers[0].start()], part[answers[-1].end() :]
            first, last = (_place(told, answers[end].group()) for end in (0, -1))
            asked = self._tail(told[:first], stem, prompt=True)
            opening = len(before) if asked is None else common(before, asked)
            closing = len(after)
            if last + 1 < len(told) or prompt:
                ended = self._tail(told[: last + 1], stem) or ""
                closing = self._whole_tokens(after, common(after, ended))
            frames.append(Frame(place, before, after, opening, closing))
        return frames

    def _tail(self, told: Messages, stem: str, *, prompt: bool = False) -> str | None:
        """What follows the last words, were these all messages; None if the template refuses."""
        try:
            return between(self._text(told, prompt)[0], stem, "qa")[-1]
        except DataError:
            return None

    def _whole_tokens(self, text: str, characters: int) -> int:
        """As many of the first characters of the text as are whole tokens."""
        if characters == len(text) or not self.tokenizer.is_fast:
            return characters
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ends = [end for _, end in encoded["offset_mapping"] if end <= characters]
        return max(ends, default=0)

    # The other ways, for what the first cannot do.

    def _by_appending(self, told: Messages, text: str) -> list[Span]:
        """Where the answers lie in the text if the template only ever appends."""
        spans = []
        for number, message in enumerate(told):
            if message["role"] != "assistant":
                continue
            first, _ = self._text(told[:number], True)
            last, _ = self._text(told[: number + 1])
            if not text.startswith(last) or not last.startswith(first):
                raise DataError(
                    "the chat template writes one turn otherwise because of another's words, so "
                    "its answers cannot be told from the rest; set a template that marks them "
                    "with {% generation %}, or take such conversations out."
                )
            spans.append((len(first), len(last)))
        return spans

    def _by_beginnings(self, ids: Any, pieces: Sequence[str], told: Messages) -> list[int]:
        """1 for answer tokens, told by how many tokens each beginning of the text is."""
        row = [int(token) for token in ids]
        speakers = [n for n, message in enumerate(told) if message["role"] == "assistant"]
        masks = [0] * len(row)
        for at in range(1, len(pieces), 2):
            shown = told[: speakers[at // 2]]  # a picture behind it is not in its text
            start, end = (self._length(row, pieces[:n], shown) for n in (at, at + 1))
            masks[start:end] = [1] * (end - start)
        return masks

    def _length(self, row: Sequence[int], pieces: Sequence[str], told: Messages) -> int:
        ids = self._tokens([["".join(pieces)]], [told], padding=False)["input_ids"][0]
        return common(list(row), [int(token) for token in ids])

    def _tokens(self, texts: Sequence[Sequence[str]], told: Sequence[Messages], **form: Any) -> Any:
        with row_errors(f"{type(self.processor).__name__} refuses it"):
            return chat_templates.encode_text(self.processor, texts, told, **form)


def check_learnt(tokens: int, answered: bool, most_tokens: int | None) -> None:
    """Raises `RowError` for a row in which nothing is learnt, or that is too long."""
    if not answered:
        raise RowError(
            "empty_answer",
            "the chat template makes no token of an answer; give a turn of the assistant's.",
        )
    if most_tokens is not None and tokens > most_tokens:
        raise RowError(
            "too_long",
            f"the conversation is {tokens} tokens long, but at most {most_tokens} are learnt from "
            "(max_tokens, or the positions that the model has); shorten the text, drop turns, or "
            "give fewer or smaller pictures.",
        )


def _joined(message: Any) -> dict[str, Any]:
    """An answer as one part, if it is several texts."""
    if any(part["type"] != "text" for part in message["content"]):
        return dict(message)
    return {**message, "content": [{"type": "text", "text": said(message)}]}


def _bare(part: Any) -> dict[str, Any]:
    """The part as far as templates read it: without a picture's pixels."""
    return {"type": "text", "text": part["text"]} if part["type"] == "text" else {"type": "image"}


def _place(told: Messages, words: str) -> int:
    return next(number for number, one in enumerate(told) if words in str(one["content"]))
