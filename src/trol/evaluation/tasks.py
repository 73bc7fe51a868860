"""Tasks: questions with one reference answer, asked in batches, scored by type."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import torch
from PIL.Image import Image
from transformers import ProcessorMixin

from trol.data.boards import draw, make_board
from trol.data.pairs import NAMES, Pair, is_pairs, pairs_of, shortened
from trol.data.questions import ASKERS, ask, chance_by_type
from trol.depth import trace
from trol.errors import HostError, UsageError, unknown

BATCH = 64
"""Questions answered at once."""

SEEDS_APART = 100_000
"""Boards between one evaluation seed and the next, so that they share none."""

TEXT_METRICS = ("rougeL", "rouge1", "rouge2", "exact", "loss")
"""What answers in sentences are measured by."""

PAPERS_NEW_TOKENS = 300
"""Longest answer to Alpaca in Glavas et al. (arXiv 2410.20022)."""


@dataclass(frozen=True)
class Item:
    """One question, about a picture or in text alone."""

    picture: Image | None
    question: str
    answer: str
    type: str


@dataclass(frozen=True)
class Task:
    """A set of items, what blind guessing gets, and what answers to them are measured by."""

    items: Callable[..., list[Item]]
    """(how many, seed, split="test") -> items, fewer where there are no more; the same on every
    call."""
    chance: Callable[[], dict[str, float]] = field(default=dict)
    """Type -> score of a guess without looking; empty where nobody has measured it."""
    metrics: tuple[str, ...] = TEXT_METRICS
    """Metrics that the task has references for, the one it is judged by first."""
    new_tokens: int = 64
    """Longest answer. Unit: tokens."""


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


def pair_items(name: str, count: int, seed: int, split: str = "test") -> list[Item]:
    """At most `count` questions of a set of pairs, in the order that the seed gives."""
    pairs = pairs_of(name, split, limit=count, seed=seed)
    return [Item(None, pair.question, pair.answer, pair.type) for pair in pairs]


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


TASKS: dict[str, Task] = {
    # Two words, a full stop and the end.
    "boards": Task(board_items, chance_by_type, ("exact", "loss"), new_tokens=4),
    "docstrings": Task(partial(pair_items, "docstrings"), lambda: dict(blind_docstrings())),
}
"""The built-in tasks by name."""


def task_of(name: str) -> Task:
    """A built-in task, or the one of a set of pairs in a file, such as `alpaca:FILE`.

    Raises:
        UsageError: there is no such task.
    """
    if name in TASKS:
        return TASKS[name]
    if not is_pairs(name):
        raise unknown("task", name, {*TASKS, *NAMES})
    return Task(partial(pair_items, name), new_tokens=PAPERS_NEW_TOKENS)


def check_tasks(names: Sequence[str]) -> None:
    """Raises `UsageError` where a task is unknown or none is named."""
    if not names:
        raise UsageError(f"no task named; choose among {', '.join((*TASKS, *NAMES[1:]))}.")
    for name in names:
        task_of(name)


def check_reads(processor: Any, name: str, items: Sequence[Item]) -> None:
    """Raises `HostError` where items have pictures and the model reads text alone."""
    if not isinstance(processor, ProcessorMixin) and any(i.picture is not None for i in items):
        raise HostError(
            f"the task {name} shows pictures, but this model reads text alone; name a model that "
            "sees, or a task of text such as docstrings."
        )


def sample_questions(count: int) -> list[Item]:
    """The first `count` items of the boards, types mixed."""
    return board_items(count, 0)


def by_type(items: Sequence[Item], scores: Sequence[float]) -> dict[str, Any]:
    """Mean score in all and by type, with the number of questions."""
    found: dict[str, list[float]] = defaultdict(list)
    for item, value in zip(items, scores, strict=True):
        found[item.type].append(float(value))
    return {
        "accuracy": sum(map(float, scores)) / len(items),
        "n": len(items),
        "by_type": {kind: sum(values) / len(values) for kind, values in found.items()},
        "n_by_type": dict(Counter(item.type for item in items)),
    }


def cost_of(model: Any, processor: Any, item: Item, *, new_tokens: int) -> dict[str, Any]:
    """What answering one question costs, and how many tokens it took."""
    with trace(model) as seen:
        answers(model, processor, [item], new_tokens=new_tokens)
    return {**seen.cost.json(), "tokens": int(seen.real.sum())}


def answers(
    model: Any, processor: Any, items: Sequence[Item], *, new_tokens: int, batch: int = BATCH
) -> list[str]:
    """Greedy answers of at most `new_tokens` tokens, in batches padded on the left."""
    given: list[str] = []
    for some in batches(items, batch):
        fitting = [fitted(model, processor, item, new_tokens) for item in some]
        inputs = prompts(processor, fitting).to(model.device)
        with torch.inference_mode():
            tokens = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)
        new = tokens[:, inputs["input_ids"].shape[1] :]
        given += tokenizer_of(processor).batch_decode(new, skip_special_tokens=True)
    return given


def batches(items: Sequence[Item], size: int = BATCH) -> Iterable[Sequence[Item]]:
    """The items in order, `size` at a time."""
    for start in range(0, len(items), size):
        yield items[start : start + size]


TEMPLATE_TOKENS = 32
"""Positions kept for what a chat template adds to a question."""


def fitted(model: Any, processor: Any, item: Item, new_tokens: int) -> Item:
    """The item, a question in text cut so that it and `new_tokens` fit the model's positions."""
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    room = 0 if most is None else most - new_tokens - TEMPLATE_TOKENS
    if most is None or item.picture is not None or len(item.question) <= room:
        return item  # a token has a character at least
    if room < 1:
        raise UsageError(
            f"answers of {new_tokens} tokens leave no room for a question in the model's {most} "
            "positions; ask for shorter answers, or name a model with more positions."
        )
    pair = Pair(item.question, item.answer, item.type)
    short = shortened(pair, tokenizer_of(processor), question=room)
    return Item(None, short.question, item.answer, item.type)


def messages(item: Item, *, answered: bool = False) -> list[dict[str, Any]]:
    """The item as a conversation, with its reference as the assistant's turn if `answered`."""
    pair = Pair(item.question, item.answer, item.type)
    said = pair.messages(answered=answered)
    if item.picture is not None:
        said[0]["content"].insert(0, {"type": "image", "image": item.picture})
    return said


def prompts(processor: Any, items: Sequence[Item]) -> Any:
    """The questions as one batch that `generate` takes, padded on the left.

    `processor` is a processor, or the tokenizer of a model that reads text alone.
    """
    sees = isinstance(processor, ProcessorMixin)
    told: list[Any] = [messages(item) for item in items]
    if not sees:
        told = [[{"role": "user", "content": item.question}] for item in items]
    tokenizer = tokenizer_of(processor)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"
    settings: dict[str, Any] = (
        {"processor_kwargs": {"padding": True}} if sees else {"padding": True}
    )
    return processor.apply_chat_template(
        told,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        **settings,
    )


def tokenizer_of(processor: Any) -> Any:
    """A processor's tokenizer; a text model's processor is its tokenizer."""
    return getattr(processor, "tokenizer", processor)
