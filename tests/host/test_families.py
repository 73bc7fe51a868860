"""Families without a note of their own: cached equals uncached, and logits are read rightly."""

from typing import Any

import pytest
import torch
from transformers import MllamaConfig, MllamaForConditionalGeneration

import trol
from hosts.releases import OLDEST
from trol.depth import attached
from trol.errors import HostError
from trol.host.cache import new_cache
from trol.host.names import CACHE
from trol.host.trial import difference
from trol.policies.exits import EarlyExit
from trol.policies.mixer import TrolMixer
from trol.policies.planned import Planned
from trol.policies.random_tokens import RandomTokens

from .tiny_families import HYPERCLOVA, LFM2, SIZES, random_model

MLA = {
    "num_hidden_layers": 2,
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "head_dim": 8,
    "moe_intermediate_size": 24,
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
}
INDEXED = {**MLA, "index_n_heads": 2, "index_head_dim": 8, "index_topk": 64}
GROUPED = {"num_hidden_layers": 2, "num_key_value_heads": 2, "head_dim": 8}
FAMILIES: dict[str, dict[str, Any]] = {
    "biogpt": {"num_hidden_layers": 2},
    "cohere2": {**GROUPED, "sliding_window": 6},
    "ctrl": {"n_embd": 32, "dff": 48, "n_layer": 2, "n_head": 4},
    "deepseek_v32": INDEXED,
    "granitemoehybrid": {
        **GROUPED,
        "layer_types": ["mamba", "attention"],
        "mamba_n_heads": 4,
        "mamba_d_head": 16,
        "mamba_d_state": 8,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "shared_intermediate_size": 24,
    },
    "hyperclovax": HYPERCLOVA,
    "lfm2": LFM2,
    "minicpm3": {k: v for k, v in MLA.items() if "expert" not in k and "group" not in k},
    "nanochat": GROUPED,
    "xglm": {"num_layers": 2, "ffn_dim": 48, "d_model": 32, "attention_heads": 4},
}
"""Families that no row names, one of each make: latent attention, indexed keys, recurrent layers,
norms, heads and caches of their own."""

POLICIES = {
    "all:2": lambda: Planned("all:2"),
    "skip": lambda: Planned("1"),
    "question": lambda: TrolMixer(scope="question"),
    "all": lambda: TrolMixer(scope="all"),
    "exit": lambda: EarlyExit("margin", 0.02, scope="all"),
    "random": lambda: RandomTokens(0.5),
    "random_skip": lambda: RandomTokens(0.5, visit=1),
}


def cached_difference(model: Any, ids: torch.Tensor, **given: Any) -> float:
    """How far the logits of decoding with a cache are from those without, as a share."""
    ask: Any = {"max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True}
    pair = [
        torch.cat(model.generate(ids, **given, **ask, output_logits=True, use_cache=use).logits)
        for use in (True, False)
    ]
    return difference(*pair)


@pytest.mark.parametrize("family", FAMILIES)
def test_families_without_a_note_are_right(family: str) -> None:
    """Cached = uncached under every kind of policy, and the probe can read their logits."""
    model = random_model(family, **FAMILIES[family])
    ids = torch.randint(10, 90, (1, 7))
    for name, new_policy in POLICIES.items():
        trol.attach(model, new_policy())
        assert not attached(model)[1].depth_unreadable
        assert cached_difference(model, ids) <= 1e-4, name
        trol.detach(model)


@pytest.mark.parametrize("family", ["deepseek_v32", "granitemoehybrid", "nanochat"])
def test_a_later_question_finds_the_planes_of_an_earlier_one(family: str) -> None:
    """One cache over question, answer and question, and all of it at once."""
    model = trol.attach(random_model(family, **FAMILIES[family]), TrolMixer())
    ids, masks = torch.randint(10, 90, (1, 9)), torch.tensor([[0, 0, 0, 1, 1, 1, 0, 0, 0]])
    with torch.no_grad():
        whole = model(ids, assistant_masks=masks, use_cache=False).logits
        cache, parts = new_cache(model.config), []
        for part in (slice(0, 3), slice(3, 6), slice(6, 9)):
            given = {"assistant_masks": masks[:, part], CACHE: cache}
            parts.append(model(ids[:, part], **given).logits)
    assert (torch.cat(parts, 1) - whole).abs().max() <= 1e-4 * whole.abs().max()


def mllama(*cross: int) -> MllamaForConditionalGeneration:
    """A tiny Llama 3.2 that looks at pictures in these of its four layers."""
    rope = {"rope_type": "default", "rope_theta": 1e4}
    text = {**SIZES, "num_hidden_layers": 4, "num_key_value_heads": 2, "rope_parameters": rope}
    size = {"hidden_size": 16, "intermediate_size": 16, "attention_heads": 2}
    depth = {"num_hidden_layers": 1, "num_global_layers": 1, "intermediate_layers_indices": [0]}
    tiles = {"image_size": 8, "patch_size": 4, "max_num_tiles": 1}
    shown = {"supported_aspect_ratios": [[1, 1]], "vision_output_dim": 32}
    config = MllamaConfig(
        vision_config={**size, **depth, **tiles, **shown},
        text_config={**text, "cross_attention_layers": list(cross)},
        image_token_index=96,
    )
    model = MllamaForConditionalGeneration(config).eval()
    for name, weight in model.named_parameters():
        if weight.ndim > 1:
            weight.data.copy_(torch.randn_like(weight) * 1.2 / weight[0].numel() ** 0.5)
        elif "gate" in name:
            weight.data.fill_(0.7)
    return model


def test_layers_that_look_at_pictures_are_right() -> None:
    """Their keys are of the picture, not of the tokens, and their places in the cache too."""
    model, ids = mllama(1, 2), torch.randint(10, 90, (1, 7))
    ids[0, 0] = 96
    seen = {
        "pixel_values": torch.randn(1, 1, 1, 3, 8, 8),
        "aspect_ratio_ids": torch.ones(1, 1, dtype=torch.long),
        "aspect_ratio_mask": torch.ones(1, 1, 1, dtype=torch.long),
        "cross_attention_mask": torch.ones(1, 7, 1, 1, dtype=torch.long),
    }
    for name, new_policy in POLICIES.items():
        try:
            trol.attach(model, Planned("0 2-3") if name == "skip" else new_policy())
        except HostError as error:  # transformers 5.16 runs these layers without a picture as well
            if not OLDEST:
                raise
            pytest.skip(str(error))
        for given in ({}, seen):
            assert cached_difference(model, ids, **given) <= 1e-4, name
        trol.detach(model)
    with pytest.raises(HostError, match="last layer is not called where there are ids alone"):
        trol.attach(mllama(1, 3), TrolMixer())
