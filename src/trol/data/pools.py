"""Pools: many boards, drawn, asked about and tokenised once, then learnt from in many steps.

The order of an epoch: seeded, the same on every machine, cut into equal shares for the ranks.

Training on data with damaged rows: they are named, counted, and replaced by sound ones.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from trol.data.boards import ASKERS, COLOURS, Board, draw_array, make_board, questions
from trol.data.chat import IGNORED, padded, turns
from trol.data.formats import row_errors
from trol.errors import DataError, UsageError

EMPTY = len(COLOURS), 10
"""Colour number and digit of a cell without a tile."""

EASY = tuple(ASKERS)[:4]
"""Types of question that need no comparison and no chain."""

MIX = (*ASKERS, "exists", "count", "relation", "hop1")
"""All types, those that are slow to learn twice as often."""

DRAWN_AT_ONCE = 256

TokenRow = tuple[list[int], list[int]]
"""Token ids of a conversation, and 1 where they are answer."""


@dataclass(frozen=True)
class Text:
    """One row's tokens, T of them."""

    ids: tuple[int, ...]
    answers: tuple[int, ...]
    """1 at answer tokens, 0 elsewhere."""
    parts: tuple[int, ...]
    """0 for what every token may look back to, k > 0 for the k-th question packed behind it."""
    positions: tuple[int, ...]
    """Where each token would stand if its question were the only one."""


@dataclass(frozen=True)
class BoardPool(Dataset[int]):
    """`len(pool)` boards of one split with the same number of questions each.

    An item is a board's number; `batch` makes a batch of such numbers, which is the collator.
    """

    pixels: Tensor | None
    """What the image processor made of the pictures, if any. Shape: [boards, 3, H, W]."""
    cells: Tensor
    """Colour number and digit of each cell. Shape: [boards, 9, 2]."""
    texts: tuple[Text, ...]
    pad_token_id: int

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, index: int) -> int:
        return index

    def batch(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """Ids, labels, positions [B, T], mask [B, 1, T, T], pixels and cells of these boards."""
        texts = [self.texts[i] for i in indices]
        ids = padded([text.ids for text in texts], self.pad_token_id)
        answers = padded([text.answers for text in texts], 0).bool()
        where = torch.as_tensor(indices)
        pictures = {} if self.pixels is None else {"pixel_values": self.pixels[where]}
        return {
            **pictures,
            "input_ids": ids,
            "attention_mask": _sight(padded([text.parts for text in texts], 0)),
            "position_ids": padded([text.positions for text in texts], 0),
            "labels": ids.where(answers, IGNORED),
            "cells": self.cells[where],
        }


def board_pool(
    processor: Any,
    split: str,
    *,
    first: int,
    boards: int,
    turns_each: int,
    packed: float = 1.0,
    easy: bool = False,
    fewest: int = 4,
    drawn: bool = True,
) -> BoardPool:
    """The boards numbered first .. first + boards - 1 of a split.

    Args:
        processor: a TroL processor.
        split: train, validation or test.
        first: the first board's seed.
        boards: how many.
        turns_each: questions about each board.
        packed: share of the boards whose questions are conversations of their own that share the
            picture and do not see each other; the questions of the others are turns of one.
        easy: whether only the first four types are asked.
        fewest: tiles on a board, at least.
        drawn: whether the boards are drawn.
    """
    made = [make_board(split, first + i, fewest=fewest) for i in range(boards)]
    kinds = EASY if easy else MIX
    asked = [[(q.text, q.answer) for q in questions(b, turns_each, kinds=kinds)] for b in made]
    alone = [[pair] for pairs in asked[: round(packed * boards)] for pair in pairs]
    chats = asked[round(packed * boards) :]
    rows = _tokenised(processor, alone + chats)
    single, rest = rows[: len(alone)], rows[len(alone) :]
    packs = [single[i : i + turns_each] for i in range(0, len(single), turns_each)]
    texts = [_packed(pack) for pack in packs] + [_one(ids, answers) for ids, answers in rest]
    return BoardPool(
        _pixels(processor, made) if drawn else None,
        torch.tensor([_cells(board) for board in made]),
        tuple(texts),
        processor.tokenizer.pad_token_id,
    )


def _one(ids: Sequence[int], answers: Sequence[int]) -> Text:
    """A row that is one conversation."""
    length = len(ids)
    return Text(tuple(ids), tuple(answers), (0,) * length, tuple(range(length)))


def _packed(rows: Sequence[TokenRow]) -> Text:
    """Conversations with the same beginning as one row: the beginning once, then their rests."""
    asked = min(marks.index(1) for _, marks in rows)  # each keeps its own prompt's end
    shared = next((i for i in range(asked) if len({row[0][i] for row in rows}) > 1), asked - 1)
    ids, answers = list(rows[0][0][:shared]), [0] * shared
    parts, positions = [0] * shared, list(range(shared))
    for number, (row, marks) in enumerate(rows, start=1):
        ids += row[shared:]
        answers += marks[shared:]
        parts += [number] * (len(row) - shared)
        positions += range(shared, len(row))
    return Text(tuple(ids), tuple(answers), tuple(parts), tuple(positions))


def _sight(parts: Tensor) -> Tensor:
    """Who may look at whom: earlier tokens of one's own part or of part 0. Shape: [B, 1, T, T]."""
    width = parts.shape[1]
    earlier = torch.ones(width, width, dtype=torch.bool).tril()
    same = parts[:, :, None] == parts[:, None, :]
    return (earlier & (same | (parts == 0)[:, None, :]))[:, None]


def _tokenised(processor: Any, asked: Sequence[Sequence[tuple[str, str]]]) -> list[TokenRow]:
    """All conversations through the chat template at once, their pictures already expanded."""
    picture = processor.image_token * processor.tokens_per_image
    conversations = []
    for pairs in asked:
        messages = [
            {"role": message["role"], "content": message["content"][0]["text"]}
            for message in turns(pairs)
        ]
        messages[0]["content"] = picture + messages[0]["content"]
        conversations.append(messages)
    encoded = processor.tokenizer.apply_chat_template(
        conversations,
        chat_template=processor.chat_template,
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    return list(zip(encoded["input_ids"], encoded["assistant_masks"], strict=True))


def _pixels(processor: Any, boards: Sequence[Board]) -> Tensor:
    parts = []
    for start in range(0, len(boards), DRAWN_AT_ONCE):
        pictures = [draw_array(board) for board in boards[start : start + DRAWN_AT_ONCE]]
        made = processor.image_processor(pictures, return_tensors="np")["pixel_values"]
        parts.append(torch.from_numpy(np.ascontiguousarray(made)))
    return torch.cat(parts)


def _cells(board: Board) -> list[tuple[int, int]]:
    colours = list(COLOURS)
    return [
        EMPTY if tile is None else (colours.index(tile.colour), tile.digit) for tile in board.cells
    ]


BATCHES_SORTED = 64
"""Batches (of all ranks) whose rows are sorted by length together."""


def order(count: int, *, seed: int, epoch: int) -> np.ndarray:
    """Rows 0 .. count - 1 in the random order of this seed and epoch. Shape: [count], int64."""
    return np.random.default_rng([seed, epoch]).permutation(count)


def grouped_order(
    lengths: Sequence[int] | np.ndarray, batch: int, *, seed: int, epoch: int
) -> np.ndarray:
    """As `order`, but each run of `batch` rows has similar lengths. Shape: [len(lengths)], int64.

    Rows are shuffled, sorted by length among `BATCHES_SORTED` batches at a time, and the
    batches shuffled again; rows that fill no batch come last.
    """
    rows, known = order(len(lengths), seed=seed, epoch=epoch), np.asarray(lengths)
    pool = batch * BATCHES_SORTED
    pools = [rows[at : at + pool] for at in range(0, len(rows), pool)]
    ranked = [part[np.argsort(-known[part], kind="stable")] for part in pools]
    rows = np.concatenate([rows[:0], *ranked])
    full = len(rows) // batch
    # A draw of its own, so that batches do not move as the rows did.
    moved = np.random.default_rng([seed, epoch, 1]).permutation(full)
    batches = rows[: full * batch].reshape(full, batch)[moved]
    return np.concatenate([batches.ravel(), rows[full * batch :]])


class ShardedOrder(Sampler[int]):
    """The rows of one rank, epoch after epoch: disjoint from those of other ranks, and as many.

    With `lengths` given, rows of a batch have similar lengths, on all ranks at once. Of a number
    of rows that the ranks do not divide, the last `count % ranks` of an epoch's order are left
    out; they are others in each epoch. It does not depend on how many workers load the rows.
    """

    def __init__(
        self,
        count: int,
        batch: int,
        *,
        seed: int = 0,
        rank: int = 0,
        ranks: int = 1,
        lengths: Sequence[int] | np.ndarray | None = None,
    ) -> None:
        """Order of `count` rows for batches of `batch` rows per rank."""
        if not 0 <= rank < ranks:
            raise UsageError(f"rank {rank} of {ranks} ranks; ranks are numbered from 0.")
        if batch < 1 or seed < 0:
            raise UsageError(f"batch is {batch}, seed {seed}; give a batch >= 1 and a seed >= 0.")
        if lengths is not None and len(lengths) != count:
            raise UsageError(f"{len(lengths)} lengths for {count} rows; give one for each row.")
        self.count, self.batch, self.seed = count, batch, seed
        self.rank, self.ranks, self.lengths = rank, ranks, lengths
        self.epoch, self.done = 0, 0

    def set_epoch(self, epoch: int, done: int = 0) -> None:
        """The next iteration is epoch `epoch`, without the first `done` rows of this rank."""
        self.epoch, self.done = epoch, done

    def __len__(self) -> int:
        return max(self.count // self.ranks - self.done, 0)

    def __iter__(self) -> Iterator[int]:
        return iter(self._share()[self.done :].tolist())

    def _share(self) -> np.ndarray:
        """All rows of this rank in this epoch. Shape: [count // ranks]."""
        wide = self.batch * self.ranks  # one batch of every rank
        if self.lengths is None:
            rows = order(self.count, seed=self.seed, epoch=self.epoch)
        else:
            rows = grouped_order(self.lengths, wide, seed=self.seed, epoch=self.epoch)
        # Neighbours go to different ranks: each rank's batch b comes from the same `wide` rows.
        return rows[: self.count // self.ranks * self.ranks][self.rank :: self.ranks]


TOLD = 5
"""Rows that are named when they are left out; all of them are counted."""

TRIED = 1000
"""Rows that are tried in the place of one before the data are given up."""


class SoundRows(Dataset[int]):
    """Rows of which only those come into a batch that can be learnt from. Item i is i itself.

    In the place of a damaged row comes another, always the same; so ranks stay in step, and a run
    that is resumed goes on as it would have. Of rows that are sound alone and make no batch
    together the later ones are left out.

    Args:
        rows: a map-style dataset whose rows may be damaged.
        collate: rows to a batch.
        where: file and number of a row, for people.
    """

    def __init__(self, rows: Any, collate: Callable[..., Any], where: Callable[[int], str]) -> None:
        self.rows, self.collate, self.where = rows, collate, where
        self.mixture = getattr(rows, "mixture", None)
        self.left_out: dict[int, str] = {}
        """Number of a row -> file, number and what is wrong, in the order of being met."""

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
            return self._together([self._sound(number) for number in numbers])

    def _sound(self, number: int) -> int:
        """The row itself, or the first sound one in the order that belongs to it."""
        if self._is_sound([number]):
            return number
        others = order(len(self), seed=0, epoch=number)[:TRIED]
        for other in others:
            if self._is_sound([int(other)]):
                return int(other)
        reasons = list(self.left_out.values())
        raise DataError(
            f"none of the {len(others):,} rows that were tried can be learnt from: "
            f"{' | '.join(reasons[:3])}"
        )

    def _together(self, numbers: Sequence[int]) -> Any:
        kept = [numbers[0]]
        for number in numbers[1:]:
            if self._is_sound([*kept, number]):
                kept.append(number)
        return self.collate([self.rows[number] for number in kept])

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
        if len(self.left_out) <= TOLD:
            more = "; more are counted without a word" if len(self.left_out) == TOLD else ""
            warnings.warn(f"left out {self.left_out[number]}{more}", stacklevel=2)
