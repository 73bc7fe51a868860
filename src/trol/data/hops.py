"""Hops: questions that take one look-up after another, each of which has to wait for the last.

    ab bd ca de ec : 3 steps from a c        d b

A word of two letters leads from the first to the second; every letter leads to one letter and is
led to by one (a permutation, drawn anew for each question). A layer's attention looks up one step,
so k steps take k visits in a row. There is another way, which small tables allow: to gather all
words in one state, and to have the MLP know what any table answers.
"""

import random
from functools import cache

from trol.data.own_files import Pair, check_split, drawn, split_of

LETTERS = "abcdef"

STARTS = 3
"""Letters that each question starts from, answered in their order."""

MOST = 4
"""Most steps of a question."""

COUNTS = {"train": 120_000, "validation": 4_000, "test": 4_000}
"""Pairs of each split."""

WORDS = (
    *(first + second for first in LETTERS for second in LETTERS),
    *LETTERS,
    *map(str, range(1, MOST + 1)),
    *(":", "steps", "from"),
)
"""All words of questions and answers."""


def hop_pairs(split: str, *, most: int = 3, limit: int | None = None, seed: int = 0) -> list[Pair]:
    """Pairs of a split, of 1 to `most` steps in turn; their types are those of `kinds`.

    Which split a table of steps belongs to follows from the table alone: no table is in two.

    Raises:
        UsageError: an unknown split, or a limit below 1.
    """
    check_split(split)
    return drawn(_all(split, most), limit, seed)


def kinds(most: int) -> list[str]:
    """Types of questions of at most so many steps: `1 hop`, `2 hops`, ..."""
    return [f"{steps} hop{'s' * (steps > 1)}" for steps in range(1, most + 1)]


@cache
def _all(split: str, most: int) -> tuple[Pair, ...]:
    rng = random.Random(f"hops/{split}")
    pairs: list[Pair] = []
    while len(pairs) < COUNTS[split]:
        leads = dict(zip(LETTERS, rng.sample(LETTERS, len(LETTERS)), strict=True))
        if split_of("".join(leads.values())) == split:
            pairs.append(_pair(leads, 1 + len(pairs) % most, rng))
    return tuple(pairs)


def _pair(leads: dict[str, str], steps: int, rng: random.Random) -> Pair:
    words = [first + second for first, second in leads.items()]
    rng.shuffle(words)
    starts = rng.sample(LETTERS, STARTS)
    ends = starts
    for _ in range(steps):
        ends = [leads[end] for end in ends]
    question = f"{' '.join(words)} : {steps} steps from {' '.join(starts)}"
    return Pair(question, " ".join(ends), kinds(steps)[-1])
