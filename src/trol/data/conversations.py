"""Conversations to training batches, for any processor or tokenizer, and what becomes of bad rows.

A batch has the inputs that the host's own processor makes, and labels at the answers. A row that
cannot be learnt from is named, counted, and replaced by a sound one.
"""

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset

from trol.data.answers import Answers, Messages
from trol.data.formats import RowError, row_errors
from trol.data.mixture import Mixture
from trol.depth.roles import IGNORED_LABEL
from trol.errors import DataError, UsageError, unknown
from trol.host.chat_templates import start_of, template_fault


class ConversationCollator:
    """Conversations through a processor's own chat template and batching, padded on the right.

    Args:
        processor: a processor or a tokenizer.
        most_tokens: a longer conversation is a `RowError`.
        plain: whether one without a chat template writes plain text; else it is refused.
        last: whether only the assistant's last message is answer.
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
        """The processor's encoding, and `labels` [B, T]: ids at answers, `IGNORED_LABEL` elsewhere.

        Raises:
            RowError: a conversation cannot be encoded, is too long, or has no token of an answer.
        """
        self.tokenizer.padding_side = "right"  # each time: prompts are padded on the left
        batch = dict(self.answers.encoded(conversations, padding=True))
        answered = batch.pop("assistant_masks").bool()
        if self.last:  # seen from behind, the last answer is the first run
            behind = answered.flip(1)
            begun = behind.long().cumsum(1) > 0
            answered = (behind & ((begun & ~behind).long().cumsum(1) == 0)).flip(1)
        lengths = batch["attention_mask"].sum(1).tolist()
        for length, row in zip(lengths, answered, strict=True):
            self._check(length, bool(row.any()))
        batch["labels"] = batch["input_ids"].where(answered, IGNORED_LABEL)
        return batch

    def _check(self, tokens: int, answered: bool) -> None:
        if not answered:
            raise RowError(
                "empty_answer",
                "the chat template makes no token of an answer; give a turn of the assistant's.",
            )
        if self.most_tokens is not None and tokens > self.most_tokens:
            raise RowError(
                "too_long",
                f"the conversation is {tokens} tokens long, but at most {self.most_tokens} are "
                "learnt from (max_tokens, or the positions that the model has); shorten the text, "
                "drop turns, or give fewer or smaller pictures.",
            )


NAMED = 5
"""Rows left out that are named in a warning; all of them are counted."""

TRIED = 1000
"""Rows that are tried in the place of a damaged one before training is given up."""


class SoundRows(Dataset[int]):
    """Rows whose batches hold only sound ones. Item i is i itself; `batch` is the collator.

    A damaged row is replaced by another, always the same one, so ranks stay in step and a resumed
    run goes on as it would have. Of rows that are sound alone but make no batch with each other,
    the later ones are left out.

    Args:
        rows: a mixture, or a sequence of messages.
        collate: rows to a batch.
        where: number of a row -> its file and row, for messages.
    """

    def __init__(self, rows: Any, collate: Callable[..., Any], where: Callable[[int], str]) -> None:
        self.rows, self.collate, self.where = rows, collate, where
        self.mixture = rows if isinstance(rows, Mixture) else None
        self.left_out: dict[int, str] = {}
        """Number of a row -> file, row and what is wrong, in the order in which they came up."""

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> int:
        return number

    def batch(self, numbers: Sequence[int]) -> Any:
        """The batch of these rows.

        Raises:
            DataError: no row can be learnt from.
        """
        try:
            with row_errors():
                return self.collate([self.rows[number] for number in numbers])
        except DataError:
            return self._without_the_odd([self._sound(number) for number in numbers])

    def _sound(self, number: int) -> int:
        """The row itself, or the first sound one in an order drawn with its number as seed."""
        if self._is_sound([number]):
            return number
        others = np.random.default_rng([0, number]).permutation(len(self))[:TRIED]
        for other in others:
            if self._is_sound([int(other)]):
                return int(other)
        reasons = list(self.left_out.values())
        raise DataError(
            f"none of the {len(others):,} rows that were tried can be learnt from: "
            f"{' | '.join(reasons[:3])}"
        )

    def _without_the_odd(self, numbers: Sequence[int]) -> Any:
        """The batch of those rows that go with the first."""
        fitting = [numbers[0]]
        for number in numbers[1:]:
            if self._is_sound([*fitting, number]):
                fitting.append(number)
        return self.collate([self.rows[number] for number in fitting])

    def _is_sound(self, numbers: Sequence[int]) -> bool:
        """Whether these rows make a batch; if not, the last of them is left out."""
        try:
            with row_errors():
                self.collate([self.rows[number] for number in numbers])
        except DataError as error:
            self._leave_out(numbers[-1], str(error))
            return False
        return True

    def _leave_out(self, number: int, why: str) -> None:
        if number in self.left_out:
            return
        where = self.where(number)
        self.left_out[number] = why if why.startswith(where) else f"{where}: {why}"
        if len(self.left_out) <= NAMED:
            more = "; more are only counted" if len(self.left_out) == NAMED else ""
            warnings.warn(f"left out {self.left_out[number]}{more}", stacklevel=2)


def read_template(template: str, known: Sequence[str] = ()) -> str:
    """A chat template by its text in Jinja, or by the file that holds it.

    Raises:
        UsageError: it is neither, nor one of the names `known`, or its syntax is wrong.
    """
    if "{" not in template and not Path(template).is_file():
        if known:
            raise unknown("chat_template", template, (*known, "FILE"))
        raise UsageError(
            f"there is no file {template!r} to read a chat template from, and it is no template "
            "itself: that is Jinja, with {{ }} and {% %}."
        )
    text = template
    if "{" not in template:
        try:
            text = Path(template).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"cannot read a chat template from {template!r}: {error}") from error
    fault = template_fault(text)
    if fault is not None:
        raise UsageError(f"the chat template {template!r} is not well formed: {fault}.")
    return text


def give_template(processor: Any, template: str) -> None:
    """Puts a template in the place of a processor's own; warns where texts then lack their begin.

    Models that were trained with a token before each text write nonsense without it. What the
    template makes of one question is looked at; one that refuses it is left to be met later.
    """
    processor.chat_template = template
    tokenizer = getattr(processor, "tokenizer", processor)
    question = {"role": "user", "content": [{"type": "text", "text": "Why?"}]}
    start = start_of(tokenizer)
    try:
        (ids,) = Answers(processor).encoded([[question]], prompt=True)["input_ids"]
    except DataError:
        return
    if list(ids[: len(start)]) != start:
        warnings.warn(
            f"the chat template does not begin with {tokenizer.bos_token}, which this tokenizer "
            "puts before each text: answers may be nonsense. Begin it with {{ bos_token }}.",
            stacklevel=3,
        )
