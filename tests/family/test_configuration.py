"""TrolConfig: round trips, defaults, and what it refuses."""

import pytest
from transformers import (
    AutoConfig,
    CLIPConfig,
    CLIPVisionConfig,
    GPT2Config,
    Qwen3Config,
    SiglipVisionConfig,
)

from trol.errors import UsageError
from trol.family import TrolConfig, tiny


def test_round_trip_through_auto_config(tmp_path):
    depth = {"policy": "trol_mixer", "passes": 3, "scope": "question"}
    config = tiny(30, depth=depth)
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is TrolConfig
    assert type(loaded.vision_config) is SiglipVisionConfig
    assert loaded.depth == {**depth, "initial_gate": None}
    assert loaded.to_diff_dict() == config.to_diff_dict()


def test_parts_are_any_registered_config_or_its_dict():
    config = TrolConfig(
        vision_config={"model_type": "clip_vision_model", "image_size": 490, "patch_size": 14},
        text_config={"model_type": "qwen3", "hidden_size": 64},
    )
    assert type(config.vision_config) is CLIPVisionConfig
    assert type(config.text_config) is Qwen3Config
    assert config.tokens_per_image == 1225


def test_defaults_stand_for_published_trol():
    config = TrolConfig()
    assert config.depth == {"policy": "trol_mixer", "initial_gate": None}
    assert (config.vision_config.model_type, config.text_config.model_type) == (
        "clip_vision_model",
        "llama",
    )


def test_default_depth_is_not_shared_between_configs():
    before = dict(TrolConfig().depth)
    TrolConfig().depth["passes"] = 5
    assert TrolConfig().depth == before


def test_a_pair_of_towers_gives_its_vision_part():
    assert type(TrolConfig(vision_config=CLIPConfig()).vision_config) is CLIPVisionConfig


def test_a_tied_decoder_ties_the_head():
    assert TrolConfig(text_config=GPT2Config()).tie_word_embeddings
    assert not TrolConfig().tie_word_embeddings


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"depth": {"passes": 2}}, "names no policy"),
        ({"depth": {"policy": "trol_mixer", "tau": float("nan")}}, "JSON"),
        ({"depth": {"policy": "trol_mixer", "gate": object()}}, "JSON"),
        ({"projector_positions": 7}, "one image is 49 tokens; give 49, or 0"),
        ({"projector_hidden_act": "gellu"}, "Did you mean 'gelu'"),
        ({"text_config": {"model_type": "lama"}}, "Did you mean 'llama'"),
        ({"vision_config": {"model_type": "qwen2_vl_vision"}}, "image_size"),
    ],
)
def test_refusals_say_what_and_what_to_do(settings, says):
    with pytest.raises(UsageError, match=says):
        TrolConfig(**settings)
