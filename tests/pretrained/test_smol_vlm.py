"""Two pretrained parts by their names: the tower is the exported one, and both are in the model."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModel

import trol
from trol.data.boards import draw, make_board
from trol.training import resolve
from trol.training.opening import opened

pytestmark = pytest.mark.pretrained

STATES = [
    [1.0742, -0.1628, 1.4743],
    [1.6365, -1.1783, -0.5706],
    [1.6578, 3.5231, 0.6096],
    [1.8100, 0.3039, 0.6985],
]
"""Of tokens 0, 1, 128 and 256, as onnx.reference computes them from the file itself."""


def test_the_tower_gives_the_states_of_the_file_that_it_was_made_from(dinov2: Path) -> None:
    pixels = (torch.arange(3 * 224 * 224) / 1000).sin().view(1, 3, 224, 224)
    with torch.no_grad():
        states = AutoModel.from_pretrained(dinov2).eval()(pixels).last_hidden_state
    assert torch.allclose(states[0, [0, 1, 128, 256], :3], torch.tensor(STATES), atol=5e-4)


def test_smol_vlm_reads_as_its_decoder_does_and_sees(dinov2: Path, smollm2: Path) -> None:
    model, processor = opened(
        resolve("smol-vlm", [f"preset.text={smollm2}", "precision=fp32"]), None
    )
    text, _ = trol.load_model(smollm2)
    ids = processor.tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    boards = [draw(make_board("test", seed)) for seed in range(2)]
    pixels = processor.image_processor(boards, return_tensors="pt")["pixel_values"]
    with torch.no_grad(), trol.depth(model.eval(), "plain"):
        assert torch.allclose(model(ids).logits, text(ids).logits, atol=1e-4)
        features = model.get_image_features(pixels, return_dict=True).pooler_output
    assert features.shape == (2, 9, 576)
    assert not torch.allclose(*features)
