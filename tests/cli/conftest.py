"""A tiny random TroL behind `trol.load_model`, and a board to ask about."""

from pathlib import Path

import pytest

import trol
from trol.data.boards import draw, make_board
from trol.family import TrolForConditionalGeneration, tiny, tiny_processor

WORDS = "which digit is on the yellow tile? is there a 7? how many red tiles are there?"


@pytest.fixture
def board(tmp_path: Path) -> str:
    path = tmp_path / "board.png"
    draw(make_board("test", 3)).save(path)
    return str(path)


@pytest.fixture
def tiny_model(monkeypatch: pytest.MonkeyPatch) -> TrolForConditionalGeneration:
    """A tiny random model that every name loads."""
    processor = tiny_processor([WORDS])
    depth = {"policy": "trol_mixer", "passes": 2}
    model = TrolForConditionalGeneration(tiny(len(processor.tokenizer), depth=depth)).eval()
    monkeypatch.setitem(vars(trol), "load_model", lambda name: (model, processor))
    return model
