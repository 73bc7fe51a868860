"""Tasks: questions with one reference answer, asked in batches, scored by type.

Items in batches, ids in tensors, and how far a batch has come.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import BatchEncoding, ProcessorMixin, StoppingCriteria

from trol.data.answers import Answers
from trol.data.boards import chance_by_type
from trol.data.own_files import Pair, read_chats, read_text, shortened
from trol.data.pairs import NAMES, check_set, is_pairs
from trol.depth import trace
from trol.errors import HostError, UsageError, unknown
from trol.evaluation.items import (
    Item,
    blind_docstrings,
    board_items,
    chat_items,
    pair_items,
    text_items,
)
from trol.host.chat_templates import own_template

BATCH = 64
"""Questions answered at once."""

TOKENS_AT_ONCE = 4096
"""Tokens of the windows that are read together, one window at least."""

Heard = Callable[[float], None]
"""Is told how many items' worth of work is done."""


def batches(items: Sequence[Item], size: int = BATCH) -> Iterable[Sequence[Item]]:
    """The items in order, `size` at a time; of windows no more than `TOKENS_AT_ONCE` holds."""
    longest = max((len(item.ids) for item in items), default=0)
    if longest:
        size = max(1, min(size, TOKENS_AT_ONCE // longest))
    for start in range(0, len(items), size):
        yield items[start : start + size]


def padded(rows: Sequence[Sequence[int]], *, left: bool = False) -> BatchEncoding:
    """Rows of ids as `input_ids` and `attention_mask` [B, T]; what pads them is never read."""
    ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    real = torch.zeros_like(ids)
    for at, row in enumerate(rows):
        part = slice(-len(row), None) if left else slice(len(row))
        ids[at, part], real[at, part] = torch.tensor(row), 1
    return BatchEncoding({"input_ids": ids, "attention_mask": real})


class Told(StoppingCriteria):
    """Stops nothing: says how far a batch of answers has come, after each token.

    Args:
        heard: is told.
        before: items that were finished before the batch.
        rows: items of the batch.
        prompt: tokens of its prompts.
        most: new tokens at most.
    """

    def __init__(self, heard: Heard, before: int, rows: int, *, prompt: int, most: int) -> None:
        self.heard, self.before, self.rows = heard, before, rows
        self.prompt, self.most = prompt, most

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """Which rows are to stop: none. Shape: [B]."""
        del scores, kwargs
        self.heard(self.before + self.rows * (input_ids.shape[1] - self.prompt) / self.most)
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


WINDOW = 1024
"""Tokens of a window of plain text, or as many as the model has positions if these are fewer."""

TEXT_METRICS = ("rougeL", "rouge1", "rouge2", "exact", "contains", "loss")
"""What answers in sentences are measured by."""

PAPERS_NEW_TOKENS = 300
"""Longest answer to Alpaca in Glavas et al. (arXiv 2410.20022)."""


@dataclass(frozen=True)
class Task:
    """A set of items, what blind guessing gets, and what answers to them are measured by."""

    items: Callable[..., list[Item]]
    """(how many, seed, split="test") -> items, fewer where there are no more; the same on every
    call. `questions_of` calls it."""
    chance: Callable[[], dict[str, float]] = field(default=dict)
    """Type -> score of a guess without looking; empty where nobody has measured it."""
    metrics: tuple[str, ...] = TEXT_METRICS
    """Metrics that the task has references for, the one it is judged by first."""
    new_tokens: int = 64
    """Longest answer. Unit: tokens."""
    windows: bool = False
    """Whether items are windows of plain text: `items` then wants `tokenizer` and `window` too."""


TASKS: dict[str, Task] = {
    # Two words, a full stop and the end.
    "boards": Task(board_items, chance_by_type, ("exact", "loss"), new_tokens=4),
    "docstrings": Task(partial(pair_items, "docstrings"), lambda: dict(blind_docstrings())),
}
"""The built-in tasks by name."""

OWN = {"text": read_text, "chat": read_chats}
"""How a file of one's own is named (`text:FILE`) -> what reads it, and refuses what it is not."""

FORMS = (*TASKS, *(f"{form}:FILE" for form in OWN), *NAMES[1:])
"""All that a task can be called."""


def task_of(name: str) -> Task:
    """A built-in task, or the one of a file: `text:FILE`, `chat:FILE`, or pairs (`alpaca:FILE`).

    Raises:
        UsageError: there is no such task.
        DataError: its file is missing, or is not what the name says.
    """
    if name in TASKS:
        return TASKS[name]
    if is_pairs(name):
        check_set(name)
        return Task(partial(pair_items, name), new_tokens=PAPERS_NEW_TOKENS)
    form, colon, file = name.partition(":")
    if form not in OWN or not colon:
        raise _unknown(name)
    if not file:
        raise UsageError(f"{name!r} names no file; write {form}:FILE.")
    OWN[form](Path(file))
    if form == "chat":
        return Task(partial(chat_items, Path(file)))
    return Task(partial(text_items, Path(file)), metrics=("loss",), windows=True)


def _unknown(name: str) -> UsageError:
    if not Path(name).is_file():
        return unknown("task", name, FORMS)
    return UsageError(
        f"unknown task {name!r}. Did you mean text:{name} (plain text) or chat:{name} (JSON Lines "
        f"of messages, or of prompt and reference)? Known: {', '.join(sorted(FORMS))}."
    )


def check_tasks(names: Sequence[str]) -> None:
    """Raises `UsageError` where a task is unknown or none is named."""
    if not names:
        raise UsageError(f"no task named; choose among {', '.join(FORMS)}.")
    for name in names:
        task_of(name)


def default_task(processor: Any) -> str:
    """The built-in task for a model: boards if it sees, docstrings if it reads text alone."""
    return "boards" if isinstance(processor, ProcessorMixin) else "docstrings"


def questions_of(
    model: Any,
    processor: Any,
    name: str,
    count: int,
    *,
    seed: int,
    split: str = "test",
    window: int | None = None,
) -> list[Item]:
    """At most `count` items of a task, for this model; windows have `window` tokens.

    Raises:
        HostError: the task shows pictures, and this model cannot be shown any.
        UsageError: the model has fewer positions than a window has tokens.
    """
    task = task_of(name)
    if not task.windows:
        items = task.items(count, seed, split)
        check_reads(processor, name, items)
        return items
    most = positions_of(model)
    if window is not None and most is not None and window > most:
        raise UsageError(f"a window of {window} tokens, but the model has {most} positions.")
    window = window or min(WINDOW, most or WINDOW)
    return task.items(count, seed, split, tokenizer=tokenizer_of(processor), window=window)


def check_reads(processor: Any, name: str, items: Sequence[Item]) -> None:
    """Raises `HostError` where items have pictures and the model cannot be shown any."""
    if not any(item.shows for item in items):
        return
    if not isinstance(processor, ProcessorMixin):
        raise HostError(
            f"the task {name} shows pictures, but this model reads text alone; name a model that "
            "sees, or a task of text such as docstrings."
        )
    if own_template(processor) is None:
        raise HostError(
            f"the task {name} shows pictures, but {type(processor).__name__} has no chat template "
            "that says where they stand; give one with --chat-template."
        )


def cost_of(model: Any, processor: Any, item: Item, *, new_tokens: int) -> dict[str, Any]:
    """What answering one question costs, and how many tokens it took."""
    with trace(model) as seen:
        answers(model, processor, [item], new_tokens=new_tokens)
    return {**seen.cost.json(), "tokens": int(seen.real.sum())}


def answers(
    model: Any,
    processor: Any,
    items: Sequence[Item],
    *,
    new_tokens: int,
    batch: int = BATCH,
    heard: Heard = lambda done: None,
) -> list[str]:
    """Greedy answers of at most `new_tokens` tokens, in batches padded on the left.

    `heard` is told how far it has come, after each token of a batch.
    """
    given: list[str] = []
    for some in batches(items, batch):
        fitting = [fitted(model, processor, item, new_tokens) for item in some]
        inputs = prompts(processor, fitting).to(model.device)
        length = inputs["input_ids"].shape[1]
        told = Told(heard, len(given), len(some), prompt=length, most=new_tokens)
        with torch.inference_mode():
            tokens = model.generate(
                **inputs, max_new_tokens=new_tokens, do_sample=False, stopping_criteria=[told]
            )
        new = tokens[:, length:]
        given += tokenizer_of(processor).batch_decode(new, skip_special_tokens=True)
    return given


TEMPLATE_TOKENS = 32
"""Positions kept for what a chat template adds to a question."""


def positions_of(model: Any) -> int | None:
    """How many tokens the model reads at most; None where it does not say."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def fitted(model: Any, processor: Any, item: Item, new_tokens: int) -> Item:
    """The item, a question in text cut so that it and `new_tokens` fit the model's positions.

    A conversation first loses its oldest turns, a window its end.
    """
    most = positions_of(model)
    room = 0 if most is None else most - new_tokens - TEMPLATE_TOKENS
    if most is None or item.shows:
        return item
    if item.ids:
        return replace(item, ids=item.ids[: max(1, 2 * (most - new_tokens))])
    turns = messages(item)
    if sum(len(_said(turn)) for turn in turns) <= room:
        return item  # a token has a character at least
    if room < 1:
        raise UsageError(
            f"answers of {new_tokens} tokens leave no room for a question in the model's {most} "
            "positions; ask for shorter answers, or name a model with more positions."
        )
    tokenizer = tokenizer_of(processor)
    first = 1 if turns[0]["role"] == "system" else 0
    while len(turns) > first + 1 and _tokens(tokenizer, turns) > room:
        turns = [*turns[:first], *turns[first + 2 :]]  # a question and its answer
    room = max(1, room - _tokens(tokenizer, turns[:-1]))
    short = shortened(Pair(item.question, item.answer, item.type), tokenizer, question=room)
    last = {"role": "user", "content": [{"type": "text", "text": short.question}]}
    return replace(item, question=short.question, turns=(*turns[:-1], last) if item.turns else ())


def _said(turn: Any) -> str:
    return "".join(part["text"] for part in turn["content"])


def _tokens(tokenizer: Any, turns: Sequence[Any]) -> int:
    """Tokens of what is said, and about as many as a template adds to each turn after the first."""
    texts = (tokenizer(_said(t), add_special_tokens=False)["input_ids"] for t in turns)
    return sum(map(len, texts)) + TEMPLATE_TOKENS * max(0, len(turns) - 1)


def messages(item: Item, *, answered: bool = False) -> list[dict[str, Any]]:
    """The item as a conversation, with its reference as the assistant's turn if `answered`."""
    said = Pair(item.question, item.answer, item.type).messages()
    asked = [dict(turn) for turn in item.turns] or said[:1]
    if item.picture is not None:
        asked[0]["content"].insert(0, {"type": "image", "image": item.picture})
    return [*asked, said[1]] if answered else asked


def prompts(processor: Any, items: Sequence[Item]) -> Any:
    """The questions as one batch that `generate` takes, padded on the left.

    `processor` is a processor, or the tokenizer of a model that reads text alone. Windows of plain
    text are given up to their middle.
    """
    tokenizer = tokenizer_of(processor)
    if any(item.ids for item in items):
        return padded([item.ids[: (len(item.ids) + 1) // 2] for item in items], left=True)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"
    told = [messages(item) for item in items]
    batch = Answers(processor, plain=True).encoded(told, prompt=True, padding=True)
    batch.pop("assistant_masks")
    return batch


def tokenizer_of(processor: Any) -> Any:
    """A processor's tokenizer; a text model's processor is its tokenizer."""
    return getattr(processor, "tokenizer", processor)
