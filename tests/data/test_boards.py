"""Boards: the same on every call, and no scan is in two splits."""

from itertools import combinations

import numpy as np
import pytest
from sklearn.datasets import load_digits

from trol.data.board_pool import board_pool
from trol.data.boards import (
    COLOURS,
    NOTHING,
    SPLITS,
    WORDS,
    caption,
    draw,
    draw_array,
    make_board,
    split_scans,
)
from trol.errors import UsageError
from trol.family import tiny_processor


@pytest.mark.parametrize("split", SPLITS)
def test_a_board_is_the_same_on_every_call(split: str) -> None:
    assert make_board(split, 5) == make_board(split, 5)
    assert make_board(split, 5) != make_board(split, 6)
    assert (draw_array(make_board(split, 5)) == draw_array(make_board(split, 5))).all()


def test_no_scan_is_in_two_splits_and_all_are_used() -> None:
    scans = {split: {n for own in split_scans(split).values() for n in own} for split in SPLITS}
    assert all(not scans[a] & scans[b] for a, b in combinations(SPLITS, 2))
    assert len(set.union(*scans.values())) == len(load_digits().target)


@pytest.mark.parametrize("split", SPLITS)
def test_tiles_show_their_digit_from_their_own_split(split: str) -> None:
    target = load_digits().target
    for seed in range(50):
        tiles = list(make_board(split, seed).tiles.values())
        assert 4 <= len(tiles) <= 9
        assert len({tile.name for tile in tiles}) == len(tiles)
        for tile in tiles:
            assert target[tile.scan] == tile.digit
            assert tile.scan in split_scans(split)[tile.digit]


def test_splits_make_different_boards_from_one_seed() -> None:
    names = {tuple(t and t.name for t in make_board(s, 3).cells) for s in SPLITS}
    assert len(names) == len(SPLITS)


def test_the_picture_shows_tile_colours_where_tiles_are() -> None:
    board = make_board("test", 1)
    picture = np.asarray(draw(board)).astype(int)
    assert draw(board).size == (48, 48)
    for place in range(9):
        row, column = divmod(place, 3)
        corner = picture[16 * row + 1, 16 * column + 1]
        tile = board.cells[place]
        if tile is not None:
            nearest = min(COLOURS, key=lambda name: abs(corner - COLOURS[name]).sum())
            assert nearest == tile.colour
        else:
            assert (corner > 200).all()


def test_training_pictures_vary_and_test_pictures_do_not() -> None:
    test = make_board("test", 2)
    assert (draw_array(test) == draw_array(test, vary=False)).all()
    assert (draw_array(test) != draw_array(test, vary=True)).any()
    train = make_board("train", 2)
    assert (draw_array(train) == draw_array(train, vary=True)).all()


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(UsageError, match="Did you mean 'train'"):
        make_board("trian", 0)
    with pytest.raises(UsageError, match="0 to 4 tiles"):
        make_board("train", 0, fewest=0, most=4)


@pytest.mark.parametrize("seed", range(5))
def test_a_caption_names_all_cells_in_reading_order(seed: int) -> None:
    board = make_board("train", seed)
    question, answer = caption(board)
    words, named = iter(answer.split()), []
    for word in words:
        named.append(None if word == NOTHING else (word, int(next(words))))
    assert named == [tile and (tile.colour, tile.digit) for tile in board.cells]
    assert set(question[:-1].split()) <= set(WORDS)


@pytest.mark.parametrize("turns", [1, 3])
def test_a_pool_of_captions_begins_with_the_caption_of_each_board(turns: int) -> None:
    processor = tiny_processor([NOTHING, *WORDS])
    pool = board_pool(processor, "train", first=0, boards=3, turns_each=turns, captions=True)
    batch = pool.batch([0, 1, 2])
    for number, (ids, labels) in enumerate(zip(batch["input_ids"], batch["labels"], strict=True)):
        answers = processor.tokenizer.decode(labels[labels >= 0]).split(" <eos>")
        assert answers[0].removesuffix("<eos>") == caption(make_board("train", number))[1]
        assert (labels == processor.tokenizer.eos_token_id).sum() == turns
        assert (ids == processor.image_token_id).sum() == 9
