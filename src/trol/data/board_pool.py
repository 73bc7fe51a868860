"""Many boards, drawn, asked about and tokenised once, then learnt from in many steps."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from trol.data.answers import Answers
from trol.data.boards import ASKERS, COLOURS, Board, caption, draw_array, make_board, questions
from trol.data.images import IMAGE_TOKEN
from trol.depth.roles import IGNORED_LABEL
from trol.host.chat_templates import encode_text

EMPTY = len(COLOURS), 10
"""Colour number and digit of a cell without a tile."""

EASY = tuple(ASKERS)[:4]
"""Types of question that need no comparison and no chain."""

MIX = (*ASKERS, "exists", "count", "relation", "hop1")
"""All types, those that are slow to learn twice as often."""

DRAWN_AT_ONCE = 256
"""Boards whose pictures are in memory together as arrays."""

TokenRow = tuple[list[int], list[int]]
"""Token ids of a conversation, and 1 where they are answer."""


@dataclass(frozen=True)
class Text:
    """One row's tokens, T of them."""

    ids: tuple[int, ...]
    answers: tuple[int, ...]
    """1 at answer tokens, 0 elsewhere."""
    parts: tuple[int, ...]
    """0 for the beginning that all tokens attend to, k > 0 for the k-th question behind it."""
    positions: tuple[int, ...]
    """Position of each token as if its question were the only one."""


@dataclass(frozen=True)
class BoardPool(Dataset[int]):
    """`len(pool)` boards of one split with the same number of questions each.

    An item is a board's number; `batch` makes a batch of such numbers, which is the collator.
    """

    pixels: Tensor | None
    """The image processor's pixels, if boards are drawn. Shape: [boards, 3, H, W]."""
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
        ids = _padded([text.ids for text in texts], self.pad_token_id)
        answers = _padded([text.answers for text in texts]).bool()
        rows = torch.as_tensor(indices)
        pictures = {} if self.pixels is None else {"pixel_values": self.pixels[rows]}
        return {
            **pictures,
            "input_ids": ids,
            "attention_mask": _attention_mask(_padded([text.parts for text in texts])),
            "position_ids": _padded([text.positions for text in texts]),
            "labels": ids.where(answers, IGNORED_LABEL),
            "cells": self.cells[rows],
        }


def _padded(rows: Sequence[Sequence[int]], fill: int = 0) -> Tensor:
    """Rows of integers as one tensor, padded on the right. Shape: [B, T]."""
    width = max(map(len, rows))
    return torch.tensor([[*row, *(fill,) * (width - len(row))] for row in rows])


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
    captions: bool = False,
) -> BoardPool:
    """The boards numbered first .. first + boards - 1 of a split.

    Args:
        processor: a TroL processor.
        split: train, validation or test.
        first: the first board's seed.
        boards: how many.
        turns_each: questions about each board.
        packed: share of the boards whose questions are conversations of their own, which share
            the picture and do not attend to each other; on other boards they are turns of one.
        easy: whether only the first four types are asked.
        fewest: tiles on a board, at least.
        drawn: whether the boards are drawn.
        captions: whether the first question about each asks for all of its cells.
    """
    grids = [make_board(split, first + i, fewest=fewest) for i in range(boards)]
    kinds = EASY if easy else MIX
    chats = [[(q.text, q.answer) for q in questions(b, turns_each, kinds=kinds)] for b in grids]
    if captions:
        chats = [[caption(board), *chat[1:]] for board, chat in zip(grids, chats, strict=True)]
    alone, chats = chats[: round(packed * boards)], chats[round(packed * boards) :]
    rows = _tokenised(processor, [[pair] for pairs in alone for pair in pairs] + chats)
    count = len(alone) * turns_each
    packs = [rows[i : i + turns_each] for i in range(0, count, turns_each)]
    return BoardPool(
        _pixels(processor, grids) if drawn else None,
        torch.tensor([_cells(board) for board in grids]),
        (*map(_packed, packs), *(_one(*row) for row in rows[count:])),
        processor.tokenizer.pad_token_id,
    )


def _one(ids: Sequence[int], answers: Sequence[int]) -> Text:
    """One conversation as a row."""
    length = len(ids)
    return Text(tuple(ids), tuple(answers), (0,) * length, tuple(range(length)))


def _packed(rows: Sequence[TokenRow]) -> Text:
    """Conversations with the same beginning as one row: the beginning once, then their rests."""
    prompt = min(marks.index(1) for _, marks in rows)  # each keeps its own prompt's end
    shared = next((i for i in range(prompt) if len({row[0][i] for row in rows}) > 1), prompt - 1)
    ids, answers = list(rows[0][0][:shared]), [0] * shared
    parts, positions = [0] * shared, list(range(shared))
    for number, (row, marks) in enumerate(rows, start=1):
        ids += row[shared:]
        answers += marks[shared:]
        parts += [number] * (len(row) - shared)
        positions += range(shared, len(row))
    return Text(tuple(ids), tuple(answers), tuple(parts), tuple(positions))


def _attention_mask(parts: Tensor) -> Tensor:
    """True from a token to earlier ones of its own part or of part 0. Shape: [B, 1, T, T]."""
    width = parts.shape[1]
    earlier = torch.ones(width, width, dtype=torch.bool).tril()
    same = parts[:, :, None] == parts[:, None, :]
    return (earlier & (same | (parts == 0)[:, None, :]))[:, None]


def _tokenised(processor: Any, chats: Sequence[Sequence[tuple[str, str]]]) -> list[TokenRow]:
    """All conversations through the chat template, their pictures already expanded."""
    answers, picture = Answers(processor), processor.replace_image_token({}, 0)
    texts = []
    for pairs in chats:
        messages: list[dict[str, Any]] = [
            {"role": role, "content": [{"type": "text", "text": text}]}
            for pair in pairs
            for role, text in zip(("user", "assistant"), pair, strict=True)
        ]
        messages[0]["content"].insert(0, {"type": "image"})
        _, pieces = answers.cut(messages)
        texts.append([piece.replace(IMAGE_TOKEN, picture) for piece in pieces])
    encoded = encode_text(processor.tokenizer, texts, (), padding=False)
    return list(zip(encoded["input_ids"], encoded["assistant_masks"], strict=True))


def _pixels(processor: Any, boards: Sequence[Board]) -> Tensor:
    parts = []
    for start in range(0, len(boards), DRAWN_AT_ONCE):
        pictures = [draw_array(board) for board in boards[start : start + DRAWN_AT_ONCE]]
        pixels = processor.image_processor(pictures, return_tensors="np")["pixel_values"]
        parts.append(torch.from_numpy(np.ascontiguousarray(pixels)))
    return torch.cat(parts)


def _cells(board: Board) -> list[tuple[int, int]]:
    colours = list(COLOURS)
    return [
        EMPTY if tile is None else (colours.index(tile.colour), tile.digit) for tile in board.cells
    ]
