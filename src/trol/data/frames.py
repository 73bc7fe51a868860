"""What a chat template writes around the answers of a conversation, and how it wants to be told."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

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
