"""Low-rank updates on any host: where they go, what they leave, and second visits' own."""

import pytest
import torch
from torch import nn

import trol
from hosts import HOSTS
from trol.errors import HostError, UsageError
from trol.host.trainer import checkpoint_activations
from trol.training.adapters import finished, learner_of, linear_maps, low_rank, merged
from trol.training.recipe import Stage
from trol.training.trainable import part_of

FAMILIES = ("llama", "qwen3", "phi3", "gpt2", "opt", "mixtral", "llava", "smolvlm", "internvl")
VISUAL = ("qwen2_5_vl", "qwen3_vl", "idefics3", "gemma3_vl")


def stage(*parts: str, **settings) -> Stage:
    return Stage(train=parts, data="chat.jsonl", steps=1, **settings)


def parts_of(host) -> tuple[str, ...]:
    return ("projector", "mixers", "decoder") if host.kind == "vlm" else ("mixers", "decoder")


def loss_of(model, inputs) -> torch.Tensor:
    return model(**inputs, labels=inputs["input_ids"], use_cache=False).loss


@pytest.mark.parametrize("name", [*FAMILIES, *VISUAL])
def test_all_that_is_to_learn_learns_and_nothing_else(name: str) -> None:
    host = HOSTS[name]
    model = trol.attach(host.build(), "trol_mixer")
    learner = learner_of(model, stage(*parts_of(host), lora=2))
    loss_of(learner.train(), host.inputs(2)).backward()
    learning = {n: p for n, p in learner.named_parameters() if p.requires_grad}
    assert {part_of(n) for n in learning} == set(parts_of(host))
    assert all("lora_" in n for n in learning if part_of(n) == "decoder")
    assert all(p.grad is not None for p in learning.values())
    updated = {n.rsplit(".lora_B", 1)[0] for n in learning if "lora_B" in n}
    layers = {n for n, m in learner.named_modules() if isinstance(m, nn.Linear)} - updated
    maps = [n for n in layers if ".layers." in n and part_of(n + ".x") == "decoder"]
    assert all(n.endswith("base_layer") or ".lora_" in n for n in maps if "depth" not in n)


@pytest.mark.parametrize("name", FAMILIES[:4])
def test_merged_is_unmerged(name: str) -> None:
    host = HOSTS[name]
    torch.manual_seed(1)
    learner = low_rank(trol.attach(host.build(), "trol_mixer"), 2, 8)
    for key, parameter in learner.named_parameters():
        if "lora_B" in key:
            nn.init.normal_(parameter, std=0.3)
    inputs = host.inputs(2)
    with torch.no_grad():
        before = learner.eval()(**inputs).logits
        model = finished(learner, stage("decoder", lora=2, lora_alpha=8))
        after = model(**inputs).logits
    assert not any("lora_" in key for key in model.state_dict())
    assert (before - after).abs().max() < 50 * host.default_exact


def per_visit(host, *, again: float = 0.0):
    """A learner whose first update is not zero; the second visits' own has this spread."""
    torch.manual_seed(2)
    learner = low_rank(trol.attach(host.build(), "trol_mixer"), 2, per_visit=True)
    source = torch.Generator().manual_seed(3)
    for key, parameter in learner.named_parameters():
        if "lora_B.default" in key:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=source)
        if "lora_B.again" in key:
            parameter.data = again * torch.randn(parameter.shape, generator=source)
    return learner


@pytest.mark.parametrize("name", ["llama", "gpt2", "internvl"])
def test_a_second_update_of_zero_is_plain_low_rank(name: str) -> None:
    host = HOSTS[name]
    learner, inputs = per_visit(host), host.inputs(2)
    plain = low_rank(trol.attach(host.build(), "trol_mixer"), 2)
    plain.load_state_dict(
        {k: v for k, v in learner.state_dict().items() if "again" not in k}, strict=True
    )
    with torch.no_grad():
        assert torch.equal(learner.eval()(**inputs).logits, plain.eval()(**inputs).logits)


@pytest.mark.parametrize("name", ["llama", "internvl"])
def test_the_second_update_acts_in_second_visits_alone(name: str) -> None:
    host = HOSTS[name]
    inputs = host.inputs(2)
    none, some = (per_visit(host, again=again).eval() for again in (0.0, 0.5))
    with torch.no_grad():
        assert (none(**inputs).logits - some(**inputs).logits).abs().max() > 1e-2
        with trol.depth(none, "plain"), trol.depth(some, "plain"):
            assert torch.equal(none(**inputs).logits, some(**inputs).logits)


def test_what_it_computes_is_two_layers_with_two_sets_of_weights() -> None:
    """One layer, both visits by hand: the second with both updates merged into its weights."""
    host = HOSTS["llama"]
    learner = per_visit(host, again=0.5).eval()
    first, both = host.build(), host.build()
    for model, names in ((first, ("default",)), (both, ("default", "again"))):
        for key, module in learner.get_base_model().named_modules():
            if hasattr(module, "lora_B"):
                weight = model.get_submodule(key).weight
                for one in names:
                    up, down = module.lora_B[one].weight, module.lora_A[one].weight
                    weight.data += up @ down
    state = torch.randn(1, 5, first.config.hidden_size)
    place = torch.arange(5)[None]
    rope = first.model.rotary_emb(state, place)
    layer = learner.get_base_model().model.layers[0]
    seen = {}
    layer.register_forward_hook(lambda _, inputs, out: seen.update(x=inputs[0], out=out))
    with torch.no_grad():
        learner(inputs_embeds=state, use_cache=False)
        mask = {"position_embeddings": rope, "attention_mask": None}
        once = first.model.layers[0](state, **mask)
        twice = both.model.layers[0](once, **mask)
        gate = layer.depth(once)[..., None]
    assert torch.equal(seen["x"], state)
    assert (seen["out"] - ((1 - gate) * once + gate * twice)).abs().max() < 1e-5


@pytest.mark.parametrize("checkpointing", [False, True])
def test_both_updates_learn_with_and_without_checkpointing(checkpointing: bool) -> None:
    host = HOSTS["llama"]
    learner = per_visit(host, again=0.5).train()
    gradients = []
    for on in (False, checkpointing):
        learner.zero_grad()
        if on:
            checkpoint_activations(learner.get_base_model())
        loss_of(learner, host.inputs(2)).backward()
        gradients.append({n: p.grad for n, p in learner.named_parameters() if "lora_" in n})
    assert all(g is not None and g.abs().max() > 0 for g in gradients[0].values())
    assert all(torch.equal(gradients[0][n], gradients[1][n]) for n in gradients[0])


def test_updates_that_cannot_be_merged_stay() -> None:
    host = HOSTS["llama"]
    own = learner_of(
        trol.attach(host.build(), "trol_mixer"), stage("decoder", lora=2, per_visit=True)
    )
    with pytest.raises(HostError, match="no one matrix to merge into"):
        merged(own)
    assert finished(own, stage("decoder", lora=2, per_visit=True)) is own
    apart = learner_of(trol.attach(host.build(), "trol_mixer"), stage("decoder", lora=2))
    assert finished(apart, stage("decoder", lora=2, merge=False)) is apart


def test_a_later_stage_goes_on_with_the_same_updates_or_is_refused() -> None:
    learner = low_rank(trol.attach(HOSTS["llama"].build(), "trol_mixer"), 2)
    assert low_rank(learner, 2) is learner
    with pytest.raises(UsageError, match=r"with {'lora': 2, .*the stage wants {'lora': 4"):
        low_rank(learner, 4)
    some = {"targets": ["q_proj"]}
    with pytest.raises(UsageError, match=r"the stage wants {'maps': .*q_proj"):
        low_rank(learner, 2, **some)
    learner = low_rank(trol.attach(HOSTS["llama"].build(), "trol_mixer"), 2, **some)
    assert low_rank(learner, 2, **some) is learner


TARGETS = {
    "llama": ["v_proj", "1.mlp.down_proj"],
    "gpt2": ["c_attn", "0.mlp.c_proj"],
    "llava": ["self_attn.o_proj", "1.self_attn.q_proj"],
}


@pytest.mark.parametrize("name", TARGETS)
def test_updates_are_on_the_targets_and_on_nothing_else(name: str) -> None:
    model = trol.attach(HOSTS[name].build(), "trol_mixer")
    settings = {"lora": 1, "lora_targets": tuple(TARGETS[name])}
    learner = learner_of(model, stage("decoder", **settings))
    learning = [n for n, p in learner.named_parameters() if p.requires_grad]
    updated = {n.partition(".layers.")[2] or n.partition(".h.")[2] for n in learning}
    everywhere, one = TARGETS[name]
    layers = {n.partition(".")[0] for n in linear_maps(learner.get_base_model())}
    found = {n.partition(".lora_")[0] for n in updated}
    assert one in found
    assert {n.partition(".")[0] for n in found if n.endswith(f".{everywhere}")} == layers
    assert len(found) == len(layers) + 1
    assert len(learning) == 2 * len(found)


def test_a_target_that_is_no_map_is_told_with_what_there_is() -> None:
    model = trol.attach(HOSTS["llama"].build(), "trol_mixer")
    with pytest.raises(UsageError, match=r"'v_prj'\. Did you mean 'v_proj'"):
        low_rank(model, 2, targets=["q_proj", "v_prj"])


def test_a_detached_model_counts_no_visits() -> None:
    host = HOSTS["llama"]
    before = type(host.build().model.layers[0])
    model = trol.attach(host.build(), "trol_mixer")
    low_rank(model, 2, per_visit=True)
    trol.detach(model)
    assert all(type(layer) is before for layer in model.model.layers)


def test_a_missing_part_is_told_with_what_there_is() -> None:
    model = trol.attach(HOSTS["llama"].build(), "trol_mixer")
    with pytest.raises(HostError, match=r"no projector to train; it has: decoder \(\d+ param"):
        learner_of(model, stage("projector", "mixers"))
    plain = trol.attach(HOSTS["llava"].build(), "plain")
    with pytest.raises(HostError, match="no mixers"):
        learner_of(plain, stage("projector", "mixers"))


def test_maps_that_peft_refuses_are_told() -> None:
    model = trol.attach(HOSTS["falcon_h1"].build(), "trol_mixer")
    with pytest.raises(HostError, match="takes no low-rank updates"):
        low_rank(model, 2)
