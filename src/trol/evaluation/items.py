"""What models are asked: boards, pairs, chats, and windows of plain text."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from PIL.Image import Image

from trol.data.boards import ASKERS, ask, draw, make_board
from trol.data.own_files import Chat, read_chats, read_text
from trol.data.pairs import pairs_of
from trol.errors import DataError
from trol.host.chat_templates import start_of

SEEDS_APART = 100_000
"""Boards between one evaluation seed and the next, so that they share none."""


@dataclass(frozen=True)
class Item:
    """One question, about a picture or in text alone."""

    picture: Image | None
    question: str
    answer: str
    type: str
    turns: tuple[Mapping[str, Any], ...] = ()
    """The conversation that the question ends, where it is more than that."""
    ids: tuple[int, ...] = ()
    """A window of plain text: the ids of the question (what nobody predicts) and the answer."""

    @property
    def shows(self) -> bool:
        """Whether there are pictures in it."""
        parts = (part for turn in self.turns for part in turn["content"])
        return self.picture is not None or any(part["type"] == "image" for part in parts)


def board_items(count: int, seed: int, split: str = "test") -> list[Item]:
    """Single questions about boards of a split, every type as often as the others."""
    items: list[Item] = []
    kinds = list(ASKERS)
    board_seed = seed * SEEDS_APART
    while len(items) < count:
        board_seed += 1
        kind = kinds[len(items) % len(kinds)]
        board = make_board(split, board_seed)
        question = ask(board, kind, random.Random(f"evaluation/{board_seed}"))
        if question is not None:
            items.append(Item(draw(board), question.text, question.answer, kind))
    return items


def sample_questions(count: int) -> list[Item]:
    """The first `count` items of the boards, types mixed."""
    return board_items(count, 0)


def pair_items(name: str, count: int, seed: int, split: str = "test") -> list[Item]:
    """At most `count` questions of a set of pairs, in the order that the seed gives."""
    pairs = pairs_of(name, split, limit=count, seed=seed)
    return [Item(None, pair.question, pair.answer, pair.type) for pair in pairs]


def chat_items(path: Path, count: int, seed: int, split: str = "test") -> list[Item]:
    """At most `count` last answers of a file of chats, which is the same set in every split."""
    del split
    chats = list(read_chats(path))
    random.Random(f"chats/{seed}").shuffle(chats)
    return [_asked(chat, path.parent) for chat in chats[:count]]


def _asked(chat: Chat, folder: Path) -> Item:
    turns = tuple(chat.with_pictures(folder))
    plain = len(turns) == 1 and all(part["type"] == "text" for part in turns[0]["content"])
    return Item(None, chat.question, chat.answer, chat.type, turns=() if plain else turns)


def text_items(
    path: Path, count: int, seed: int, split: str = "test", *, tokenizer: Any, window: int
) -> list[Item]:
    """At most `count` windows of a file, in its order; all of it is in every split.

    The text is encoded once and cut every `window` tokens, the mark that the tokenizer puts before
    a text counted; the last window may be shorter. Fewer than there are: drawn by the seed.

    Raises:
        DataError: there is not one token to predict.
    """
    del split
    text, start = read_text(path), start_of(tokenizer)
    encoded = tokenizer(
        text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
    )  # verbose: a text may be longer than the model reads at once
    ids, places = encoded["input_ids"], encoded["offset_mapping"]
    step = window - len(start)
    known = 0 if start else 1  # tokens of a window that nothing comes before
    begins = [at for at in range(0, len(ids), step) if len(ids) - at > known]
    if not begins:
        raise DataError(f"{path} is a single token, so nothing is predicted; name a longer text.")
    if count < len(begins):
        begins = sorted(random.Random(f"windows/{seed}").sample(begins, count))
    return [
        _window(text, places[at : at + step], (*start, *ids[at : at + step]), known)
        for at in begins
    ]


def _window(text: str, places: Sequence[tuple[int, int]], ids: tuple[int, ...], known: int) -> Item:
    first, middle, last = places[0][0], places[known][0], places[-1][1]
    return Item(None, text[first:middle], text[middle:last], "text", ids=ids)


GUESSES, GUESSED = 24, 100
"""Answers of the train split that a blind guesser tries, on so many validation questions a type."""


@cache
def blind_docstrings() -> dict[str, float]:
    """Type -> rougeL of giving one answer to all questions: the best of some training answers."""
    from trol.evaluation.metrics import scores  # noqa: PLC0415 - which reads this module

    guesses = pair_items("docstrings", 5000, 0, "train")
    asked: dict[str, list[Item]] = defaultdict(list)
    for item in pair_items("docstrings", 5000, 0, "validation"):
        asked[item.type].append(item)
    found = {}
    for kind, all_items in asked.items():
        items = all_items[:GUESSED]
        tried = [item.answer for item in guesses if item.type == kind][:GUESSES]
        found[kind] = max(
            sum(scores("rougeL", [guess] * len(items), items)) / len(items) for guess in tried
        )
    return found
