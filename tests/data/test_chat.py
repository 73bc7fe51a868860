"""Conversations become ids, roles and labels, or one clear error."""

from typing import Any

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import CLIPImageProcessor, LlavaProcessor, PreTrainedTokenizerFast

from trol.data.chat import IGNORED, Collator, Row, encode, fill, turns
from trol.errors import DataError, UsageError

WORDS = [
    *("<pad>", "<unk>", "<eos>", "<user>", "<assistant>", "<system>", "<image>"),
    *("is", "there", "a", "red", "7", "yes", "no", "?"),
]
TEMPLATE = (
    "{% for m in messages %}{{ '<' + m['role'] + '> ' }}"
    "{% if m['content'] is string %}{% set parts = [{'type': 'text', 'text': m['content']}] %}"
    "{% else %}{% set parts = m['content'] %}{% endif %}"
    "{% if m['role'] == 'assistant' %}{% generation %}"
    "{% for p in parts %}{{ p['text'] }}{% endfor %}{{ ' <eos>' }}{% endgeneration %}{{ ' ' }}"
    "{% else %}"
    "{% for p in parts %}{{ '<image>' if p['type'] == 'image' else p['text'] }}{{ ' ' }}"
    "{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant> ' }}{% endif %}"
)
PAIRS = [("is there a red 7?", "yes"), ("is there a 7?", "no")]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    vocab = {word: number for number, word in enumerate(WORDS)}
    inner = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    specials = [word for word in WORDS if word.startswith("<")]
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="<eos>",
        extra_special_tokens=specials[3:],
        chat_template=TEMPLATE,
    )


@pytest.fixture(scope="module")
def processor(tokenizer: PreTrainedTokenizerFast) -> LlavaProcessor:
    size = {"height": 32, "width": 32}
    images = CLIPImageProcessor(size=size, crop_size=size, do_center_crop=False)
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=16,
        vision_feature_select_strategy="full",
        chat_template=TEMPLATE,
    )


def says(tokenizer: Any, row: Row) -> str:
    """The words of the answer tokens."""
    pairs = zip(row.input_ids, row.assistant_masks, strict=True)
    return str(tokenizer.decode([token for token, answer in pairs if answer]))


def test_answers_are_what_the_assistant_says(tokenizer: PreTrainedTokenizerFast) -> None:
    row = encode(tokenizer, turns(PAIRS))
    assert says(tokenizer, row) == "yes <eos> no <eos>"
    assert row.pixel_values is None
    assert [label for label in row.labels if label != IGNORED] == [
        token for token, answer in zip(row.input_ids, row.assistant_masks, strict=True) if answer
    ]
    assert tokenizer.unk_token_id not in row.input_ids


def test_a_prompt_ends_where_the_assistant_is_to_speak(tokenizer: PreTrainedTokenizerFast) -> None:
    asked = turns(PAIRS)[:3]
    row = encode(tokenizer, asked, prompt=True)
    assert row.input_ids[-1] == tokenizer.convert_tokens_to_ids("<assistant>")
    assert row.assistant_masks[-1] == 0
    whole = encode(tokenizer, turns(PAIRS))
    assert whole.input_ids[: len(row.input_ids)] == row.input_ids


def test_pictures_come_through_the_processor(processor: LlavaProcessor) -> None:
    picture = Image.new("RGB", (48, 40), "red")
    row = encode(processor, turns(PAIRS, image=True), [picture])
    assert row.pixel_values is not None
    assert row.pixel_values.shape == (1, 3, 32, 32)
    assert says(processor.tokenizer, row) == "yes <eos> no <eos>"
    image_id = processor.tokenizer.convert_tokens_to_ids("<image>")
    assert row.input_ids.count(image_id) > 1
    inline = [{"role": "user", "content": [{"type": "image", "image": picture}, *TEXT]}]
    assert encode(processor, inline, prompt=True).pixel_values is not None


TEXT = [{"type": "text", "text": "is there a 7?"}]
PICTURE = Image.new("RGB", (4, 4))


@pytest.mark.parametrize(
    ("messages", "images", "reason"),
    [
        ([], [], "conversation is empty"),
        ([{"role": "user", "content": "  "}], [], "question is empty"),
        ([{"role": "user", "content": []}], [], "question is empty"),
        ([{"role": "user", "content": [{"type": "image"}]}], [PICTURE], "question is empty"),
        ([{"role": "user", "content": [{"type": "image"}, *TEXT]}], [], "has no picture"),
        ([{"role": "user", "content": TEXT}], [PICTURE], "1 pictures given for 0"),
        ([{"role": "robot", "content": TEXT}], [], "role 'robot'"),
        ([{"content": TEXT}], [], "role None"),
        ([{"role": "user", "content": None}], [], "content None"),
        ([{"role": "user", "content": [{"type": "video"}]}], [], "texts and pictures"),
    ],
)
def test_what_cannot_be_read_is_refused(messages: Any, images: Any, reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        fill(messages, images)


def test_a_tokenizer_refuses_pictures(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(DataError, match="a tokenizer reads no pictures"):
        encode(tokenizer, turns(PAIRS, image=True), [PICTURE])


def test_more_tokens_than_positions_are_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    long = len(encode(tokenizer, turns(PAIRS)).input_ids)
    assert encode(tokenizer, turns(PAIRS), most_tokens=long)
    with pytest.raises(DataError, match=f"{long} tokens long, but at most {long - 1}"):
        encode(tokenizer, turns(PAIRS), most_tokens=long - 1)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_of_pictures_and_text(processor: LlavaProcessor, side: Any) -> None:
    pictured = encode(processor, turns(PAIRS[:1], image=True), [PICTURE])
    bare = encode(processor, turns(PAIRS))
    batch = Collator(pad_token_id=0, padding_side=side)([pictured, bare, pictured])
    assert batch["pixel_values"].shape[0] == 2
    width = max(len(pictured.input_ids), len(bare.input_ids))
    for name in ("input_ids", "attention_mask", "labels", "assistant_masks"):
        assert batch[name].shape == (3, width)
        assert batch[name].dtype == torch.int64
    for row, ids, mask, labels in zip(
        (pictured, bare), batch["input_ids"], batch["attention_mask"], batch["labels"], strict=False
    ):
        assert ids[mask.bool()].tolist() == row.input_ids
        assert labels[mask.bool()].tolist() == row.labels
        assert (labels[~mask.bool()] == IGNORED).all()
    assert "pixel_values" not in Collator(pad_token_id=0)([bare])


def test_collator_settings() -> None:
    batch = Collator(pad_token_id=9, multiple=8)([Row([1, 2, 3], [0, 0, 1])])
    assert batch["input_ids"].tolist() == [[1, 2, 3, 9, 9, 9, 9, 9]]
    with pytest.raises(UsageError, match="padding_side"):
        Collator(pad_token_id=0, padding_side="middle")  # type: ignore[arg-type]
    with pytest.raises(DataError, match="at least one row"):
        Collator(pad_token_id=0)([])
