"""Questions with references, and the batches in which a model reads them.

The questions are about boards, from sets of pairs, from files of chats, or windows of plain text.
"""

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from transformers import BatchEncoding

from trol.data.answers import Answers
from trol.data.boards import ASKERS, ask, draw, make_board
from trol.data.conversations import ConversationCollator
from trol.data.own_files import Chat, Pair, read_chats, read_text, shortened
from trol.data.pairs import pairs_of
from trol.data.topics import topic_text
from trol.depth.roles import IGNORED_LABEL
from trol.errors import DataError, UsageError
from trol.host.chat_templates import start_of

SEEDS_APART = 100_000
"""Boards between one evaluation seed and the next, so that they share none."""

BATCH = 64
"""Questions answered at once."""

TOKENS_AT_ONCE = 4096
"""Tokens of the windows that are read at once; at least one window is."""

TEMPLATE_TOKENS = 32
"""Positions kept for what a chat template adds to a question."""


@dataclass(frozen=True)
class Item:
    """One question, about a picture or in text alone, with its reference answer."""

    picture: Image | None
    question: str
    answer: str
    type: str
    turns: tuple[Mapping[str, Any], ...] = ()
    """The conversation that the question ends; empty where the question is all of it."""
    ids: tuple[int, ...] = ()
    """A window of plain text: the ids of the question (which are not predicted) and the answer."""

    @property
    def shows(self) -> bool:
        """Whether the question has a picture."""
        parts = (part for turn in self.turns for part in turn["content"])
        return self.picture is not None or any(part["type"] == "image" for part in parts)

    @property
    def weight(self) -> int:
        """What the item counts for in a mean loss: a window for each token that it predicts."""
        return len(self.ids) - 1 if self.ids else 1


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


Part = tuple[float, float]
"""Where a part of a file begins and ends, as shares of the file."""

WHOLE: Part = (0.0, 1.0)


def chat_items(
    path: Path, count: int, seed: int, split: str = "test", *, part: Part = WHOLE
) -> list[Item]:
    """At most `count` last answers of a file of chats, which is the same set in every split."""
    del split
    chats = _part_of(list(read_chats(path)), part)
    random.Random(f"chats/{seed}").shuffle(chats)
    return [_chat_item(chat, path.parent) for chat in chats[:count]]


def _part_of(values: list[Any], part: Part) -> list[Any]:
    """The values of a part; parts that share no place of the file share no value."""
    first, last = math.ceil(part[0] * len(values)), math.ceil(part[1] * len(values))
    return values[first:last]


def _chat_item(chat: Chat, folder: Path) -> Item:
    turns = tuple(chat.with_pictures(folder))
    plain = len(turns) == 1 and all(part["type"] == "text" for part in turns[0]["content"])
    return Item(None, chat.question, chat.answer, chat.type, turns=() if plain else turns)


def text_items(
    path: Path,
    count: int,
    seed: int,
    split: str = "test",
    *,
    tokenizer: Any,
    window: int,
    part: Part = WHOLE,
) -> list[Item]:
    """At most `count` windows of a file, as `windows` cuts them; every split is the whole file."""
    del split
    text = read_text(path)
    return windows(text, path, count, seed, tokenizer=tokenizer, window=window, part=part)


def topic_items(
    count: int, seed: int, split: str = "test", *, tokenizer: Any, window: int
) -> list[Item]:
    """At most `count` windows of the help topics of a split, as `windows` cuts them."""
    where = f"the topics of the {split} split"
    return windows(topic_text(split), where, count, seed, tokenizer=tokenizer, window=window)


def windows(
    text: str,
    where: object,
    count: int,
    seed: int,
    *,
    tokenizer: Any,
    window: int,
    part: Part = WHOLE,
) -> list[Item]:
    """At most `count` windows of a text, in its order; `where` is what errors call it.

    The text is encoded once and cut every `window` tokens. The mark that the tokenizer puts before
    a text counts as one of them, and the last window may be shorter. If the text has more than
    `count` windows, the seed draws among them.

    Raises:
        DataError: there is not one token to predict.
    """
    start = start_of(tokenizer)
    encoded = tokenizer(
        text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
    )  # verbose: a text may be longer than the model reads at once
    ids, places = (_part_of(encoded[name], part) for name in ("input_ids", "offset_mapping"))
    step = window - len(start)
    known = 0 if start else 1  # the first token of a text without a mark is not predicted
    begins = [at for at in range(0, len(ids), step) if len(ids) - at > known]
    if not begins:
        raise DataError(f"{where} is a single token, so nothing is predicted; name a longer text.")
    if count < len(begins):
        begins = sorted(random.Random(f"windows/{seed}").sample(begins, count))
    return [
        _window(text, places[at : at + step], (*start, *ids[at : at + step]), known)
        for at in begins
    ]


def _window(text: str, places: Sequence[tuple[int, int]], ids: tuple[int, ...], known: int) -> Item:
    first, middle, last = places[0][0], places[known][0], places[-1][1]
    return Item(None, text[first:middle], text[middle:last], "text", ids=ids)


def batches(items: Sequence[Item], size: int = BATCH) -> Iterator[Sequence[Item]]:
    """The items in order, `size` at a time; fewer where windows exceed `TOKENS_AT_ONCE`."""
    longest = max((len(item.ids) for item in items), default=0)
    if longest:
        size = max(1, min(size, TOKENS_AT_ONCE // longest))
    for start in range(0, len(items), size):
        yield items[start : start + size]


def tokenizer_of(processor: Any) -> Any:
    """A processor's tokenizer; a text model's processor is its tokenizer."""
    return getattr(processor, "tokenizer", processor)


def messages(item: Item, *, answered: bool = False) -> list[dict[str, Any]]:
    """The item as a conversation, with its reference as the assistant's turn if `answered`."""
    question, reference = Pair(item.question, item.answer, item.type).messages()
    turns = [dict(turn) for turn in item.turns] or [question]
    if item.picture is not None:
        turns[0]["content"].insert(0, {"type": "image", "image": item.picture})
    return [*turns, reference] if answered else turns


def prompts(processor: Any, items: Sequence[Item]) -> Any:
    """The questions as one batch that `generate` takes, padded on the left.

    `processor` is a processor, or the tokenizer of a model that reads text alone. Of a window of
    plain text, the first half is the prompt.
    """
    tokenizer = tokenizer_of(processor)
    if any(item.ids for item in items):
        return _padded([item.ids[: (len(item.ids) + 1) // 2] for item in items], left=True)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"
    conversations = [messages(item) for item in items]
    batch = Answers(processor, plain=True).encoded(conversations, prompt=True, padding=True)
    batch.pop("assistant_masks")
    return batch


def fitted_prompts(model: Any, processor: Any, items: Sequence[Item], new_tokens: int) -> Any:
    """The questions, each shortened so that `new_tokens` fit behind it, on the model's device."""
    short = [fitted(model, processor, item, new_tokens) for item in items]
    return prompts(processor, short).to(model.device)


def labelled(model: Any, processor: Any, items: Sequence[Item]) -> Any:
    """The items with their references, padded on the right, `labels` at the references.

    The batch is on the model's device.
    """
    if any(item.ids for item in items):
        inputs = _padded([item.ids for item in items])
        labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, IGNORED_LABEL)
        labels[:, 0] = IGNORED_LABEL  # no token precedes it
        return BatchEncoding({**inputs, "labels": labels}).to(model.device)
    tokenizer = tokenizer_of(processor)
    longest = max(len(tokenizer(i.answer, add_special_tokens=False)["input_ids"]) for i in items)
    conversations = [messages(fitted(model, processor, i, longest), answered=True) for i in items]
    collate = ConversationCollator(processor, plain=True, last=True)
    return BatchEncoding(collate(conversations)).to(model.device)


def _padded(rows: Sequence[Sequence[int]], *, left: bool = False) -> BatchEncoding:
    """Rows of ids as `input_ids` and `attention_mask` [B, T]; padding is masked."""
    ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    real = torch.zeros_like(ids)
    for at, row in enumerate(rows):
        part = slice(-len(row), None) if left else slice(len(row))
        ids[at, part], real[at, part] = torch.tensor(row), 1
    return BatchEncoding({"input_ids": ids, "attention_mask": real})


def positions_of(model: Any) -> int | None:
    """How many tokens the model reads at most; None where its config does not say."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def fitted(model: Any, processor: Any, item: Item, new_tokens: int) -> Item:
    """The item, a question in text shortened so that it and `new_tokens` fit the model's positions.

    A conversation first loses its oldest turns, a window its end.

    Raises:
        UsageError: the answer alone fills the model's positions.
    """
    most = positions_of(model)
    if most is None or item.shows:
        return item
    if item.ids:
        return replace(item, ids=item.ids[: max(1, 2 * (most - new_tokens))])
    budget = most - new_tokens - TEMPLATE_TOKENS
    turns = messages(item)
    if sum(len(_text(turn)) for turn in turns) <= budget:
        return item  # a token has at least one character
    if budget < 1:
        raise UsageError(
            f"answers of {new_tokens} tokens leave no room for a question in the model's {most} "
            "positions; ask for shorter answers, or name a model with more positions."
        )
    tokenizer = tokenizer_of(processor)
    first = 1 if turns[0]["role"] == "system" else 0
    while len(turns) > first + 1 and _tokens(tokenizer, turns) > budget:
        turns = [*turns[:first], *turns[first + 2 :]]  # a question and its answer
    budget = max(1, budget - _tokens(tokenizer, turns[:-1]))
    short = shortened(Pair(item.question, item.answer, item.type), tokenizer, question=budget)
    last = {"role": "user", "content": [{"type": "text", "text": short.question}]}
    return replace(item, question=short.question, turns=(*turns[:-1], last) if item.turns else ())


def _text(turn: Any) -> str:
    return "".join(part["text"] for part in turn["content"])


def _tokens(tokenizer: Any, turns: Sequence[Any]) -> int:
    """Tokens of the texts, and about as many as a template adds to each turn after the first."""
    texts = (tokenizer(_text(t), add_special_tokens=False)["input_ids"] for t in turns)
    return sum(map(len, texts)) + TEMPLATE_TOKENS * max(0, len(turns) - 1)
