"""A model of any tower and any text decoder computes what its parts do, and learns."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from family import parts
from family.samples import picture, question
from trol import depth
from trol.data.answers import Answers
from trol.errors import HostError, UsageError
from trol.family import TrolForConditionalGeneration, TrolProcessor
from trol.family.composition import composed
from trol.family.published.layouts import resize_position_table

POLICY = {"policy": "trol_mixer", "initial_gate": 0.01}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    place = tmp_path_factory.mktemp("parts")
    towers = {name: parts.tower(place / name, name) for name in parts.TOWERS}
    return {**towers, "text": parts.decoder(place / "text")}


def joined(folders: dict[str, str], tower: str, **settings):
    torch.manual_seed(0)
    preset = {"vision": folders[tower], "text": folders["text"], **settings}
    model, processor = composed(preset, POLICY, [])
    return model.eval(), processor


@pytest.mark.parametrize("tower", parts.TOWERS)
def test_the_parts_inside_compute_what_they_did_alone(folders, tower: str) -> None:
    model, processor = joined(folders, tower)
    alone = AutoModel.from_pretrained(folders[tower]).eval()
    text = AutoModelForCausalLM.from_pretrained(folders["text"]).eval()
    pixels = torch.randn(2, 3, 24, 24)
    ids = processor.tokenizer("is there a red 7?", return_tensors="pt")["input_ids"]
    with torch.no_grad(), depth(model, "plain"):
        features = model.model.get_vision_features(pixels)
        assert torch.equal(features, alone(pixels).last_hidden_state[:, -36:])
        assert torch.allclose(model(input_ids=ids).logits, text(input_ids=ids).logits, atol=1e-6)
    assert model.lm_head.weight is model.get_input_embeddings().weight


@pytest.mark.parametrize(("pixels", "ratio", "tokens"), [(12, 1.0, 9), (24, 0.5, 9), (48, 0.25, 9)])
@pytest.mark.parametrize("tower", parts.TOWERS)
def test_a_picture_has_as_many_tokens_as_its_size_and_ratio_say(
    folders, tmp_path: Path, tower: str, pixels: int, ratio: float, tokens: int
) -> None:
    model, processor = joined(folders, tower, image_size=pixels, downsample_ratio=ratio)
    settings = {"add_generation_prompt": True, "tokenize": True, "return_dict": True}
    asked = question("is there a red 7?", picture(0))
    batch = processor.apply_chat_template(asked, return_tensors="pt", **settings)
    assert (batch["input_ids"] == model.config.image_token_id).sum() == tokens
    assert batch["pixel_values"].shape == (1, 3, pixels, pixels)
    with torch.no_grad():
        logits = model(**batch).logits
        blind = model(**{**batch, "pixel_values": batch["pixel_values"] * 0}).logits
        assert not torch.allclose(logits, blind)
        model.save_pretrained(tmp_path)
        processor.save_pretrained(tmp_path)
        again = TrolForConditionalGeneration.from_pretrained(tmp_path).eval()
        assert torch.equal(again(**batch).logits, logits)
    same = TrolProcessor.from_pretrained(tmp_path).apply_chat_template(
        asked, return_tensors="pt", **settings
    )
    assert all(torch.equal(batch[key], same[key]) for key in batch)


def test_pictures_are_normalised_as_the_tower_was_shown_them(folders) -> None:
    _, processor = joined(folders, "dinov2")
    white = torch.full((3, 24, 24), 255, dtype=torch.uint8)
    pixels = processor.image_processor(white, return_tensors="pt")["pixel_values"][0, :, 0, 0]
    expected = (1 - torch.tensor(parts.MEAN)) / torch.tensor(parts.STD)
    assert torch.allclose(pixels, expected)


def test_a_conversation_is_written_as_the_decoder_reads_it(folders) -> None:
    """Its own template, a picture where it stands, and the answers found in it."""
    _, processor = joined(folders, "dinov2")
    own = AutoTokenizer.from_pretrained(folders["text"])
    told = [
        {"role": "user", "content": "is there a 4?"},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": "where?"},
    ]
    text = own.apply_chat_template(told, tokenize=False, add_generation_prompt=True)
    assert processor.apply_chat_template(told, add_generation_prompt=True) == text
    seen = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "a 4?"}]}]
    assert "user\n<image>a 4?<|im_end|>" in processor.apply_chat_template(seen)
    listed = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in told]
    _, pieces = Answers(processor).cut(listed, prompt=True)
    assert pieces[1].startswith("yes<|im_end|>")


@pytest.mark.parametrize("own", [0, 1])
def test_a_position_table_is_resized_with_or_without_a_class_token(own: int) -> None:
    table = torch.arange(36.0).repeat_interleave(2).view(36, 2) // 6  # the row's number
    table = torch.cat([torch.full((own, 2), 99.0), table])
    resized = resize_position_table(table, 3)
    assert resized.shape == (own + 9, 2)
    assert torch.equal(resized[:own], table[:own])
    rows = resized[own:].view(3, 3, 2)
    assert torch.equal(rows[:, 0], rows[:, 2])  # a row stays a row
    assert (rows[1:] > rows[:-1]).all()


@pytest.mark.parametrize(
    ("settings", "error", "match"),
    [
        ({"vision": None}, UsageError, "has no vision"),
        ({"text": ""}, UsageError, "has no text"),
        ({"image_size": 25}, UsageError, "a multiple of 4 pixels"),
        ({"image_size": "big"}, UsageError, "a multiple of 4 pixels"),
        ({"downsample_ratio": 0.25}, UsageError, "divide the grid"),
        ({"image_sise": 24}, UsageError, "image_size"),
        ({"vision": "{text}"}, HostError, "sees no square pictures"),
        ({"text": "{dinov2}"}, HostError, "no model can be opened"),
        ({"text": "{whole}"}, HostError, "reads pictures already"),
    ],
)
def test_parts_that_do_not_fit_are_told(folders, tmp_path: Path, settings, error, match) -> None:
    if "{whole}" in settings.values():
        model, processor = joined(folders, "dinov2")
        model.save_pretrained(tmp_path)
        processor.save_pretrained(tmp_path)
    places = {**folders, "whole": str(tmp_path)}
    named = {k: v.format(**places) if isinstance(v, str) else v for k, v in settings.items()}
    with pytest.raises(error, match=match):
        joined(folders, "dinov2", **named)
