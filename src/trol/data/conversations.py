"""Conversations for any processor or tokenizer: batches in the host's own form, answers marked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import ProcessorMixin

from trol.data.chat import IGNORED
from trol.data.damage import RowError
from trol.data.mixture import Mixture
from trol.data.templates import own_template, templating
from trol.errors import DataError

Messages = Sequence[Mapping[str, Any]]


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

    Answers are found by what the template adds when the assistant speaks, so that it needs no
    `{% generation %}`: turn i is answer from the end of turns 0 .. i - 1 with the generation
    prompt to the end of turns 0 .. i.

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
        self.processor, self.most_tokens, self.last = processor, most_tokens, last
        self.sees = isinstance(processor, ProcessorMixin)
        tokenizer = processor.tokenizer if self.sees else processor
        if own_template(processor) is None and not plain:
            raise DataError(
                f"{type(processor).__name__} has no chat template; name a model that was trained "
                "on conversations, or give one: chat_template=FILE in a recipe or behind it, "
                "processor.chat_template in Python."
            )
        self.template = templating(processor)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        self.tokenizer = tokenizer

    def __call__(self, conversations: Sequence[Messages]) -> dict[str, Tensor]:
        """All that the host's processor makes, and `labels` [B, T]: ids of answers, else -100."""
        self.tokenizer.padding_side = "right"  # each time: others pad their prompts on the left
        batch = dict(self._encoded(conversations, return_tensors="pt"))
        ids = batch["input_ids"]
        answers = torch.zeros_like(ids, dtype=torch.bool)
        for row, messages in enumerate(conversations):
            spans = self._spans(messages, ids[row].tolist())
            for start, end in spans[-1:] if self.last else spans:
                answers[row, start:end] = True
        batch["labels"] = ids.where(answers, IGNORED)
        return batch

    def _encoded(self, conversations: Sequence[Messages], **settings: Any) -> Any:
        told = conversations if self.sees else [as_text(one) for one in conversations]
        padding: dict[str, Any] = {"padding": True}
        padding = {"processor_kwargs": padding} if self.sees else padding
        return self.processor.apply_chat_template(
            list(told), tokenize=True, return_dict=True, **self.template, **padding, **settings
        )

    def _spans(self, messages: Messages, row: list[int]) -> list[tuple[int, int]]:
        """Where the assistant speaks in `row`, the padded ids of these messages."""
        spans = []
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self._length(messages[:number], row, add_generation_prompt=True)
            spans.append((before, self._length(messages[: number + 1], row)))
        if not spans:
            raise RowError("empty_answer", "nobody answers in it; give an assistant's turn.")
        if self.most_tokens is not None and spans[-1][1] > self.most_tokens:
            raise RowError(
                "too_long",
                f"it is {spans[-1][1]} tokens long, at most {self.most_tokens} are learnt from; "
                "raise max_tokens, or shorten it.",
            )
        return spans

    def _length(self, messages: Messages, row: list[int], **settings: Any) -> int:
        """How many tokens these first messages are; they must be the first of the row."""
        (ids,) = self._encoded([messages], **settings)["input_ids"]
        if row[: len(ids)] != list(ids):
            raise DataError(
                "the chat template writes earlier turns otherwise once a conversation goes on, so "
                "its answers cannot be found; set a template that only ever appends."
            )
        return len(ids)


def as_text(messages: Messages) -> list[dict[str, str]]:
    """The messages for a tokenizer, whose templates want the content as one string."""
    texts = []
    for message in messages:
        if any(part["type"] != "text" for part in message["content"]):
            raise DataError(
                "a conversation has a picture, but the host reads text alone; take the pictures' "
                "source out of the mixture, or name a host that sees."
            )
        content = "".join(part["text"] for part in message["content"])
        texts.append({"role": message["role"], "content": content})
    return texts
