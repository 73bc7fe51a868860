"""Chat templates: the text that one makes of a conversation, the answers it marks, and its ids."""

import functools
import inspect
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jinja2 import TemplateSyntaxError
from transformers import ProcessorMixin
from transformers.utils.chat_template_utils import render_jinja_template

from trol.errors import DataError

Span = tuple[int, int]
"""First character and the one behind the last."""

PIECES = "pieces"
"""The key of a conversation's first message that `IN_PIECES` reads."""

IN_PIECES = (
    "{% for piece in messages[0]['pieces'] %}{% if loop.index0 is odd %}"
    "{% generation %}{{ piece }}{% endgeneration %}"
    "{% else %}{{ piece }}{% endif %}{% endfor %}"
)
"""A template that repeats a text which was rendered before, every second piece as an answer."""

_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")

PLAIN = (
    "{% for message in messages %}"
    "{% if message.content is string %}{{ message.content | trim }}"
    "{% else %}{{ message.content | map(attribute='text') | join | trim }}{% endif %}"
    "{{ '\n' }}{% endfor %}"
)
"""Each turn is a paragraph that ends with a line break, which is the end of an answer as well.
Models that were trained on text alone know no other mark."""

OFFSETS = "text_replacement_offsets"
"""What tells a processor where the text lies after it has put pictures into it."""

PASSES_ON = ("__call__", "_merge_kwargs")
"""Methods of processors that take these offsets, and do nothing with them."""


def template_fault(template: str) -> str | None:
    """The syntax error of a chat template, as transformers reads it, or None."""
    try:
        render_jinja_template([], chat_template=template)  # read, and filled with no conversation
    except TemplateSyntaxError as error:
        return f"{str(error.message).rstrip('.')} in line {error.lineno}"
    return None


def own_template(processor: Any) -> str | None:
    """The template of a processor or its tokenizer, the default one of several; None without."""
    for one in (processor, getattr(processor, "tokenizer", processor)):
        template = one.chat_template
        if template is not None:
            return template.get("default") if isinstance(template, Mapping) else template
    return None


def start_of(tokenizer: Any) -> list[int]:
    """The ids that the tokenizer puts before each text: its begin token, or nothing."""
    first = tokenizer("a")["input_ids"][:1]
    return list(first) if first == [tokenizer.bos_token_id] else []


def template_of(processor: Any) -> str:
    """A processor's own template, or `PLAIN` where it has none."""
    own = own_template(processor)
    if own is not None:
        return own
    start = start_of(getattr(processor, "tokenizer", processor))
    return ("{{ bos_token }}" if start else "") + PLAIN


def marks_answers(processor: Any) -> bool:
    """Whether the template itself marks the answers, by `{% generation %}`."""
    return bool(_MARK.search(template_of(processor)))


def render(
    processor: Any, messages: Sequence[Mapping[str, Any]], *, prompt: bool = False
) -> tuple[str, list[Span]]:
    """The text that the template makes of the messages, and where it marks answers.

    Raises:
        DataError: the template refuses the messages, or fails on them.
    """
    tokenizer = getattr(processor, "tokenizer", processor)
    try:
        rendered: Any = render_jinja_template(
            [[dict(message) for message in messages]],
            chat_template=template_of(processor),
            return_assistant_tokens_mask=marks_answers(processor),
            add_generation_prompt=prompt,
            **tokenizer.special_tokens_map,
        )
    except MemoryError:
        raise
    except Exception as error:  # templates are programs: they raise what they like
        reason = " ".join(str(error).split())
        raise DataError(f"the chat template refuses the conversation: {reason}.") from error
    (text,), spans = rendered
    return text, spans[0] if spans else []


@functools.cache
def marks_answers_beside_pictures() -> bool:
    """Whether `assistant_masks` count the tokens that pictures become.

    Where none but these two methods use the offsets, the masks are those of the text before the
    pictures were put in: wrong tokens, and no error.
    """
    uses = (
        name
        for name, method in vars(ProcessorMixin).items()
        if inspect.isfunction(method) and OFFSETS in inspect.getsource(method)
    )
    return bool(set(uses) - set(PASSES_ON))


def marks_by_offsets(processor: Any, messages: Sequence[Mapping[str, Any]]) -> bool:
    """Whether this transformers can tell which tokens the characters of a conversation became."""
    if not isinstance(processor, ProcessorMixin):
        return bool(processor.is_fast)
    own = getattr(processor, "marks_answers_itself", False)
    return own or bool(
        getattr(processor, "tokenizer").is_fast  # noqa: B009 - ProcessorMixin does not declare it
        and (marks_answers_beside_pictures() or not _has_pictures(messages))
    )


def encode_text(
    processor: Any, texts: Sequence[Sequence[str]], conversations: Any, **settings: Any
) -> Any:
    """Rendered conversations as ids, and `assistant_masks`: 1 for tokens of every second piece.

    Args:
        processor: a processor, or a tokenizer.
        texts: the pieces of each conversation's text.
        conversations: their messages, whose pictures a processor puts in.
        settings: `padding` and `return_tensors`.
    """
    if not isinstance(processor, ProcessorMixin):
        return _tokens(processor, texts, settings)
    kind = settings.get("return_tensors")
    in_pieces = [
        [{**one[0], PIECES: list(pieces)}, *one[1:]]
        for one, pieces in zip(conversations, texts, strict=True)
    ]
    masks = all(marks_by_offsets(processor, one) for one in in_pieces)
    encoded: Any = processor.apply_chat_template(
        in_pieces,
        chat_template=IN_PIECES,
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=masks,
        processor_kwargs={"padding": settings["padding"]},
        # With masks, some processors (Idefics3's for one) fail to turn the offsets into tensors.
        return_tensors=None if masks else kind,
    )
    for unread in ("offset_mapping", "text_replacement_offsets"):
        encoded.pop(unread, None)
    return encoded.convert_to_tensors(kind) if masks and kind else encoded


def _tokens(tokenizer: Any, texts: Sequence[Sequence[str]], settings: dict[str, Any]) -> Any:
    encoded = tokenizer(
        ["".join(pieces) for pieces in texts],
        add_special_tokens=False,
        return_offsets_mapping=tokenizer.is_fast,
        **settings,
    )
    if tokenizer.is_fast:
        rows = zip(encoded.pop("offset_mapping"), texts, strict=True)
        encoded["assistant_masks"] = [_answer_mask(offsets, pieces) for offsets, pieces in rows]
    return encoded


def _answer_mask(offsets: Any, pieces: Sequence[str]) -> list[int]:
    """1 for each token that has a character of an odd piece, else 0; padding has none."""
    odd = [character for at, piece in enumerate(pieces) for character in [at % 2] * len(piece)]
    # As numbers: to go through a tensor's elements costs more than all else here.
    return [int(any(odd[start:end])) for start, end in np.asarray(offsets).tolist()]


def _has_pictures(messages: Sequence[Mapping[str, Any]]) -> bool:
    parts = (p for m in messages if not isinstance(m["content"], str) for p in m["content"])
    return any(part["type"] == "image" for part in parts)
