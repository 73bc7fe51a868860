"""Pools: many boards, drawn, asked about and tokenised once, then learnt from in many steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from trol.data.boards import COLOURS, Board, draw_array, make_board
from trol.data.chat import IGNORED, turns
from trol.data.questions import ASKERS, questions

EMPTY = len(COLOURS), 10
"""Colour number and digit of a cell without a tile."""

EASY = tuple(ASKERS)[:4]
"""Types of question that need no comparison and no chain."""

DRAWN_AT_ONCE = 256


@dataclass(frozen=True)
class BoardPool(Dataset[int]):
    """`len(pool)` boards of one split with the same number of questions each.

    An item is a board's number; `batch` makes a batch of such numbers, which is the collator.
    """

    pixels: Tensor
    """What the image processor made of the pictures. Shape: [boards, 3, H, W]."""
    cells: Tensor
    """Colour number and digit of each cell. Shape: [boards, 9, 2]."""
    ids: tuple[tuple[int, ...], ...]
    """Token ids of each conversation."""
    answers: tuple[tuple[int, ...], ...]
    """1 at answer tokens, 0 elsewhere."""
    pad_token_id: int

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> int:
        return index

    def batch(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """Token ids, padding mask, labels [B, T], pixels and cells of these boards."""
        width = max(len(self.ids[i]) for i in indices)
        ids = torch.full((len(indices), width), self.pad_token_id)
        labels = torch.full((len(indices), width), IGNORED)
        mask = torch.zeros(len(indices), width, dtype=torch.long)
        for row, i in enumerate(indices):
            tokens = torch.tensor(self.ids[i])
            answers = torch.tensor(self.answers[i], dtype=torch.bool)
            ids[row, : len(tokens)], mask[row, : len(tokens)] = tokens, 1
            labels[row, : len(tokens)] = tokens.where(answers, IGNORED)
        where = torch.as_tensor(indices)
        return {
            "input_ids": ids,
            "attention_mask": mask,
            "labels": labels,
            "pixel_values": self.pixels[where],
            "cells": self.cells[where],
        }


def board_pool(
    processor: Any,
    split: str,
    *,
    first: int,
    boards: int,
    turns_each: int,
    easy: bool = False,
    fewest: int = 4,
) -> BoardPool:
    """The boards numbered first .. first + boards - 1 of a split.

    Args:
        processor: a TroL processor.
        split: train, validation or test.
        first: the first board's seed.
        boards: how many.
        turns_each: questions in each conversation.
        easy: whether only the first four types are asked.
        fewest: tiles on a board, at least.
    """
    made = [make_board(split, first + i, fewest=fewest) for i in range(boards)]
    kinds = EASY if easy else None
    asked = [[(q.text, q.answer) for q in questions(b, turns_each, kinds=kinds)] for b in made]
    ids, answers = _tokenised(processor, asked)
    return BoardPool(
        _pixels(processor, made),
        torch.tensor([_cells(board) for board in made]),
        ids,
        answers,
        processor.tokenizer.pad_token_id,
    )


def _tokenised(
    processor: Any, asked: Sequence[Sequence[tuple[str, str]]]
) -> tuple[tuple[tuple[int, ...], ...], tuple[tuple[int, ...], ...]]:
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
    rows = zip(encoded["input_ids"], encoded["assistant_masks"], strict=True)
    pairs = [(tuple(ids), tuple(masks)) for ids, masks in rows]
    return tuple(ids for ids, _ in pairs), tuple(masks for _, masks in pairs)


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
