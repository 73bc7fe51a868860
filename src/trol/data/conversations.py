"""Conversations for any processor or tokenizer: batches in the host's own form, answers marked.

Chat templates that somebody names.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset

from trol.data.answers import Answers, Messages, check_learnt
from trol.data.chat import IGNORED
from trol.data.mixture import Mixture
from trol.errors import UsageError, unknown
from trol.host.chat_templates import template_fault


@dataclass(frozen=True)
class Conversations(Dataset[Messages]):
    """Item i is the messages of conversation i, its pictures opened."""

    mixture: Mixture

    def __len__(self) -> int:
        return len(self.mixture)

    def __getitem__(self, number: int) -> Messages:
        return self.mixture.conversation(number)


class ConversationCollator:
    """Conversations through a processor's own chat template and batching, padded on the right.

    Args:
        processor: a processor or a tokenizer.
        most_tokens: a longer conversation is a `RowError`.
        plain: whether one without a chat template writes plain text; else it is refused.
        last: whether only what the assistant says last is answer.
    """

    def __init__(
        self,
        processor: Any,
        *,
        most_tokens: int | None = None,
        plain: bool = False,
        last: bool = False,
    ) -> None:
        self.answers, self.most_tokens = Answers(processor, plain=plain), most_tokens
        self.last = last
        self.tokenizer = self.answers.tokenizer
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token

    def __call__(self, conversations: Sequence[Messages]) -> dict[str, Tensor]:
        """All that the host's processor makes, and `labels` [B, T]: ids of answers, else -100."""
        self.tokenizer.padding_side = "right"  # each time: others pad their prompts on the left
        batch = dict(self.answers.encoded(conversations, padding=True))
        answered = batch.pop("assistant_masks").bool()
        if self.last:  # whoever speaks after an answer ends it: from behind, the first run is it
            behind = answered.flip(1)
            begun = behind.long().cumsum(1) > 0
            answered = (behind & ((begun & ~behind).long().cumsum(1) == 0)).flip(1)
        lengths = batch["attention_mask"].sum(1).tolist()
        for length, row in zip(lengths, answered, strict=True):
            check_learnt(length, bool(row.any()), self.most_tokens)
        batch["labels"] = batch["input_ids"].where(answered, IGNORED)
        return batch


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
