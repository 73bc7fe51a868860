"""A tiny random TroL behind `trol.load_model`, and a board to ask about."""

import contextlib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

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
def tiny_model(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Loads a tiny random model whatever the name; the list fills with the plans it ran under."""
    processor = tiny_processor([WORDS])
    model = TrolForConditionalGeneration(tiny(len(processor.tokenizer))).eval()
    plans: list[str] = []

    @contextlib.contextmanager
    def depth(_: object, plan: str):
        plans.append(plan)
        yield

    monkeypatch.setattr(trol, "load_model", lambda name: (model, processor), raising=False)
    monkeypatch.setattr(trol, "depth", depth, raising=False)
    return plans


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """A trace as TroL's would be: two visits everywhere, gates that fall with the layer."""

    @contextlib.contextmanager
    def trace(model: torch.nn.Module):
        layers, tokens = model.config.text_config.num_hidden_layers, 64
        gate = torch.linspace(0.9, 0.1, layers)[:, None, None].expand(layers, 1, tokens)
        weights = torch.stack([torch.zeros_like(gate), 1 - gate, gate], 1)
        cost = SimpleNamespace(json=lambda: {"layer_visits": 2 * layers * tokens})
        yield SimpleNamespace(visits=1 + (gate > 0.5).long(), weights=weights, cost=cost)

    monkeypatch.setattr(trol, "trace", trace, raising=False)
