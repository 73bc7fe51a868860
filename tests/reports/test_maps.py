"""Maps: grids, the rows of a trace that belong to picture and words, the drawing."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from trol.errors import UsageError
from trol.reports.maps import DepthMap, as_values, draw, grid_of, map_of, word_lines


class Words:
    """A tokenizer of three words; 0 is special."""

    pad_token_id = 0

    def decode(self, ids: list[int]) -> str:
        return ["<s>", "what", "costs $5", "?"][ids[0]]


def traced(gates: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Visits [L, T] and weights [L, 3, T] of gates [L, T]; gates of zero were not visited again."""
    weights = torch.stack([torch.zeros_like(gates), 1 - gates, gates], 1)
    return 1 + (gates > 0).long(), weights


@pytest.mark.parametrize(
    ("tokens", "size", "grid"),
    [
        (9, (48, 48), (3, 3)),
        (256, (448, 448), (16, 16)),
        (8, (40, 20), (2, 4)),
        (7, (9, 9), (1, 7)),
    ],
)
def test_grid_of(tokens: int, size: tuple[int, int], grid: tuple[int, int]) -> None:
    assert grid_of(tokens, size) == grid


def test_map_of_takes_the_prompt_apart() -> None:
    ids = torch.tensor([0, 9, 9, 9, 9, 1, 2, 3])
    gates = torch.arange(20).reshape(2, 10) / 20  # two answer tokens follow the prompt
    depth_map = map_of(
        *traced(gates),
        ids,
        picture=Image.new("RGB", (8, 8)),
        image_token=9,
        tokenizer=Words(),
    )
    assert depth_map.grid == (2, 2)
    assert np.allclose(depth_map.gates, gates[:, 1:5])
    assert depth_map.words == ["what", "costs $5", "?"]
    assert np.allclose(depth_map.word_gates, gates[:, 5:8])
    values = as_values(depth_map)
    assert values["layers"] == 2
    assert values["image"]["visits"] == [[2] * 4] * 2


def test_a_prompt_without_a_picture_is_refused() -> None:
    with pytest.raises(UsageError, match="no image token"):
        map_of(
            *traced(torch.rand(2, 3)),
            torch.tensor([1, 2, 3]),
            picture=Image.new("RGB", (8, 8)),
            image_token=9,
            tokenizer=Words(),
        )


@pytest.mark.parametrize("layers", [1, 4, 13])
def test_draw_gives_a_picture_of_every_layer(layers: int) -> None:
    gates = np.random.default_rng(0).random((layers, 9))
    depth_map = DepthMap(
        picture=Image.new("RGB", (48, 48), "red"),
        grid=(3, 3),
        gates=gates,
        visits=1 + (gates > 0.5),
        words=["costs", "$5", "or", "$6", "?"],
        word_gates=gates[:, :5],
        title="“is there a $7?” → yes",
    )
    with Image.open(io.BytesIO(draw(depth_map))) as picture:
        assert picture.format == "PNG"
        assert picture.width > 900
        assert picture.getextrema() != ((255, 255),) * 3
    assert draw(depth_map) == draw(depth_map)


def test_arrays_that_do_not_belong_together_are_refused() -> None:
    with pytest.raises(UsageError, match="3 x 3 grid"):
        DepthMap(
            picture=Image.new("RGB", (48, 48)),
            grid=(3, 3),
            gates=np.zeros((2, 8)),
            visits=np.zeros((2, 8)),
            words=[],
            word_gates=np.zeros((2, 0)),
        )


def test_long_questions_are_broken_into_lines() -> None:
    lines = word_lines(["twelve-chars"] * 20)
    assert [index for line in lines for index in line] == list(range(20))
    assert len(lines) == 4
