"""The probe at attach: families that nobody listed are right, or refused with what was seen."""

import warnings
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import trol
from hosts import HOSTS
from hosts.host import Host
from trol.depth import attached, is_attached, probe
from trol.errors import HostError
from trol.host import layers
from trol.host.cache import new_cache
from trol.host.head import FINAL_NORMS, MULTIPLIED_BY_DIVISOR
from trol.host.names import CACHE
from trol.policies.exits import EarlyExit
from trol.policies.mixer import TrolMixer
from trol.policies.planned import Planned
from trol.policies.random_tokens import RandomTokens

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
LONGCAT = {
    "num_layers": 2,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "head_dim": 8,
    "ffn_hidden_size": 48,
    "expert_ffn_hidden_size": 24,
    "moe_topk": 2,
    "n_routed_experts": 4,
    "zero_expert_num": 2,
    "num_key_value_heads": 4,
}
GRIFFIN = {
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "lru_width": 32,
    "block_types": ["recurrent", "attention"],
    "attention_window_size": 16,
    "logits_soft_cap": 1.0,
}
NGRAMS = {"num_decoder_layers": 2, "num_decoder_attention_heads": 4, "decoder_ffn_dim": 48}
LFM2 = {
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "layer_types": ["conv", "full_attention"] * 2,
}
HYPERCLOVA = {"num_hidden_layers": 2, "num_key_value_heads": 2, "logits_scaling": 0.25}


@torch.no_grad()
def random_model(model_type: str, **settings: Any) -> PreTrainedModel:
    """A tiny model whose weights are large enough that every layer matters."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **{**SIZES, **settings})
    model = AutoModelForCausalLM.from_config(config).eval()
    for weight in model.parameters():
        if weight.ndim > 1:
            weight.copy_(torch.randn_like(weight) * 1.2 / weight[0].numel() ** 0.5)
    return model


@pytest.fixture(autouse=True)
def unlisted(monkeypatch: pytest.MonkeyPatch) -> None:
    """No family has a row of its own, and none was probed before."""
    monkeypatch.setattr(layers, "QUIRKS", {})
    monkeypatch.setattr(probe, "_FINDINGS", {})


@pytest.mark.parametrize(
    ("family", "settings", "seen"),
    [
        ("longcat_flash", LONGCAT, "on a cache than without"),
        ("recurrent_gemma", GRIFFIN, "on a cache than without"),
        ("prophetnet", NGRAMS, "several states for each token"),
    ],
)
def test_a_family_that_would_be_wrong_is_refused(family: str, settings: Any, seen: str) -> None:
    model = random_model(family, **settings)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(HostError, match=seen) as raised:
        trol.attach(model, TrolMixer())
    assert family in str(raised.value)
    assert not is_attached(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    trol.attach(model, TrolMixer(), probe=False)


@pytest.mark.parametrize("host", [pytest.param(h, id=h.name) for h in HOSTS.values()])
def test_every_host_of_the_zoo_passes(host: Host) -> None:
    """And is as it was: mode, random state, hooks, and what it notes of its last inputs."""
    torch.manual_seed(5)
    trol.attach(host.build(), TrolMixer(), probe=False)
    expected = torch.rand(3)
    model, seen = host.build().train(), []
    model.register_forward_hook(lambda *_: seen.append(1))
    noted = {name: repr(value) for name, value in vars(model).items() if name != "_modules"}
    torch.manual_seed(5)
    trol.attach(model, TrolMixer())
    assert torch.equal(torch.rand(3), expected)
    assert not seen
    assert len(model._forward_hooks) == 1
    assert all(module.training for module in model.modules())
    assert {n: repr(v) for n, v in vars(model).items() if n in noted} == noted
    assert probe._FINDINGS
    assert not attached(model)[1].depth_unreadable


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


@pytest.mark.parametrize("family", FAMILIES)
def test_families_that_nobody_listed_are_right(family: str) -> None:
    """Cached = uncached under every kind of policy, and logits are read as they are made."""
    model = random_model(family, **FAMILIES[family])
    ids = torch.randint(10, 90, (1, 7))
    ask: Any = {"max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True}
    for name, made in POLICIES.items():
        trol.attach(model, made())
        assert not attached(model)[1].depth_unreadable
        pair = [
            torch.cat(model.generate(ids, **ask, output_logits=True, use_cache=use).logits)
            for use in (True, False)
        ]
        assert (pair[0] - pair[1]).abs().max() <= 1e-4 * pair[1].abs().max(), name
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


@pytest.mark.parametrize("what", ["error", "warning"])
def test_a_model_that_fails_by_itself_is_not_trols_fault(what: str) -> None:
    """And is tried again once it was mended."""
    model = HOSTS["llama"].build()
    layer = model.model.layers[0].mlp
    forward = layer.forward

    def failing(state: torch.Tensor) -> torch.Tensor:
        if what == "error":
            raise RuntimeError("no such kernel")
        warnings.warn("no such kernel", stacklevel=1)
        return forward(state)

    layer.forward = failing
    with pytest.raises(HostError, match=r"llama cannot be tried: without trol too .*no such ker"):
        trol.attach(model, TrolMixer())
    assert not is_attached(model)
    layer.forward = forward
    trol.attach(model, TrolMixer())


def test_a_class_is_probed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    host, runs = HOSTS["llama"], []
    real = probe._probed
    monkeypatch.setattr(probe, "_probed", lambda *given: runs.append(1) or real(*given))
    for _ in range(2):
        trol.attach(host.build(), TrolMixer())
    assert len(runs) == 1
    trol.attach(host.build(attn="eager"), TrolMixer())
    assert len(runs) == 2


def test_what_cannot_be_read_refuses_who_would_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exits and nothing else: a plan reads no logits."""
    monkeypatch.setattr("trol.host.head.MULTIPLIED_BY_DIVISOR", ())
    model = random_model("hyperclovax", **HYPERCLOVA)
    with pytest.raises(HostError, match=r"early_exit reads predictions .* differ from head"):
        trol.attach(model, EarlyExit("margin", 0.5))
    trol.attach(model, "0-1")
    with (
        pytest.raises(HostError, match="early_exit reads predictions"),
        trol.depth(model, EarlyExit("margin", 0.5)),
    ):
        pass


@pytest.mark.parametrize(
    ("family", "settings"),
    [("hyperclovax", HYPERCLOVA), ("lfm2", LFM2), ("granite", HYPERCLOVA)],
)
def test_families_with_a_head_of_their_own_are_read(family: str, settings: Any) -> None:
    assert "embedding_norm" in FINAL_NORMS
    assert MULTIPLIED_BY_DIVISOR
    model = trol.attach(random_model(family, **settings), EarlyExit("margin", 0.5))
    assert not attached(model)[1].depth_unreadable


def test_weights_that_are_not_at_hand_are_left_alone() -> None:
    """On `meta` nothing can be run, and nothing is found out about the class."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(HOSTS["llama"].config())
    trol.attach(model, "0-3:2")
    assert not probe._FINDINGS


def test_a_stack_shorter_than_the_probe_is_left_alone() -> None:
    """Neither attaching nor asking for its cost passes more tokens than it has positions."""
    settings = {"n_positions": 4, "n_embd": 32, "n_head": 4, "n_layer": 2}
    model = trol.attach(random_model("gpt2", **settings), "0:2 1")
    with trol.trace(model) as seen, torch.no_grad():
        model(torch.tensor([[5, 6, 7]]))
    assert seen.cost.layer_visits == 9
    assert not probe._FINDINGS
