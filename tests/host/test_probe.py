"""The probe at attach: a family without a note is right, or refused with what the probe saw."""

import warnings
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import trol
from hosts import HOSTS
from hosts.host import Host
from trol.depth import attached, is_attached, probe
from trol.errors import HostError
from trol.host import layers
from trol.host.layers import FINAL_NORMS, MULTIPLIED_BY_DIVISOR
from trol.policies.exits import EarlyExit
from trol.policies.mixer import TrolMixer

from .tiny_families import HYPERCLOVA, LFM2, random_model

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


@pytest.fixture(autouse=True)
def unlisted(monkeypatch: pytest.MonkeyPatch) -> None:
    """No family has a row of its own, and none was probed before."""
    monkeypatch.setattr(layers, "FAMILY_NOTES", {})
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
    """Afterwards it is as before: mode, random state, hooks, what it notes of its last inputs."""
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


@pytest.mark.parametrize("what", ["error", "warning"])
def test_a_model_that_fails_by_itself_is_not_trols_fault(what: str) -> None:
    """The probe tries it again after it was mended."""
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


def test_policies_that_read_logits_are_refused_where_they_cannot_be_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Early exits are refused; a plan reads no logits."""
    monkeypatch.setattr("trol.host.layers.MULTIPLIED_BY_DIVISOR", ())
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
    """On `meta` nothing can be run, and the probe notes nothing of the class."""
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
