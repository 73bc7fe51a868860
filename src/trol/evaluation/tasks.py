"""Tasks: questions with one right answer, asked in batches, scored by type."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL.Image import Image

from trol.data.boards import draw, make_board
from trol.data.questions import ASKERS, ask, chance_by_type
from trol.depth import trace
from trol.errors import UsageError, unknown

BATCH = 64
"""Questions answered at once."""

NEW_TOKENS = 4
"""Tokens an answer may take: two words, a full stop and the end."""

SEEDS_APART = 100_000
"""Boards between one evaluation seed and the next, so that they share none."""


@dataclass(frozen=True)
class Item:
    """One question about a picture."""

    picture: Image
    question: str
    answer: str
    type: str


@dataclass(frozen=True)
class Task:
    """A set of items and what blind guessing gets."""

    items: Callable[[int, int], list[Item]]
    """(how many, seed) -> items; the same on every call."""
    chance: Callable[[], dict[str, float]]
    """Type -> accuracy of a guess without looking."""


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


TASKS: dict[str, Task] = {"boards": Task(board_items, chance_by_type)}
"""Every task by name."""


def check_tasks(names: Sequence[str]) -> None:
    """Raises `UsageError` where a task is unknown or none is named."""
    if not names:
        raise UsageError(f"no task named; choose among {', '.join(TASKS)}.")
    for name in names:
        if name not in TASKS:
            raise unknown("task", name, TASKS)


def sample_questions(count: int) -> list[Item]:
    """The first `count` items of the boards, types mixed."""
    return board_items(count, 0)


def evaluate(
    model: Any, processor: Any, tasks: Sequence[str], *, questions: int = 1800, seed: int = 0
) -> dict[str, Any]:
    """Accuracy per question type of each task, and what one batch costs.

    Returns:
        `{"tasks": {name: {"accuracy", "n", "by_type", "n_by_type", "chance_by_type"}}, "cost"}`.

    Raises:
        UsageError: a task is unknown.
    """
    check_tasks(tasks)
    found: dict[str, Any] = {"tasks": {}}
    for name in tasks:
        items = TASKS[name].items(questions, seed)
        right = score(model, processor, items)
        found["tasks"][name] = {**by_type(items, right), "chance_by_type": TASKS[name].chance()}
        with trace(model) as seen:
            answers(model, processor, items[:1])
        found["cost"] = {**seen.cost.json(), "tokens": int(seen.real.sum())}
    return found


def by_type(items: Sequence[Item], right: Sequence[bool]) -> dict[str, Any]:
    """Accuracy in all and by type, with the number of questions."""
    asked = Counter(item.type for item in items)
    scored = Counter(item.type for item, ok in zip(items, right, strict=True) if ok)
    return {
        "accuracy": sum(right) / len(items),
        "n": len(items),
        "by_type": {kind: scored[kind] / n for kind, n in asked.items()},
        "n_by_type": dict(asked),
    }


def score(model: Any, processor: Any, items: Sequence[Item]) -> list[bool]:
    """Which items are answered rightly."""
    given = answers(model, processor, items)
    return [_words(a) == _words(item.answer) for a, item in zip(given, items, strict=True)]


def answers(model: Any, processor: Any, items: Sequence[Item]) -> list[str]:
    """Greedy answers, in batches padded on the left."""
    given: list[str] = []
    for batch in _batches(items):
        inputs = prompts(processor, batch).to(model.device)
        with torch.inference_mode():
            tokens = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
        new = tokens[:, inputs["input_ids"].shape[1] :]
        given += processor.tokenizer.batch_decode(new, skip_special_tokens=True)
    return given


def _batches(items: Sequence[Item]) -> Iterable[Sequence[Item]]:
    for start in range(0, len(items), BATCH):
        yield items[start : start + BATCH]


def prompts(processor: Any, items: Sequence[Item]) -> Any:
    """The questions as one batch that `generate` takes, padded on the left."""
    conversations = [
        [
            {
                "role": "user",
                "content": [
                    {"type": "image", "image": item.picture},
                    {"type": "text", "text": item.question},
                ],
            }
        ]
        for item in items
    ]
    return processor.apply_chat_template(
        conversations,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True},
    )


def _words(text: str) -> list[str]:
    return text.lower().replace(".", " ").split()
