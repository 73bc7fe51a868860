"""Baked plans: plain transformers opens them and computes what the plan computes, or a refusal."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

import trol
from hosts import HOSTS, Host
from hosts.checks import greedy
from trol.checkpoints.export import bake, check_destination, export, plain_host, random_rows
from trol.depth import Plan, depth
from trol.errors import HostError, UsageError
from trol.family import TrolForConditionalGeneration, tiny
from trol.policies.planned import Planned

LAYERS = 6
PLANS = ("0-2 5", "0 2:2 3")

REFUSED = {("qwen3_vl", "0 2:2 3"): r"deepstack\), by number; visit layers 0-1 once"}
"""What cannot be baked in the zoo: (host, plan) -> why."""

DECODER = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_hidden_layers": LAYERS,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
LLAMA = DECODER | {"intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8}
EXPERTS = {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2}
DEEPSEEK = {
    "num_key_value_heads": 4,
    "moe_intermediate_size": 16,
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "head_dim": 4,
}
CUT: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "qwen3_moe": (LLAMA | EXPERTS | {"mlp_only_layers": [1, 4]}, {"mlp_only_layers": [0, 2]}),
    "smollm3": (LLAMA, {"no_rope_layers": [1, 0, 1]}),
    "deepseek_v3": (LLAMA | DEEPSEEK | {"first_k_dense_replace": 4}, {"first_k_dense_replace": 2}),
    "qwen2": (
        LLAMA | {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 3},
        {"layer_types": ["full_attention", "sliding_attention", "sliding_attention"]},
    ),
    "gpt_neo": (
        {k: v for k, v in DECODER.items() if k != "num_attention_heads"}
        | {"num_heads": 4, "attention_types": [[["global", "local"], 3]], "window_size": 6},
        {"attention_layers": ["local", "local", "global"]},
    ),
}
"""Family -> settings, and what plan `1 3-4` makes of those that belong to layers."""

BY_NUMBER: dict[str, tuple[str, dict[str, Any], str]] = {
    "sparse step": (
        "qwen3_moe",
        LLAMA | EXPERTS | {"decoder_sparse_step": 2},
        r"qwen3_moe decides by a layer's number what it is made of.*model.layers.0.mlp",
    ),
    "scale by layer": (
        "gpt2",
        DECODER | {"scale_attn_by_inverse_layer_idx": True},
        "gpt2 sets attn.scaling by the layer's number: .* in layer 1",
    ),
    "no attention left": (
        "lfm2",
        LLAMA | {"full_attn_idxs": [2, 5]},
        "lfm2 does not run with the plan's layers alone",
    ),
}
"""Rules that no configuration entry can follow under plan `1 3-4`: family, settings, refusal."""


def text_model(family: str, settings: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **settings)).eval()
    for weight in model.parameters():
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=0.15)
    return model


class Kept:
    """A stand-in for a processor: leaves one file."""

    def save_pretrained(self, folder: Path) -> None:
        (folder / "tokenizer.json").write_text("{}")


@torch.no_grad()
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("host", [pytest.param(h, id=h.name) for h in HOSTS.values()])
def test_the_zoo_reloads_with_plain_transformers(host: Host, plan: str, tmp_path: Path) -> None:
    model, inputs = host.build(layers=LAYERS), host.inputs(batch=2)
    if refusal := REFUSED.get((host.name, plan)):
        with pytest.raises(HostError, match=refusal):
            bake(model, Plan(plan), [inputs])
        return
    made, difference = bake(model, Plan(plan), [random_rows(model, 0), inputs])
    made.save_pretrained(tmp_path)
    auto = AutoModelForImageTextToText if host.picture else AutoModelForCausalLM
    opened = auto.from_pretrained(tmp_path, attn_implementation=host.attns[-1]).eval()
    assert type(opened) is type(model)
    assert opened.config.get_text_config(decoder=True).num_hidden_layers == 4
    with depth(model, Planned(plan, scope="all")):
        logits, (tokens, steps) = model(**inputs).logits, greedy(model, inputs)
    assert difference <= host.default_exact
    torch.testing.assert_close(opened(**inputs).logits, logits, rtol=0, atol=host.default_exact)
    again, its_steps = greedy(opened, inputs)
    assert torch.equal(again, tokens)
    torch.testing.assert_close(its_steps, steps, rtol=0, atol=host.default_exact)


@pytest.mark.parametrize("family", CUT)
def test_what_belongs_to_layers_is_cut(family: str, tmp_path: Path) -> None:
    settings, wanted = CUT[family]
    model = text_model(family, settings)
    made, difference = bake(model, Plan("1 3-4"), [random_rows(model, 0)])
    made.save_pretrained(tmp_path)
    opened = AutoModelForCausalLM.from_pretrained(tmp_path)
    config = opened.config.to_dict()
    for name, value in wanted.items():
        assert config[name] == value
    assert difference < 1e-5
    rows = random_rows(model, 1)
    assert torch.equal(opened(**rows).logits, made(**rows).logits)


@pytest.mark.parametrize("case", BY_NUMBER)
def test_what_goes_by_the_layers_number_is_refused(case: str) -> None:
    family, settings, refusal = BY_NUMBER[case]
    model = text_model(family, settings)
    with pytest.raises(HostError, match=refusal):
        bake(model, Plan("1 3-4"), [random_rows(model, 0)])


def test_a_stack_that_acts_by_number_is_found_by_its_outputs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Deepstack, were it not known by name: only pictures show it."""
    host = HOSTS["qwen3_vl"]
    model, plan = host.build(layers=LAYERS), Plan("1 3-4")
    monkeypatch.setattr("trol.checkpoints.export._check_deepstack", lambda *_: None)
    bake(model, plan, [random_rows(model, 0)])
    with pytest.raises(HostError, match="does something by layer number"):
        bake(model, plan, [host.inputs()])


def test_copies_are_tensors_of_their_own_and_the_model_stays() -> None:
    model = HOSTS["llama"].build(layers=4)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    made: Any = bake(model, Plan("0 1:2 3"), [random_rows(model, 0)])[0]
    first, second = (made.model.layers[i].mlp.up_proj.weight for i in (1, 2))
    assert torch.equal(first, second)
    assert first.data_ptr() != second.data_ptr()
    assert model.config.num_hidden_layers == 4
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, before[name])


def test_only_a_host_without_trained_parts_is_baked() -> None:
    with pytest.raises(HostError, match="policy 'trol_mixer', which decides while running"):
        plain_host(trol.attach(HOSTS["llama"].build(), "trol_mixer"))
    with pytest.raises(HostError, match="needs trol to open"):
        plain_host(TrolForConditionalGeneration(tiny(40)))
    with pytest.raises(HostError, match="merge its adapters"):
        plain_host(torch.nn.Linear(2, 2))
    model = trol.attach(HOSTS["llama"].build(), "0-1")
    assert not trol.depth.is_attached(plain_host(model))


def test_an_export_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, place = HOSTS["llama"].build(layers=4), tmp_path / "new" / "short"
    place.mkdir(parents=True)  # an empty folder may be there
    done = export(model, Kept(), Plan("0 2:2 3"), place)
    assert (done.layers, done.kept) == (4, [0, 2, 2, 3])
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {
        path.name for path in place.iterdir()
    }
    with pytest.raises(UsageError, match="exists and is not empty"):
        export(model, Kept(), Plan("0"), place)
    monkeypatch.setattr(Kept, "save_pretrained", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export(model, Kept(), Plan("0"), tmp_path / "new" / "other")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["short"]


def test_destinations(tmp_path: Path) -> None:
    check_destination(tmp_path)  # there, but empty
    check_destination(tmp_path / "absent")
    (tmp_path / "file").write_text("")
    for taken in (tmp_path, tmp_path / "file"):
        with pytest.raises(UsageError, match="name a folder that is not there yet"):
            check_destination(taken)


def test_a_plan_of_no_layers_or_too_many() -> None:
    model = HOSTS["llama"].build(layers=4)
    with pytest.raises(UsageError, match="visits no layer"):
        bake(model, Plan("exit@0"), [random_rows(model, 0)])
    with pytest.raises(UsageError, match="this stack has 4 layers"):
        bake(model, Plan("0-9"), [random_rows(model, 0)])
