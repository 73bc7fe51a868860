"""TrolProcessor: expansion, templates, masks, counts, round trip."""

import numpy as np
import pytest
import torch
from transformers import AutoProcessor

from family.samples import picture, question, rows
from trol.errors import DataError, UsageError
from trol.family import TrolProcessor, word_tokenizer


def test_each_placeholder_becomes_nine_tokens_in_its_place(processor):
    batch = processor(images=[picture(0), picture(1)], text="<image> what <image> digit")
    words = processor.tokenizer.convert_ids_to_tokens(batch["input_ids"][0])
    assert words == ["<image>"] * 9 + ["what"] + ["<image>"] * 9 + ["digit"]
    assert len(batch["pixel_values"]) == 2


def test_batches_pad_on_the_left_and_take_images_in_reading_order(processor, encode):
    batch = encode(rows())
    assert batch["pixel_values"].shape == (3, 3, 48, 48)
    assert (batch["input_ids"] == processor.image_token_id).sum(-1).tolist() == [9, 0, 18]
    assert batch["attention_mask"][1].sort().values.equal(batch["attention_mask"][1])
    alone = encode(question("x", picture(2)))["pixel_values"]
    assert torch.equal(batch["pixel_values"][2:], alone)


def test_flat_and_nested_images_are_the_same(processor):
    text = ["<image> what", "count", "<image><image> is"]
    pictures = [picture(0), picture(1), picture(2)]
    flat = processor(images=pictures, text=text, return_tensors="pt")
    nested = processor(images=[pictures[:1], [], pictures[1:]], text=text, return_tensors="pt")
    assert torch.equal(flat["pixel_values"], nested["pixel_values"])
    assert torch.equal(flat["input_ids"], nested["input_ids"])


def test_paths_and_arrays_are_read(processor, tmp_path):
    picture(3).save(tmp_path / "board.png")
    from_path = processor(images=str(tmp_path / "board.png"), text="<image>", return_tensors="pt")
    array = processor(images=np.asarray(picture(3)), text="<image>", return_tensors="pt")
    assert torch.equal(from_path["pixel_values"], array["pixel_values"])


def test_assistant_mask_marks_what_is_said_and_its_end(processor):
    said = ["the blue digit is 3.", "no", "yes, 4!"]
    answered = [
        [*row, {"role": "assistant", "content": [{"type": "text", "text": answer}]}]
        for row, answer in zip(rows(), said, strict=True)
    ]
    answered[0] += [*question("is it 4"), {"role": "assistant", "content": "no."}]
    said[0] = "the blue digit is 3. no."
    batch = processor.apply_chat_template(
        answered,
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
        return_tensors="pt",
    )
    for ids, mask, answer in zip(batch["input_ids"], batch["assistant_masks"], said, strict=True):
        words = processor.tokenizer.convert_ids_to_tokens(ids[mask.bool()])
        assert words[-1] == "<eos>"
        assert processor.decode(ids[mask.bool()], skip_special_tokens=True) == answer


def test_template_and_settings_survive_saving(processor, tmp_path, encode):
    processor.save_pretrained(tmp_path)
    assert "{%- generation -%}" in (tmp_path / "chat_template.jinja").read_text()
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert type(loaded) is TrolProcessor
    assert (loaded.tokens_per_image, loaded.image_token_id) == (9, processor.image_token_id)
    again = loaded.apply_chat_template(
        rows(), add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    for name, values in encode(rows()).items():
        assert torch.equal(values, again[name]), name


@pytest.mark.parametrize(
    ("images", "text", "says"),
    [
        (None, "<image> what", "got 0 images, expected 1"),
        (picture(0), "what", "got 1 image, expected 0"),
        ([[picture(0)], []], ["what", "<image> is"], r"\[1, 0\]\) image, expected 1 \(.*\[0, 1\]"),
        ([[picture(0)]], ["<image> what", "is"], "got images for 1 texts, expected 2"),
        (None, "  ", "empty; write"),
        (None, ["what", ""], "text 1 is ''"),
        (None, None, "text is None"),
        ("no-such-file.png", "<image>", "no such file"),
    ],
)
def test_bad_input_says_what_and_what_to_do(processor, images, text, says):
    with pytest.raises(DataError, match=says):
        processor(images=images, text=text)


@pytest.mark.parametrize("conversation", [[], question(" "), [question("what"), question("")]])
def test_an_empty_conversation_or_question_is_refused(processor, conversation):
    with pytest.raises(DataError, match=r"empty; write a question|at least one message"):
        processor.apply_chat_template(conversation)


def test_other_media_are_refused(processor):
    with pytest.raises(DataError, match="videos"):
        processor(text="what", videos=[1])


def test_a_tokenizer_without_the_image_token_is_refused(processor):
    with pytest.raises(UsageError, match="does not know the image token '<img>'"):
        TrolProcessor(
            processor.image_processor, processor.tokenizer, tokens_per_image=9, image_token="<img>"
        )


def test_word_tokenizer_reads_and_writes_naturally():
    tokenizer = word_tokenizer(["Is 7 (red) above 3, or 4?", "No."])
    ids = tokenizer("IS 3 above 7? no, 4 (red).").input_ids
    assert tokenizer.decode(ids) == "is 3 above 7? no, 4 (red)."
    assert tokenizer("zebra").input_ids == [tokenizer.unk_token_id]
