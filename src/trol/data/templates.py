"""Chat templates that somebody names."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from trol.errors import UsageError, unknown
from trol.host.processors import template_fault


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
