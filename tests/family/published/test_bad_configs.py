"""What config.json states must be of its kind, and must not contradict the tensors."""

import json

import pytest

from family.published.folders import published_folder, write_json
from trol.errors import DataError
from trol.family.published.opening import find_published


def stating(tmp_path, family, part, change):
    """A folder whose config.json, or a part of it, states something else."""
    folder = published_folder(tmp_path / "it", family)
    config = json.loads((folder / "config.json").read_text())
    (config if part is None else config[part]).update(change)
    write_json(folder / "config.json", config)
    return folder


COUNT, NUMBER = "expected a whole number above 0", "expected a number above 0"
WRONG = [
    ({"num_attention_heads": 0}, "num_attention_heads 0, " + COUNT),
    ({"num_attention_heads": True}, "num_attention_heads True, " + COUNT),
    ({"num_attention_heads": 1000}, "do not divide into 1000"),
    ({"max_position_embeddings": "long"}, "max_position_embeddings 'long', " + COUNT),
    ({"rope_theta": "x"}, "rope_theta 'x', " + NUMBER),
    ({"rope_theta": 0}, "rope_theta 0, " + NUMBER),
    ({"rms_norm_eps": float("nan")}, "rms_norm_eps nan, " + NUMBER),
    ({"hidden_act": "foo"}, "hidden_act 'foo', expected an activation"),
    ({"hidden_act": ["silu"]}, "hidden_act ['silu'], expected an activation"),
    ({"vocab_size": 10}, "states vocab_size 10, but the tensors are made for"),
    ({"hidden_size": "a"}, "states hidden_size 'a', but the tensors are made for 64"),
    ({"bos_token_id": 99999}, "states bos_token_id 99999, expected one of the"),
    ({"eos_token_id": [2, 99999]}, "states eos_token_id 99999, expected one of the"),
    ({"eos_token_id": []}, "eos_token_id [], expected a whole number from 0, or a list"),
]


@pytest.mark.parametrize(("family", "part"), [("internlm2", None), ("phi3", "llm_config")])
@pytest.mark.parametrize(("change", "says"), WRONG)
def test_a_decoder_of_wrong_values(tmp_path, family, part, change, says):
    folder = stating(tmp_path, family, part, change)
    with pytest.raises(DataError) as caught:
        _ = find_published(folder).config
    assert says in str(caught.value)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize(
    ("family", "part", "change", "says"),
    [
        ("internlm2", "vision_config", {"num_attention_heads": 7}, "7, expected a divisor of"),
        ("internlm2", "vision_config", {"num_hidden_layers": 9}, "num_hidden_layers 9, but the"),
        ("internlm2", None, {"img_size": 1}, "an image size of 1 pixels, expected at least one"),
        ("internlm2", None, {"rope_scaling": {"type": "dynamic", "factor": "x"}}, "factor 'x', "),
        ("phi3", "vision_config", {"num_attention_heads": 0}, "num_attention_heads 0, " + COUNT),
        ("phi3", "vision_config", {"intermediate_size": 9}, "intermediate_size 9, but the tensors"),
        ("phi3", None, {"downsample_ratio": 0}, "downsample_ratio 0, " + NUMBER),
        ("phi3", None, {"image_token_index": "x"}, "image_token_index 'x', expected a whole"),
        ("phi3", None, {"img_context_token_id": 10**6}, "the id 1000000, expected one of"),
    ],
)
def test_other_parts_of_wrong_values(tmp_path, family, part, change, says):
    folder = stating(tmp_path, family, part, change)
    with pytest.raises(DataError) as caught:
        _ = find_published(folder).config
    assert says in str(caught.value)


def test_the_factors_of_a_rope(tmp_path):
    scaling = {"type": "su", "short_factor": [1.0, 2.0], "long_factor": [1.0, 2.0]}
    folder = stating(tmp_path, "phi3", "llm_config", {"rope_scaling": scaling})
    with pytest.raises(DataError, match=r"states 2 numbers as short_factor, expected \d+, half"):
        _ = find_published(folder).config
    scaling["long_factor"] = [1.0, "x"]
    folder = stating(tmp_path, "phi3", "llm_config", {"rope_scaling": scaling})
    with pytest.raises(DataError, match="'x'], expected a list of numbers above 0"):
        _ = find_published(folder).config


def test_null_counts_as_left_out(tmp_path):
    nothing = dict.fromkeys(("hidden_size", "vocab_size", "num_hidden_layers", "rms_norm_eps"))
    wanted = find_published(published_folder(tmp_path / "whole", "phi3")).config.text_config
    text = find_published(stating(tmp_path, "phi3", "llm_config", nothing)).config.text_config
    assert text.hidden_size == wanted.hidden_size
    assert text.vocab_size == wanted.vocab_size


def test_a_vocabulary_may_include_its_rows_for_images(tmp_path):
    vocab = find_published(published_folder(tmp_path / "it", "internlm2")).config.image_token_id
    folder = stating(tmp_path, "internlm2", None, {"vocab_size": vocab + 1})
    assert find_published(folder).config.text_config.vocab_size == vocab


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("tokenizer.json", {"model": {}}),
        ("tokenizer.json", {"added_tokens": [{"content": "x"}]}),
        ("tokenizer_config.json", {"added_tokens_decoder": ["x"]}),
        ("added_tokens.json", {"<IMG_CONTEXT>": "first"}),
    ],
)
def test_added_tokens_that_are_listed_otherwise(tmp_path, file, content):
    folder = published_folder(tmp_path / "it", "phi3")
    write_json(folder / file, content)
    with pytest.raises(DataError, match=rf"{file} does not list its added tokens"):
        _ = find_published(folder).config
