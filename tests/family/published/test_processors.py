"""The published processors: prompts, tiles, expansion, masks, round trip."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, CLIPVisionConfig, LlamaConfig, Phi3Config

from family.published.tokens import internlm2_tokenizer, phi3_tokenizer
from trol.errors import DataError, UsageError
from trol.family import TrolConfig, TrolProcessor
from trol.family.internlm2 import InternLM2Config
from trol.family.published.processors import TiledImageProcessor, chat_template, published_processor

PROMPT = (
    "You are AI model created by Byung-Kwan Lee, Ph.D. candidate, KAIST EE, of which AI model name "
    "is TroL (Traversal of Layers). You must give helpful, detailed, and polite answers to the "
    "user's questions"
)
FRAMES = {
    "internlm2": (
        f"<s>[UNUSED_TOKEN_146]system\n{PROMPT}[UNUSED_TOKEN_145]\n[UNUSED_TOKEN_146]user\n",
        "[UNUSED_TOKEN_145]\n[UNUSED_TOKEN_146]assistant\n",
    ),
    "phi3": (f"<s><|system|>\n{PROMPT}<|end|>\n<|user|>\n", "<|end|>\n<|assistant|>\n"),
}
FAMILIES = tuple(FRAMES)
ENDS = {"internlm2": "[UNUSED_TOKEN_145]\n</s>", "phi3": "<|end|>\n</s>"}


def configured(family, size, *, image_token_id=None):
    """A configuration of 32-pixel pictures and 16 tokens per picture or tile."""
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2}
    if family == "internlm2":
        text, last, patch, ratio = InternLM2Config, size, 8, 1.0
    else:
        text, last, patch, ratio = Phi3Config, size - 1, 4, 0.5
    return TrolConfig(
        vision_config=CLIPVisionConfig(image_size=32, patch_size=patch, **sizes),
        text_config=text(vocab_size=size, num_hidden_layers=1, pad_token_id=2, **sizes),
        image_token_id=last if image_token_id is None else image_token_id,
        downsample_ratio=ratio,
    )


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {family: tmp_path_factory.mktemp(family) for family in FAMILIES}
    makers = {"internlm2": internlm2_tokenizer, "phi3": phi3_tokenizer}
    return {family: (folder, makers[family](folder)) for family, folder in made.items()}


@pytest.fixture(scope="module")
def processors(folders):
    return {
        family: published_processor(TrolProcessor, folder, configured(family, size))
        for family, (folder, size) in folders.items()
    }


def drawn(width, height):
    y, x, channel = np.ogrid[:height, :width, :3]
    return Image.fromarray(((x * 5 + y * 5 + 17 * channel) % 256).astype(np.uint8))


def asks(text, *pictures):
    images = [{"type": "image", "image": picture} for picture in pictures]
    return [{"role": "user", "content": [*images, {"type": "text", "text": text}]}]


def says(text):
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


def encode(processor, conversations, **settings):
    return processor.apply_chat_template(
        conversations, tokenize=True, return_dict=True, return_tensors="pt", **settings
    )


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("question", ["What is the troll doing?", "<image>\nWhich one?\nA. a"])
def test_a_question_is_framed_as_published(processors, family, question):
    before, after = FRAMES[family]
    framed = processors[family].apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True
    )
    assert framed == before + question + after


@pytest.mark.parametrize("family", FAMILIES)
def test_turns_are_joined_by_line_ends(processors, family):
    before, after = FRAMES[family]
    system = {"role": "system", "content": "Be short."}
    talk = [system, *asks("one?", drawn(32, 32)), says("yes"), *asks("two?")]
    text = processors[family].apply_chat_template(talk, add_generation_prompt=True)
    role = before.rstrip("\n").split("\n")[-1] + "\n"
    first = before.replace(PROMPT, "Be short.") + "<image>\none?" + after
    assert text == first + "yes" + ENDS[family] + "\n" + role + "two?" + after


def test_internlm2_gives_each_picture_its_tokens(processors, folders):
    processor = processors["internlm2"]
    batch = encode(processor, [asks("a", drawn(40, 20), drawn(9, 9)), asks("red is seven")])
    assert set(batch) == {"input_ids", "attention_mask", "pixel_values"}
    assert batch["pixel_values"].shape == (2, 3, 32, 32)
    image = batch["input_ids"] == folders["internlm2"][1]
    assert image.sum(-1).tolist() == [32, 0]
    assert batch["attention_mask"][1, 0] == 0


def test_phi3_gives_each_tile_its_tokens(processors):
    processor = processors["phi3"]
    rows = [asks("a", drawn(64, 32), drawn(32, 32)), asks("b"), asks("c", drawn(32, 96))]
    batch = encode(processor, rows, add_generation_prompt=True)
    assert set(batch) == {"input_ids", "attention_mask", "pixel_values"}
    assert batch["pixel_values"].shape == (3 + 1 + 4, 3, 32, 32)
    image = batch["input_ids"] == processor.image_token_id
    assert image.sum(-1).tolist() == [(3 + 1) * 16, 0, 4 * 16]
    before, after = FRAMES["phi3"]
    tokens = [f"<img>{'<IMG_CONTEXT>' * 16 * tiles}</img>\n" for tiles in (3, 1)]
    wanted = processor.tokenizer(before + "".join(tokens) + "a" + after).input_ids
    assert batch["input_ids"][0][batch["attention_mask"][0].bool()].tolist() == wanted
    alone = encode(processor, rows[2])["pixel_values"]
    assert torch.equal(batch["pixel_values"][4:], alone)


@pytest.mark.parametrize("family", FAMILIES)
def test_texts_with_placeholders_are_the_same_as_messages(processors, family):
    processor = processors[family]
    pictures = [drawn(64, 32), drawn(20, 30)]
    text = processor.apply_chat_template(asks("a", *pictures), add_generation_prompt=True)
    assert text.count("<image>") == 2
    flat = processor(images=pictures, text=text, return_tensors="pt")
    whole = encode(processor, asks("a", *pictures), add_generation_prompt=True)
    for name, values in whole.items():
        assert torch.equal(flat[name], values), name


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_answers_are_marked_with_their_ends(processors, family, side):
    processor = processors[family]
    rows = [
        [*asks("is it 3?", drawn(64, 32), drawn(32, 32)), says("the blue digit"), *asks("no?")],
        [*asks("four?"), says("yes."), *asks("look", drawn(32, 96)), says("red, seven")],
        asks("nothing said"),
    ]
    processor.tokenizer.padding_side = side
    batch = encode(processor, rows, return_assistant_tokens_mask=True)
    processor.tokenizer.padding_side = "left"
    said = [["the blue digit"], ["yes.", "red, seven"], []]
    for ids, mask, texts in zip(batch["input_ids"], batch["assistant_masks"], said, strict=True):
        assert mask.shape == ids.shape
        marked = processor.decode(ids[mask.bool()]).replace(" ", "")
        assert marked == "".join(text + ENDS[family] for text in texts).replace(" ", "")


def test_an_answer_with_a_picture_is_marked_with_it(processors):
    processor = processors["phi3"]
    answer = {"role": "assistant", "content": asks("so", drawn(64, 32))[0]["content"]}
    talk = [*asks("draw", drawn(32, 32)), answer]
    single = processor.apply_chat_template(
        talk, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    rows = zip(single["input_ids"], single["assistant_masks"], strict=True)
    marked = [token for row in rows for token, said in zip(*row, strict=True) if said]
    assert marked.count(processor.image_token_id) == 3 * 16


def test_answers_of_a_cut_conversation_are_refused(processors):
    talk = [*asks("is it 3?"), says("the blue digit")]
    with pytest.raises(DataError, match="was cut from at least"):
        encode(
            processors["phi3"],
            talk,
            return_assistant_tokens_mask=True,
            processor_kwargs={"truncation": True, "max_length": 20},
        )


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_saved_and_opened_again(processors, family, tmp_path):
    processor = processors[family]
    processor.save_pretrained(tmp_path)
    again = AutoProcessor.from_pretrained(tmp_path)
    assert type(again) is TrolProcessor
    assert type(again.image_processor) is type(processor.image_processor)
    settings = ("tokens_per_image", "image_token", "image_prefix", "image_suffix", "chat_template")
    for name in (*settings, "image_token_id"):
        assert getattr(again, name) == getattr(processor, name), name
    talk = [*asks("is it 東京?", drawn(64, 32)), says("no")]
    for name, values in encode(processor, talk, return_assistant_tokens_mask=True).items():
        reread = encode(again, talk, return_assistant_tokens_mask=True)[name]
        assert torch.equal(values, reread), name


def test_the_image_token_itself_is_no_text(processors):
    with pytest.raises(DataError, match=r"'<IMG_CONTEXT>' in it.*write '<image>'"):
        processors["phi3"](text="<IMG_CONTEXT> what")


def test_counts_that_differ_are_refused(processors):
    with pytest.raises(DataError, match="got 1 image, expected 2, one for each '<image>'"):
        processors["phi3"](images=drawn(64, 32), text="<image><image>")


@pytest.mark.parametrize("family", FAMILIES)
def test_another_image_token_id_is_named(folders, family):
    folder, size = folders[family]
    with pytest.raises(DataError, match=rf"the id \d+, expected {size - 3}; download"):
        published_processor(
            TrolProcessor, folder, configured(family, size, image_token_id=size - 3)
        )


def test_a_tokenizer_of_the_other_family_is_named(folders):
    folder, size = folders["internlm2"]
    with pytest.raises(DataError, match="the token '<IMG_CONTEXT>' the id None"):
        published_processor(TrolProcessor, folder, configured("phi3", size))


def test_another_decoder_is_refused(folders):
    folder, size = folders["phi3"]
    config = configured("phi3", size)
    config.text_config = LlamaConfig()
    with pytest.raises(UsageError, match="unknown decoder of a published checkpoint 'llama'"):
        published_processor(TrolProcessor, folder, config)


def test_an_unknown_family_has_no_template():
    with pytest.raises(UsageError, match=r"unknown family 'internlm'\. Did you mean 'internlm2'"):
        chat_template("internlm")


@pytest.mark.parametrize(
    ("width", "height", "tiles"),
    [
        (448, 448, 1),
        (640, 480, 7),
        (1000, 500, 3),
        (300, 900, 4),
        (896, 896, 5),
        (100, 100, 1),
        (50, 400, 7),
        (633, 633, 1),
        (634, 634, 5),
        (1792, 448, 5),
    ],
)
def test_the_grid_is_the_nearest_ratio_and_larger_only_for_large_pictures(width, height, tiles):
    processor = TiledImageProcessor()
    assert processor.get_number_of_image_patches(height, width) == tiles


def test_tiles_are_pillows_bicubic_row_by_row_with_the_thumbnail_last():
    picture = drawn(90, 40)
    size = {"height": 16, "width": 16}
    raw = TiledImageProcessor(size=size, do_rescale=False, do_normalize=False)(picture)
    whole = np.array(picture.resize((32, 16), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
    small = np.array(picture.resize((16, 16), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
    wanted = [whole[..., :16], whole[..., 16:], small]
    assert np.array_equal(np.stack(raw["pixel_values"]), np.stack(wanted))
    made = TiledImageProcessor(size=size)(picture, return_tensors="pt")["pixel_values"]
    mean = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
    std = torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    pixels = torch.from_numpy(np.stack(wanted)) / 255
    torch.testing.assert_close(made, (pixels - mean) / std, atol=1e-6, rtol=0)
