"""Conversations become batches with labels at the answers, or one clear error."""

from typing import Any

import pytest
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import CLIPImageProcessor, LlavaProcessor, PreTrainedTokenizerFast

from data.samples import encoded, talk
from trol.data.answers import Answers
from trol.data.conversations import ConversationCollator
from trol.data.formats import RowError
from trol.depth.roles import IGNORED_LABEL

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
CHAT = talk("is there a red 7?", "yes", "is there a 7?", "no")


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


def pictured(*pictures: Image.Image) -> Any:
    """The conversation with pictures before the first question."""
    first = [{"type": "image", "image": picture} for picture in pictures]
    return [{**CHAT[0], "content": [*first, *CHAT[0]["content"]]}, *CHAT[1:]]


def answers_in(tokenizer: Any, labels: list[int]) -> str:
    return str(tokenizer.decode([label for label in labels if label != IGNORED_LABEL]))


def test_labels_are_the_ids_of_the_answers(tokenizer: PreTrainedTokenizerFast) -> None:
    ids, labels = encoded(tokenizer, CHAT)
    assert answers_in(tokenizer, labels) == "yes <eos> no <eos>"
    assert all(label in (IGNORED_LABEL, id_) for label, id_ in zip(labels, ids, strict=True))
    assert tokenizer.unk_token_id not in ids


def test_a_prompt_ends_where_the_assistant_is_to_speak(tokenizer: PreTrainedTokenizerFast) -> None:
    prompt = Answers(tokenizer).encoded([CHAT[:3]], prompt=True)
    (ids,), (masks,) = prompt["input_ids"], prompt["assistant_masks"]
    assert ids[-1] == tokenizer.convert_tokens_to_ids("<assistant>")
    assert masks[-1] == 0
    assert encoded(tokenizer, CHAT)[0][: len(ids)] == ids


def test_pictures_come_through_the_processor(processor: LlavaProcessor) -> None:
    batch = ConversationCollator(processor)([pictured(Image.new("RGB", (48, 40), "red"))])
    assert batch["pixel_values"].shape == (1, 3, 32, 32)
    assert answers_in(processor.tokenizer, batch["labels"][0].tolist()) == "yes <eos> no <eos>"
    image_id = processor.tokenizer.convert_tokens_to_ids("<image>")
    assert (batch["input_ids"] == image_id).sum() > 1


def test_a_tokenizer_refuses_pictures(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(RowError, match="a tokenizer reads no pictures"):
        encoded(tokenizer, pictured(PICTURE))


def test_more_tokens_than_positions_are_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    long = len(encoded(tokenizer, CHAT)[0])
    encoded(tokenizer, CHAT, most_tokens=long)
    with pytest.raises(RowError, match=f"{long} tokens long, but at most {long - 1}"):
        encoded(tokenizer, CHAT, most_tokens=long - 1)


def test_a_conversation_without_an_answer_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(RowError, match="no token of an answer") as raised:
        encoded(tokenizer, CHAT[:1])
    assert raised.value.kind == "empty_answer"


def test_a_batch_of_pictures_and_text(processor: LlavaProcessor) -> None:
    """Each row of a batch is what it is alone, padded on the right."""
    rows = [pictured(PICTURE)[:2], CHAT, pictured(PICTURE)[:2]]
    batch = ConversationCollator(processor)(rows)
    assert batch["pixel_values"].shape[0] == 2
    alone = [encoded(processor, row) for row in rows]
    width = max(len(ids) for ids, _ in alone)
    for number, (ids, labels) in enumerate(alone):
        real = [1] * len(ids) + [0] * (width - len(ids))
        assert batch["attention_mask"][number].tolist() == real
        assert batch["input_ids"][number, : len(ids)].tolist() == ids
        padding = [IGNORED_LABEL] * (width - len(ids))
        assert batch["labels"][number].tolist() == [*labels, *padding]
    assert "pixel_values" not in ConversationCollator(processor)([CHAT])


def test_only_the_last_answer(tokenizer: PreTrainedTokenizerFast) -> None:
    assert answers_in(tokenizer, encoded(tokenizer, CHAT, last=True)[1]) == "no <eos>"


PICTURE = Image.new("RGB", (4, 4))
