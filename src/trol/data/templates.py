"""Which chat template a conversation is written by: a processor's own, or plain text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trol.errors import UsageError, unknown
from trol.host.processors import template_fault

PLAIN = (
    "{% for message in messages %}"
    "{% if message.content is string %}{{ message.content | trim }}"
    "{% else %}{{ message.content | map(attribute='text') | join | trim }}{% endif %}"
    "{{ '\n' }}{% endfor %}"
)
"""Each turn is a paragraph that ends with a line break, which is the end of an answer as well.
Models that were trained on text alone know no other mark."""


def own_template(processor: Any) -> Any:
    """The chat template of a processor or its tokenizer; None where there is none."""
    return processor.chat_template or getattr(processor, "tokenizer", processor).chat_template


def templating(processor: Any) -> dict[str, Any]:
    """What `apply_chat_template` must be told: nothing where the processor has a template."""
    if processor.chat_template is not None:
        return {}
    tokenizer = getattr(processor, "tokenizer", processor)
    begin = "{{ bos_token }}" if start_of(tokenizer) else ""
    return {"chat_template": own_template(processor) or begin + PLAIN}


def start_of(tokenizer: Any) -> list[int]:
    """The ids that the tokenizer puts before each text: a mark of its beginning, or nothing."""
    first = tokenizer("a")["input_ids"][:1]
    return list(first) if first == [tokenizer.bos_token_id] else []


def read_template(given: str, known: Sequence[str] = ()) -> str:
    """A chat template that somebody names: its text in Jinja, or a file that holds it.

    Raises:
        UsageError: it is neither, nor one of the names `known`, or its syntax is wrong.
    """
    if "{" not in given and not Path(given).is_file():
        if known:
            raise unknown("chat_template", given, (*known, "FILE"))
        raise UsageError(
            f"there is no file {given!r} to read a chat template from, and it is no template "
            "itself: that is Jinja, with {{ }} and {% %}."
        )
    text = given
    if "{" not in given:
        try:
            text = Path(given).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"cannot read a chat template from {given!r}: {error}") from error
    fault = template_fault(text)
    if fault is not None:
        raise UsageError(f"the chat template {given!r} is not well formed: {fault}.")
    return text
