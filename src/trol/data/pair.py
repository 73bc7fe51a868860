"""One question with its one answer, in text alone."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from trol.errors import UsageError, unknown

SPLITS: dict[str, float] = {"train": 0.7, "validation": 0.15, "test": 0.15}
"""Share of the pairs that each split has, as in Glavas et al. (arXiv 2410.20022)."""


@dataclass(frozen=True)
class Pair:
    """A question, its answer, and the type of question that it is."""

    question: str
    answer: str
    type: str

    def messages(self, *, answered: bool = True) -> list[dict[str, Any]]:
        """The pair as a conversation of user and assistant; of the user alone if not answered."""
        said = [("user", self.question), ("assistant", self.answer)][: 1 + answered]
        return [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in said]


def check_split(split: str) -> None:
    """Raises `UsageError` unless `split` is one of `SPLITS`."""
    if split not in SPLITS:
        raise unknown("split", split, SPLITS)


def drawn(pairs: Iterable[Pair], limit: int | None, seed: int) -> list[Pair]:
    """The pairs in an order that the seed gives, at most `limit` of them."""
    if limit is not None and limit < 1:
        raise UsageError(f"limit is {limit}; give 1 or more, or None for all pairs.")
    shuffled = list(pairs)
    random.Random(f"pairs/{seed}").shuffle(shuffled)
    return shuffled[:limit]


def shortened(pair: Pair, tokenizer: Any, *, question: int, answer: int | None = None) -> Pair:
    """The pair cut to at most `question` and `answer` tokens; the answer loses its end.

    The question's last paragraph stays (`### Response:` says where to begin): what stands before
    it loses its end.

    Raises:
        UsageError: not even the last paragraph fits.
    """
    text = pair.question
    if _count(tokenizer, text) > question:
        head, gap, tail = text.rpartition("\n\n")
        if not gap:
            head, tail = text, ""
        room = question - _count(tokenizer, gap + tail)
        if room < 1:
            raise UsageError(
                f"a question may have {question} tokens here, which its last paragraph fills "
                "alone; allow longer questions (max_tokens, prompt_share)."
            )
        text = _cut(tokenizer, head, room) + gap + tail
    said = pair.answer if answer is None else _cut(tokenizer, pair.answer, answer)
    return Pair(text, said, pair.type)


def _count(tokenizer: Any, text: str) -> int:
    return len(tokenizer(text, add_special_tokens=False)["input_ids"])


def _cut(tokenizer: Any, text: str, most: int) -> str:
    """The first `most` tokens of the text, as a piece of the text itself."""
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ends = [end for _, end in encoded["offset_mapping"]]
    return text if len(ends) <= most else text[: ends[most - 1]]
