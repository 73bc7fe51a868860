"""What processors of other families can do on this transformers."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from types import CodeType
from typing import Any

from jinja2 import TemplateSyntaxError
from transformers import ProcessorMixin
from transformers.utils.chat_template_utils import render_jinja_template

OFFSETS = "text_replacement_offsets"
"""By these, a processor knows where the text lies after pictures were put into it."""

PASSED_ON = ("__call__", "_merge_kwargs")
"""Methods that take them, and do nothing with them."""


@functools.cache
def marks_answers_beside_pictures() -> bool:
    """Whether answer spans of a chat are moved by the tokens that its pictures become.

    Where nothing but `__call__` knows of the offsets, `assistant_masks` beside pictures are those
    of the text before the pictures were put in: wrong tokens, without a word.
    """
    knowing = {name for name, method in vars(ProcessorMixin).items() if _mentions(method)}
    return bool(knowing - set(PASSED_ON))


def template_fault(template: str) -> str | None:
    """What is wrong with the syntax of a chat template, as transformers reads it; None if nothing.

    What a template makes of a conversation that it does not like is its own affair.
    """
    try:
        render_jinja_template([[{"role": "user", "content": "a"}]], chat_template=template)
    except TemplateSyntaxError as error:
        return f"{str(error.message).rstrip('.')} in line {error.lineno}"
    except Exception:  # it may call for anything that is not there
        return None
    return None


def _mentions(method: Any) -> bool:
    code = getattr(inspect.unwrap(method), "__code__", None) if callable(method) else None
    texts = () if code is None else _texts(code)
    return any(text.endswith(OFFSETS) for text in texts)


def _texts(code: CodeType) -> Iterator[str]:
    for constant in code.co_consts:
        if isinstance(constant, str):
            yield constant
        elif isinstance(constant, CodeType):
            yield from _texts(constant)
