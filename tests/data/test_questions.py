"""Every answer is checked by a solver that reads the sentence and knows nothing of the asker."""

import random
from collections import Counter
from importlib.resources import files

import pytest
from transformers import AutoTokenizer

from trol.data.boards import (
    ASKERS,
    PLACES,
    WORDS,
    Board,
    ask,
    chance_by_type,
    make_board,
    questions,
)
from trol.errors import UsageError
from trol.family.presets import word_tokenizer
from trol.training.stage_data import NOTHING

MOVES = {"left": (0, -1), "right": (0, 1), "above": (-1, 0), "below": (1, 0)}
COLOURS = ("red", "green", "blue", "yellow", "purple")


def solve(board: Board, text: str) -> str:  # noqa: PLR0911 - one return per kind of sentence
    """The answer, from the words of the question and a grid of (colour, digit)."""
    grid = {
        (n // 3, n % 3): (t.colour, str(t.digit))
        for n, t in enumerate(board.cells)
        if t is not None
    }
    words = [word for word in text.rstrip("?").split() if word not in ("the", "of", "a", "an")]
    colour = next((word for word in words if word in COLOURS), None)
    digit = next((word for word in words if word.isdigit()), None)

    def fits(tile: tuple[str, str]) -> bool:
        return (colour is None or tile[0] == colour) and (digit is None or tile[1] == digit)

    if words[:2] == ["which", "digit"] or words[:2] == ["what", "colour"]:
        part = 1 if words[0] == "which" else 0
        if " in the " in text:
            n = PLACES.index(text.rstrip("?").split(" in the ")[1])
            return grid[n // 3, n % 3][part]
        (found,) = [tile for tile in grid.values() if fits(tile)]  # unique, or the test fails
        return found[part]
    if words[:2] == ["is", "there"]:
        return "yes" if any(map(fits, grid.values())) else "no"
    if words[:2] == ["how", "many"]:
        return str(sum(map(fits, grid.values())))
    if words[:2] == ["are", "there"]:
        first, second = (word for word in words if word in COLOURS)
        seen = Counter(tile[0] for tile in grid.values())
        return "yes" if seen[first] > seen[second] else "no"
    places = {tile: place for place, tile in grid.items()}
    if words[0] == "is":
        _, c1, d1, way, c2, d2 = words
        (r1, k1), (r2, k2) = places[c1, d1], places[c2, d2]
        assert (k1 != k2) if way in ("left", "right") else (r1 != r2)
        return (
            "yes"
            if {"left": k1 < k2, "right": k1 > k2, "above": r1 < r2, "below": r1 > r2}[way]
            else "no"
        )
    assert words[:2] == ["what", "is"]
    row, column = places[words[-2], words[-1]]
    for word in reversed(words[2:-2]):
        if word in MOVES:
            row, column = row + MOVES[word][0], column + MOVES[word][1]
    return " ".join(grid[row, column])


@pytest.mark.parametrize("kind", ASKERS)
def test_every_answer_agrees_with_a_naive_solver(kind: str) -> None:
    rng, asked, boards = random.Random(1), 0, 300
    for seed in range(boards):
        board = make_board(("train", "validation", "test")[seed % 3], seed)
        question = ask(board, kind, rng)
        if question is not None:
            asked += 1
            assert solve(board, question.text) == question.answer, (board.cells, question)
            assert question.type == kind
    assert asked > boards / 2


@pytest.mark.parametrize("hops", [1, 2, 3])
def test_a_chain_has_as_many_hops_as_its_type_says(hops: int) -> None:
    rng = random.Random(2)
    for seed in range(200):
        question = ask(make_board("train", seed), f"hop{hops}", rng)
        if question is not None:
            assert sum(question.text.count(word) for word in MOVES) == hops


def test_questions_are_the_same_on_every_call_and_of_every_type() -> None:
    board = make_board("train", 11)
    assert questions(board, 9) == questions(board, 9)
    assert questions(board, 9) != questions(board, 9, salt=1)
    assert len(questions(board, 4)) == 4
    assert {q.type for q in questions(board, 6, kinds=["digit", "colour"])} == {"digit", "colour"}
    seen = Counter(q.type for n in range(200) for q in questions(make_board("test", n), 9))
    assert set(seen) == set(ASKERS)


def test_the_word_list_is_all_words_of_questions_and_answers() -> None:
    """A tokenizer of the list has the ids that one of 400 boards' questions has."""
    sampled = [q for seed in range(400) for q in questions(make_board("train", seed), 9)]
    texts = [text for question in sampled for text in (question.text, question.answer)]
    vocabulary = word_tokenizer(WORDS).get_vocab()
    assert vocabulary == word_tokenizer(texts).get_vocab()
    assert len(set(WORDS)) == len(WORDS)


def test_the_shipped_model_knows_these_words() -> None:
    shipped = AutoTokenizer.from_pretrained(str(files("trol") / "models" / "trol-tiny"))
    assert shipped.get_vocab() == word_tokenizer([NOTHING, *WORDS]).get_vocab()


def test_yes_and_no_are_balanced() -> None:
    for kind in ("exists", "compare", "relation"):
        rng = random.Random(3)
        made = [ask(make_board("train", n), kind, rng) for n in range(1500)]
        answers = [question.answer for question in made if question is not None]
        assert 0.45 < answers.count("yes") / len(answers) < 0.55, kind


def test_chance_is_measured_per_type() -> None:
    chance = chance_by_type(boards=600)
    assert list(chance) == list(ASKERS)
    for kind in ("exists", "compare", "relation"):
        assert 0.5 <= chance[kind] < 0.56
    for kind in ("hop1", "hop2", "hop3"):  # a tile of the board at random: 4 to 9 tiles
        assert 1 / 9 < chance[kind] < 1 / 4
    assert 0.15 < chance["digit"] < 0.35
    assert 0.2 < chance["count"] < 0.4


def test_an_unknown_type_and_an_impossible_wish_are_refused() -> None:
    board = make_board("train", 0)
    with pytest.raises(UsageError, match="Did you mean 'count'"):
        questions(board, 1, kinds=["cuont"])
    with pytest.raises(UsageError, match="at least 1"):
        questions(board, 0)
    lonely = make_board("train", 0, fewest=1, most=1)
    with pytest.raises(UsageError, match="allows no question"):
        questions(lonely, 1, kinds=["hop2"])
