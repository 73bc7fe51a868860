"""Where the answers are in a conversation, by the chat template of a processor or tokenizer.

Training, checks, measurements and chat all encode conversations here, as exactly the text that the
template renders. Where the template marks answers with `{% generation %}`, its marks hold.
Otherwise the conversation is rendered twice more, once with stand-ins for all questions and once
for all answers: the text between the stand-ins is what the template makes of the other role. An
answer begins where a prompt would end, and includes the end of its turn.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any
from weakref import WeakKeyDictionary

import torch
from transformers import ProcessorMixin

from trol.data.formats import RowError, row_errors, text_of
from trol.errors import DataError
from trol.host import chat_templates
from trol.host.chat_templates import Span

Messages = Sequence[Mapping[str, Any]]

STEM = "zqx"
"""Begins each stand-in: letters alone, which no template trims, escapes or looks for."""


@dataclass(frozen=True)
class Frame:
    """The text that a template writes around an answer, from one question to the next."""

    place: int
    """The answer's number among the texts between questions."""
    before: str
    after: str
    opening: int
    """Characters of `before` up to the end of a prompt, where the assistant begins."""
    closing: int
    """Characters of `after` that end the assistant's turn."""

    def span(self, text: str) -> Span:
        """First and last place of the answer in the text between these two questions."""
        first = common_length(text, self.before)
        last = len(text) - common_length(text[first:][::-1], self.after[::-1])
        return min(first, self.opening), max(last, len(text) - len(self.after) + self.closing)


@dataclass(frozen=True)
class Form:
    """The form in which a template takes conversations."""

    as_text: bool
    """Whether content is a string; else it is a list of parts."""
    folded: bool
    """Whether the system message is put in front of the first question."""

    def apply(self, messages: Messages) -> list[dict[str, Any]]:
        """The messages in this form."""
        formed = [dict(message) for message in messages]
        if self.folded:
            system, formed = formed[0], formed[1:]
            parts = [{"type": "text", "text": f"{text_of(system)}\n\n"}, *formed[0]["content"]]
            formed[0] = {**formed[0], "content": parts}
        for message in formed:
            if self.as_text and all(part["type"] == "text" for part in message["content"]):
                message["content"] = text_of(message)
        return formed


def stand_ins(messages: Messages, stem: str, roles: str = "qa") -> list[dict[str, Any]]:
    """The messages, each text of a question (`q`) or an answer (`a`) replaced by a stand-in."""
    replaced, count = [], 0
    for message in messages:
        role, parts = "a" if message["role"] == "assistant" else "q", []
        for part in message["content"]:
            count += 1
            stands = part["type"] == "text" and role in roles
            parts.append({"type": "text", "text": f"{stem}{role}{count}z"} if stands else part)
        replaced.append({**message, "content": parts})
    return replaced


def between(text: str, stem: str, roles: str) -> list[str]:
    """The texts between the stand-ins of these roles."""
    return re.split(rf"{stem}[{roles}]\d+z", text)


def misplaced(messages: Messages, text: str) -> str | None:
    """The role of the first message that the text lacks, or of an answer that it has twice."""
    for message in messages:
        for part in message["content"]:
            times = text.count(part["text"]) if part["type"] == "text" else 1
            if not times or (times > 1 and message["role"] == "assistant"):
                return str(message["role"])
    return None


def spans_of(
    answers: Sequence[str], questions: Sequence[str], frames: Sequence[Frame], text: str
) -> list[Span] | None:
    """The spans of the answers; None where these pieces do not add up to the text.

    `answers` are the texts between questions, `questions` those between answers.
    """
    if len(questions) != len(frames) + 1 or frames[-1].place >= len(answers):
        return None
    spans, built, behind = [], "", ""
    for frame, question in zip(frames, questions, strict=False):
        room = len(question) - len(behind) - len(frame.before)
        if room < 0 or not (question.startswith(behind) and question.endswith(frame.before)):
            return None
        built += question[len(behind) : len(behind) + room]
        answer, behind = answers[frame.place], frame.after
        spans.append(tuple(len(built) + place for place in frame.span(answer)))
        built += answer
    return spans if built + questions[-1].removeprefix(behind) == text else None


def common_length(one: Sequence[Any], other: Sequence[Any]) -> int:
    """The number of first characters or tokens that are the same."""
    pairs = zip(one, other, strict=False)
    return next((at for at, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


_KNOWN: WeakKeyDictionary[Any, dict[tuple[Any, ...], tuple[Form, list[Frame]]]] = (
    WeakKeyDictionary()
)
"""Processor -> form and frames by the shape of a conversation."""


class Answers:
    """Encodes conversations and marks the answers in them.

    A template that refuses or drops a system message gets its words in front of the first question.

    Args:
        processor: a processor or a tokenizer.
        plain: whether one without a chat template writes plain text; else it is refused.

    Raises:
        DataError: there is no chat template.
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
        """The processor's encoding of conversations, with `assistant_masks`: 1 for answer tokens.

        Content is a list of parts. Padded batches are tensors [B, T], others lists; `prompt` ends
        each conversation where the assistant is to answer.

        Raises:
            RowError: the template refuses a conversation, or its answers cannot be located.
        """
        cut = [self.cut(conversation, prompt=prompt) for conversation in conversations]
        formed, texts = [messages for messages, _ in cut], [pieces for _, pieces in cut]
        settings = {"padding": True, "return_tensors": "pt"} if padding else {"padding": False}
        batch = self._tokens(texts, formed, **settings)
        if "assistant_masks" not in batch:
            rows = zip(batch["input_ids"], texts, formed, strict=True)
            batch["assistant_masks"] = [self._by_beginnings(*row) for row in rows]
        if padding:
            batch["assistant_masks"] = torch.as_tensor(batch["assistant_masks"])
        return batch

    def cut(self, messages: Messages, *, prompt: bool = False) -> tuple[Messages, list[str]]:
        """The conversation in the template's form, and its text in pieces, the odd ones answers.

        Raises:
            RowError: the template refuses it, or its answers cannot be located.
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
            form, text, spans = self._located(bare, prompt)
        places = [0, *(place for span in spans for place in span), len(text)]
        return form.apply(messages), [text[a:b] for a, b in pairwise(places)]

    def _check_words(self, messages: Messages) -> None:
        """Refuses words that would be taken for a picture."""
        token = getattr(self.processor, "image_token", None) if self.sees else None
        if token and any(token in text_of(message) for message in messages):
            raise RowError(
                "wrong_format",
                f"{token!r} stands in its words, which is where the processor puts a picture; take "
                "it out, or name it as the `placeholder` of the source.",
            )

    def _located(self, messages: Messages, prompt: bool) -> tuple[Form, str, list[Span]]:
        """The form of the conversation, its text, and the spans of the answers in it."""
        stem = STEM
        while any(stem in text_of(message) for message in messages):
            stem += "q"
        form, frames = self._frames(messages, stem, prompt)
        text, marked = self._text(form.apply(messages), prompt)
        if chat_templates.marks_answers(self.processor) or not frames:
            return form, text, marked
        answers, questions = (
            between(self._text(form.apply(stand_ins(messages, stem, r)), prompt)[0], stem, r)
            for r in "qa"
        )
        spans = spans_of(answers, questions, frames, text)
        return form, text, spans or self._by_appending(form.apply(messages), text)

    def _text(self, messages: Messages, prompt: bool = False) -> tuple[str, list[Span]]:
        return chat_templates.render(self.processor, messages, prompt=prompt)

    # The text that the template writes around messages, whatever they say.

    def _frames(self, messages: Messages, stem: str, prompt: bool) -> tuple[Form, list[Frame]]:
        """The form in which no message is lost, and the frame of each answer."""
        shape = tuple((m["role"], tuple(p["type"] for p in m["content"])) for m in messages)
        key = (shape, stem, prompt, chat_templates.template_of(self.processor))
        if key not in self._known:
            standing = stand_ins(messages, stem)
            form, text = self._form(standing, prompt)
            self._known[key] = form, self._framed(form.apply(standing), text, stem, prompt)
        return self._known[key]

    def _form(self, standing: Messages, prompt: bool) -> tuple[Form, str]:
        """The first form whose text has every message, and each answer once; with that text."""
        system = len(standing) > 1 and standing[0]["role"] == "system"
        reasons: list[str] = []
        for folded in (False, True)[: 1 + system]:
            for as_text in (not self.sees, self.sees):
                form = Form(as_text, folded)
                try:
                    text, _ = self._text(form.apply(standing), prompt)
                except DataError as error:
                    reasons.append(str(error))
                    continue
                if not (role := misplaced(standing, text)):
                    return form, text
                reasons.append(f"the chat template leaves out what the {role} says, or repeats it.")
        raise DataError(f"{reasons[0]} Set another template, or take such conversations out.")

    def _framed(self, standing: Messages, text: str, stem: str, prompt: bool) -> list[Frame]:
        """The frames in a text whose messages are all stand-ins."""
        frames = []
        for place, part in enumerate(between(text, stem, "q")):
            answers = list(re.finditer(rf"{stem}a\d+z", part))
            if not answers:
                continue
            before, after = part[: answers[0].start()], part[answers[-1].end() :]
            first, last = (_number_of(standing, answers[end].group()) for end in (0, -1))
            prompted = self._tail(standing[:first], stem, prompt=True)
            opening = len(before) if prompted is None else common_length(before, prompted)
            closing = len(after)
            if last + 1 < len(standing) or prompt:
                ended = self._tail(standing[: last + 1], stem) or ""
                closing = self._whole_tokens(after, common_length(after, ended))
            frames.append(Frame(place, before, after, opening, closing))
        return frames

    def _tail(self, standing: Messages, stem: str, *, prompt: bool = False) -> str | None:
        """The text behind the last of these messages alone; None if the template refuses them."""
        try:
            return between(self._text(standing, prompt)[0], stem, "qa")[-1]
        except DataError:
            return None

    def _whole_tokens(self, text: str, characters: int) -> int:
        """The number of characters, rounded down to whole tokens of the text."""
        if characters == len(text) or not self.tokenizer.is_fast:
            return characters
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ends = [end for _, end in encoded["offset_mapping"] if end <= characters]
        return max(ends, default=0)

    # For templates that depend on the words, and tokenizers that know no places.

    def _by_appending(self, messages: Messages, text: str) -> list[Span]:
        """The spans of the answers if the template only ever appends."""
        spans = []
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            first, _ = self._text(messages[:number], True)
            last, _ = self._text(messages[: number + 1])
            if not text.startswith(last) or not last.startswith(first):
                raise DataError(
                    "the chat template writes one turn otherwise because of another's words, so "
                    "its answers cannot be told from the rest; set a template that marks them "
                    "with {% generation %}, or take such conversations out."
                )
            spans.append((len(first), len(last)))
        return spans

    def _by_beginnings(self, ids: Any, pieces: Sequence[str], messages: Messages) -> list[int]:
        """1 for answer tokens, from the number of tokens of each beginning of the text."""
        row = [int(token) for token in ids]
        speakers = [n for n, message in enumerate(messages) if message["role"] == "assistant"]
        masks = [0] * len(row)
        for at in range(1, len(pieces), 2):
            shown = messages[: speakers[at // 2]]  # a picture behind it is not in its text
            start, end = (self._length(row, pieces[:n], shown) for n in (at, at + 1))
            masks[start:end] = [1] * (end - start)
        return masks

    def _length(self, row: Sequence[int], pieces: Sequence[str], messages: Messages) -> int:
        ids = self._tokens([["".join(pieces)]], [messages], padding=False)["input_ids"][0]
        return common_length(row, [int(token) for token in ids])

    def _tokens(
        self, texts: Sequence[Sequence[str]], conversations: Sequence[Messages], **settings: Any
    ) -> Any:
        with row_errors(f"{type(self.processor).__name__} refuses it"):
            return chat_templates.encode_text(self.processor, texts, conversations, **settings)


def _joined(message: Any) -> dict[str, Any]:
    """An answer as one part, if it is several texts."""
    if any(part["type"] != "text" for part in message["content"]):
        return dict(message)
    return {**message, "content": [{"type": "text", "text": text_of(message)}]}


def _bare(part: Any) -> dict[str, Any]:
    """The part as templates read it: a picture without its pixels."""
    return {"type": "text", "text": part["text"]} if part["type"] == "text" else {"type": "image"}


def _number_of(messages: Messages, words: str) -> int:
    return next(number for number, one in enumerate(messages) if words in str(one["content"]))
