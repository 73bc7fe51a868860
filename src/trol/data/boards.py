"""Boards: pictures of 3x3 grids of handwritten digits on coloured tiles, and questions about them.

A board is drawn from (split, seed) alone. The digits are the 1,797 8x8 scans that scikit-learn
carries; each split owns its scans, so no test scan is ever seen in training. Every question has a
type and one right answer:

- `what is right of the red 7?` asks for the tile in the very next cell (likewise left, above,
  below); it is asked only where that cell is filled. Hops chain: `what is right of the digit
  above the red 7?`. No chain steps straight back.
- `is the red 7 left of the blue 3?` compares columns (rows for above and below) wherever on the
  board the two tiles are; it is asked only where these differ.
- `are there more red tiles than blue tiles?` is `no` for equal numbers.
"""

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial

import numpy as np
import torch
from PIL import Image
from torch.nn import functional

from trol.errors import UsageError, unknown

SIDE = 3
"""Cells per row and per column."""

CELL_PIXELS = 16
"""Width and height of one cell in pixels; a patch of this size sees exactly one cell."""

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (200, 50, 45),
    "green": (50, 150, 65),
    "blue": (50, 85, 200),
    "yellow": (225, 190, 45),
    "purple": (140, 60, 165),
}
"""Tile colour by name, RGB 0-255."""

SPLITS: dict[str, float] = {"train": 0.7, "validation": 0.1, "test": 0.2}
"""Share of the scans that each split owns."""

WORDS = (
    *COLOURS,
    *map(str, range(10)),
    *("yes", "no", "digit", "colour", "tile", "tiles", "show", "centre", "middle"),
    *("top", "bottom", "left", "right", "above", "below", "in", "on", "of", "the", "a", "an"),
    *("is", "are", "there", "how", "many", "more", "than", "what", "which", "?"),
)
"""All words of all questions and answers."""

NOTHING = "nothing"
"""The word for a cell without a tile, where cells are named one after another."""

_FLOOR = (236, 234, 228)
_INK = (20, 20, 24)
_SPLIT_SEED = 20240913
_VARIANTS = 8


@dataclass(frozen=True)
class Tile:
    """One filled cell: a colour name, a digit 0-9, and the number of the scan that shows it."""

    colour: str
    digit: int
    scan: int

    @property
    def name(self) -> str:
        """The tile's name in sentences, for example `red 7`."""
        return f"{self.colour} {self.digit}"


@dataclass(frozen=True)
class Board:
    """Nine cells in reading order, each a tile or empty; no two tiles share colour and digit."""

    split: str
    seed: int
    cells: tuple[Tile | None, ...]

    @property
    def tiles(self) -> dict[int, Tile]:
        """Cell number (0-8, reading order) -> tile, filled cells only."""
        return {place: tile for place, tile in enumerate(self.cells) if tile is not None}


def split_scans(split: str) -> dict[int, tuple[int, ...]]:
    """Digit 0-9 -> the numbers of the scans of it that this split owns."""
    if split not in SPLITS:
        raise unknown("split", split, SPLITS)
    return _scans_by_split()[split]


def make_board(split: str, seed: int, *, fewest: int = 4, most: int = 9) -> Board:
    """The board of this split and seed, with `fewest` to `most` tiles (1-9) on it."""
    if not 1 <= fewest <= most <= SIDE * SIDE:
        raise UsageError(
            f"a board cannot have {fewest} to {most} tiles; give 1 <= fewest <= most <= 9."
        )
    scans = split_scans(split)
    rng = random.Random(f"board/{split}/{seed}")
    count = rng.randint(fewest, most)
    names = tuple(COLOURS)
    cells: list[Tile | None] = [None] * (SIDE * SIDE)
    pairs = rng.sample(range(len(names) * 10), count)  # distinct: "the red 7" is one tile
    for place, pair in zip(rng.sample(range(SIDE * SIDE), count), pairs, strict=True):
        digit = pair % 10
        cells[place] = Tile(names[pair // 10], digit, rng.choice(scans[digit]))
    return Board(split, seed, tuple(cells))


def draw(board: Board, *, vary: bool | None = None) -> Image.Image:
    """The board as a 48x48 RGB picture; see `draw_array`."""
    return Image.fromarray(draw_array(board, vary=vary))


def draw_array(board: Board, *, vary: bool | None = None) -> np.ndarray:
    """The board as uint8 pixels [48, 48, 3], the same on every call.

    `vary` turns, scales and shifts each scan a little and varies light and noise; by default
    it is on for the train split and off for the others.
    """
    vary = board.split == "train" if vary is None else vary
    rng = np.random.default_rng([board.seed & 0xFFFFFFFF, len(board.split)])
    side = SIDE * CELL_PIXELS
    pixels = np.empty((side, side, 3), np.float32)
    pixels[:] = _FLOOR
    variants = rng.integers(1, _VARIANTS, SIDE * SIDE) if vary else np.zeros(SIDE * SIDE, int)
    for place, tile in board.tiles.items():
        top, left = (CELL_PIXELS * n for n in divmod(place, SIDE))
        ink = _inks()[tile.scan, variants[place], :, :, None]
        face = ink * _INK_ARRAY + (1 - ink) * _COLOUR_ARRAYS[tile.colour]
        pixels[top + 1 : top + CELL_PIXELS - 1, left + 1 : left + CELL_PIXELS - 1] = face
    if vary:
        pixels *= rng.uniform(0.85, 1.1)
        pixels += rng.standard_normal(pixels.shape, np.float32) * 6
    return np.clip(pixels, 0, 255).astype(np.uint8)


_INK_ARRAY = np.array(_INK, np.float32)
_COLOUR_ARRAYS = {name: np.array(rgb, np.float32) for name, rgb in COLOURS.items()}


@cache
def _digits() -> tuple[np.ndarray, np.ndarray]:
    """All scans as ink [S, 8, 8] in 0-1, and their digits [S]."""
    from sklearn.datasets import load_digits  # noqa: PLC0415 - heavy, and only boards need it

    ink, digits = load_digits(return_X_y=True)
    return np.asarray(ink, np.float32).reshape(-1, 8, 8) / 16, np.asarray(digits)


@cache
def _scans_by_split() -> dict[str, dict[int, tuple[int, ...]]]:
    """Split -> digit -> scan numbers, every digit cut by the same shares."""
    digits = _digits()[1]
    rng = np.random.default_rng(_SPLIT_SEED)
    scans: dict[str, dict[int, tuple[int, ...]]] = {split: {} for split in SPLITS}
    for digit in range(10):
        numbers = rng.permutation(np.flatnonzero(digits == digit))
        ends = np.round(np.cumsum(list(SPLITS.values())) * len(numbers)).astype(int)
        for split, part in zip(SPLITS, np.split(numbers, ends[:-1]), strict=True):
            scans[split][digit] = tuple(int(n) for n in part)
    return scans


@cache
def _inks() -> np.ndarray:
    """Ink [S, V, 14, 14] in 0-1 of every scan: variant 0 is upright, the others vary it."""
    scans = torch.from_numpy(_digits()[0])[:, None]  # Shape: [S, 1, 8, 8]
    gen = torch.Generator().manual_seed(_SPLIT_SEED)
    size = CELL_PIXELS - 2
    inks = [_warp(scans, size=size, gen=gen, strength=float(v > 0)) for v in range(_VARIANTS)]
    return torch.stack(inks, 1).numpy()


def _warp(scans: torch.Tensor, *, size: int, gen: torch.Generator, strength: float) -> torch.Tensor:
    """Scans [S, 1, 8, 8] -> [S, size, size], turned <= 12 deg, scaled 12 %, moved 1 pixel."""
    count = len(scans)

    def spread(width: float) -> torch.Tensor:
        return (torch.rand(count, generator=gen) * 2 - 1) * width * strength

    angle, scale = spread(0.21), 1.1 * (1 + spread(0.12))
    cos, sin = angle.cos() * scale, angle.sin() * scale
    rows = torch.stack([cos, -sin, spread(0.15), sin, cos, spread(0.15)], 1)
    grid = functional.affine_grid(rows.view(count, 2, 3), [count, 1, size, size], False)
    warped = functional.grid_sample(scans, grid, padding_mode="zeros", align_corners=False)
    return warped[:, 0].clamp(0, 1)


PLACES: tuple[str, ...] = (
    *("top left", "top middle", "top right"),
    *("middle left", "centre", "middle right"),
    *("bottom left", "bottom middle", "bottom right"),
)
"""Names of the cells 0-8, reading order."""

STEPS: dict[str, tuple[int, int]] = {
    "left of": (0, -1),
    "right of": (0, 1),
    "above": (-1, 0),
    "below": (1, 0),
}
"""Direction -> (rows, columns) moved."""


@dataclass(frozen=True)
class Question:
    """One question about a board: its type, the sentence, and the right answer."""

    type: str
    text: str
    answer: str


Asker = Callable[[Board, random.Random], tuple[str, str] | None]
"""Makes a question and its answer, or None where the board allows none."""


def ask(board: Board, kind: str, rng: random.Random) -> Question | None:
    """A question of type `kind` about the board, or None where the board allows none."""
    if kind not in ASKERS:
        raise unknown("question type", kind, ASKERS)
    sentences = ASKERS[kind](board, rng)
    return None if sentences is None else Question(kind, *sentences)


def questions(
    board: Board, count: int, *, kinds: Sequence[str] | None = None, salt: int = 0
) -> list[Question]:
    """`count` questions about the board, the same on every call.

    `kinds` is cycled through in shuffled order (default: all types, each as often as the
    others); a type that the board does not allow gives way to the next.
    """
    if count < 1:
        raise UsageError(f"a board needs at least 1 question, got count={count}.")
    rng = random.Random(f"questions/{board.split}/{board.seed}/{salt}")
    types = list(ASKERS if kinds is None else kinds)
    results: list[Question] = []
    for attempt in range(20 * count * len(types)):
        if attempt % len(types) == 0:
            rng.shuffle(types)
        question = ask(board, types[attempt % len(types)], rng)
        if question is not None:
            results.append(question)
            if len(results) == count:
                return results
    raise UsageError(f"board {board.split}/{board.seed} allows no question of {types}; add types.")


def caption(board: Board) -> tuple[str, str]:
    """A question, and all nine cells in reading order: `red 7 nothing blue 3 ...`."""
    cells = (NOTHING if tile is None else tile.name for tile in board.cells)
    return "what tiles are there?", " ".join(cells)


def chance_by_type(*, boards: int = 2000, split: str = "validation") -> dict[str, float]:
    """Type -> accuracy (0-1) of the better of two blind guesses, measured on `boards` boards.

    The guesses: always the type's most frequent answer, and the colour, digit or name of a
    tile picked at random from those that are on the board.
    """
    return dict(_chance(boards, split))


@cache
def _chance(boards: int, split: str) -> tuple[tuple[str, float], ...]:
    answers: dict[str, Counter[str]] = {kind: Counter() for kind in ASKERS}
    lucky = dict.fromkeys(ASKERS, 0.0)
    for seed in range(boards):
        board = make_board(split, seed)
        tiles = list(board.tiles.values())
        for kind in ASKERS:
            question = ask(board, kind, random.Random(f"chance/{kind}/{seed}"))
            if question is None:
                continue
            answers[kind][question.answer] += 1
            guesses = [(tile.colour, str(tile.digit), tile.name) for tile in tiles]
            lucky[kind] += sum(question.answer in guess for guess in guesses) / len(guesses)
    return tuple(
        (kind, max(*counts.values(), lucky[kind]) / counts.total())
        for kind, counts in answers.items()
    )


def _ask_digit(board: Board, rng: random.Random) -> tuple[str, str] | None:
    place, tile = rng.choice(list(board.tiles.items()))
    alone = sum(other.colour == tile.colour for other in board.tiles.values()) == 1
    if alone and rng.random() < 0.7:
        return f"which digit is on the {tile.colour} tile?", str(tile.digit)
    return f"which digit is in the {PLACES[place]}?", str(tile.digit)


def _ask_colour(board: Board, rng: random.Random) -> tuple[str, str] | None:
    place, tile = rng.choice(list(board.tiles.items()))
    alone = sum(other.digit == tile.digit for other in board.tiles.values()) == 1
    if alone and rng.random() < 0.7:
        return f"what colour is the {tile.digit}?", tile.colour
    return f"what colour is the tile in the {PLACES[place]}?", tile.colour


def _ask_exists(board: Board, rng: random.Random) -> tuple[str, str] | None:
    tiles = list(board.tiles.values())
    form, yes = rng.randrange(3), rng.random() < 0.5
    if form == 0:
        names, present = [f"{c} tile" for c in COLOURS], {f"{t.colour} tile" for t in tiles}
    elif form == 1:
        names, present = [str(n) for n in range(10)], {str(t.digit) for t in tiles}
    else:
        present = {t.name for t in tiles}
        names = [f"{a.colour} {b.digit}" for a in tiles for b in tiles]  # parts present, or not
        names += [f"{c} {rng.randrange(10)}" for c in COLOURS]
    fitting = [name for name in names if (name in present) == yes]
    if not fitting:
        return None
    name = rng.choice(fitting)
    article = "an" if name == "8" else "a"
    return f"is there {article} {name}?", "yes" if yes else "no"


def _ask_count(board: Board, rng: random.Random) -> tuple[str, str] | None:
    tiles, draw = list(board.tiles.values()), rng.random()
    if draw < 0.15:
        return "how many tiles are there?", str(len(tiles))
    if draw < 0.65:
        counts = {name: sum(t.colour == name for t in tiles) for name in COLOURS}
        name = _evenly(counts, rng)
        return f"how many {name} tiles are there?", str(counts[name])
    counts = {str(n): sum(t.digit == n for t in tiles) for n in range(10)}
    name = _evenly(counts, rng)
    return f"how many tiles show {'an' if name == '8' else 'a'} {name}?", str(counts[name])


def _evenly(counts: dict[str, int], rng: random.Random) -> str:
    """A name, such that each number that occurs is equally likely."""
    number = rng.choice(sorted(set(counts.values())))
    return rng.choice([name for name, count in counts.items() if count == number])


def _ask_compare(board: Board, rng: random.Random) -> tuple[str, str] | None:
    counts = Counter(tile.colour for tile in board.tiles.values())
    yes = rng.random() < 0.5
    pairs = [
        (a, b)
        for a in COLOURS
        for b in COLOURS
        if a != b and (counts[a] or counts[b]) and (counts[a] > counts[b]) == yes
    ]
    if not pairs:
        return None
    a, b = rng.choice(pairs)
    return f"are there more {a} tiles than {b} tiles?", "yes" if yes else "no"


def _ask_relation(board: Board, rng: random.Random) -> tuple[str, str] | None:
    if len(board.tiles) < 2:
        return None
    (here, tile), (there, other) = rng.sample(list(board.tiles.items()), 2)
    rows, columns = (a - b for a, b in zip(divmod(here, SIDE), divmod(there, SIDE), strict=True))
    name = rng.choice(list(STEPS))
    sign = rows * STEPS[name][0] + columns * STEPS[name][1]  # > 0: `here` lies in that direction
    if sign == 0:
        return None
    return f"is the {tile.name} {name} the {other.name}?", "yes" if sign > 0 else "no"


def _ask_hops(board: Board, rng: random.Random, hops: int) -> tuple[str, str] | None:
    tiles = board.tiles
    place, start = rng.choice(list(tiles.items()))
    phrase, back = f"the {start.name}", (0, 0)
    for hop in range(hops):
        ways = [
            (name, place + SIDE * step[0] + step[1])
            for name, step in STEPS.items()
            if step != back and _inside(place, step) and place + SIDE * step[0] + step[1] in tiles
        ]
        if not ways:
            return None
        name, place = rng.choice(ways)
        back = (-STEPS[name][0], -STEPS[name][1])
        phrase = f"{name} {phrase}" if hop == hops - 1 else f"the digit {name} {phrase}"
    return f"what is {phrase}?", tiles[place].name


def _inside(place: int, step: tuple[int, int]) -> bool:
    row, column = divmod(place, SIDE)
    return 0 <= row + step[0] < SIDE and 0 <= column + step[1] < SIDE


ASKERS: dict[str, Asker] = {
    "digit": _ask_digit,
    "colour": _ask_colour,
    "exists": _ask_exists,
    "count": _ask_count,
    "compare": _ask_compare,
    "relation": _ask_relation,
    **{f"hop{hops}": partial(_ask_hops, hops=hops) for hops in (1, 2, 3)},
}
"""Question type -> its asker."""
