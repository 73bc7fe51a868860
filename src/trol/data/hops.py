"""Hops: questions that take one look-up after another, each of which has to wait for the last.

    ab bd ca dc : 2 steps from a        d b c c a

A word of two letters leads from the first to the second; every letter leads to one letter and is
led to by one (a permutation, drawn anew for each question). The question ends with a letter, and
the answer begins with the one that so many steps lead to; then it names the next letter of the
alphabet and where that leads, and so on. Each look-up begins at a letter that stands there: one
visit of a layer takes one step, so k steps take k visits in a row. There is another way, which
small tables and wide MLPs allow: to gather all words in one state, and to know what tables answer.
"""

import random
from functools import cache

from trol.data.own_files import Pair, check_split, drawn, split_of

LETTERS = "abcdefgh"

STARTS = 3
"""Letters that each question starts from: one, and those that follow it in the alphabet."""

ANSWER = 2 * STARTS - 1
"""Letters of an answer; every second one, from the first, is where a letter leads."""

MOST = 4
"""Most steps of a question."""

COUNTS = {"train": 130_000, "validation": 4_000, "test": 4_000}
"""Pairs of each split."""

WORDS = (
    *(first + second for first in LETTERS for second in LETTERS),
    *LETTERS,
    *map(str, range(1, MOST + 1)),
    *(":", "steps", "from"),
)
"""All words of questions and answers."""


def hop_pairs(split: str, *, most: int = 2, limit: int | None = None, seed: int = 0) -> list[Pair]:
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
    first = rng.randrange(len(LETTERS))
    starts = [LETTERS[(first + place) % len(LETTERS)] for place in range(STARTS)]
    ends = starts
    for _ in range(steps):
        ends = [leads[end] for end in ends]
    question = f"{' '.join(words)} : {steps} steps from {starts[0]}"
    answer = " ".join(f"{start} {end}" for start, end in zip(starts, ends, strict=True))
    return Pair(question, answer.removeprefix(f"{starts[0]} "), kinds(steps)[-1])
