"""Gradients, gradient checkpointing, Trainer and PEFT."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer, TrainingArguments

from hosts import HOSTS, Host
from hosts.checks import greedy
from hosts.host import Inputs
from trol import depth
from trol.checkpoints.adapter import load, save
from trol.depth import attach, attached, detach, trace
from trol.depth.attachment import gates_of
from trol.host.trainer import checkpoint_activations
from trol.policies.mixer import TrolMixer

from .subjects import POLICIES, attach_settled, gap, made, some_hosts

# PEFT and Trainer ask transformers by names that it has renamed.
RENAMED = "ignore:.*gradient_checkpointing.*:FutureWarning"
pytestmark = pytest.mark.filterwarnings(RENAMED)

EVERY = some_hosts(*HOSTS)


@pytest.mark.parametrize("host", EVERY)
def test_gates_are_distinct_and_all_learn(host: Host) -> None:
    """L (D + 1) parameters in L gates, each with a finite gradient that is not 0.

    The published code writes [nn.Linear(D, 1)] * L: one gate under L names.
    """
    model = attach(host.build(), TrolMixer(initial_gate=None))
    gates = [gate for gate in gates_of(attached(model)[1]) if gate is not None]
    weights = [gate.weight for gate in gates]
    assert len(gates) == len({id(weight) for weight in weights}) == 4
    assert sum(p.numel() for gate in gates for p in gate.parameters()) == 4 * (32 + 1)
    assert all(gap(a, b) > 1e-3 for a in weights for b in weights if a is not b)
    _loss(model, host.inputs(batch=2)).backward()
    for gate in gates:
        assert _learns(gate.weight)
        assert _learns(gate.bias)
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("host", some_hosts("llama", "gpt2", "qwen3_vl"))
def test_a_shared_gate_is_one(host: Host) -> None:
    """D + 1 parameters, and the gradient of all layers."""
    model = attach(host.build(), TrolMixer(sharing="shared"))
    own = {id(p): p for name, p in model.named_parameters() if ".depth." in name}
    assert sum(p.numel() for p in own.values()) == 32 + 1
    inputs = host.inputs(batch=2)
    _loss(model, inputs).backward()
    (shared,) = (p.grad for p in own.values() if p.ndim == 2)
    apart = attach(host.build(), TrolMixer())
    for gate in gates_of(attached(apart)[1]):
        gate.load_state_dict(gates_of(attached(model)[1])[0].state_dict())
    _loss(apart, inputs).backward()
    parts = [gate.weight.grad for gate in gates_of(attached(apart)[1])]
    assert gap(shared, sum(parts)) <= 1e-4 * shared.abs().max()
    assert all(_learns(part) for part in (shared, *parts))


@pytest.mark.parametrize("initial", [0.001, 0.5])
def test_the_first_value_of_a_gate(initial: float) -> None:
    """0.001: nearly the host, and yet every gate learns."""
    host = HOSTS["llama"]
    model, inputs = host.build(), host.inputs(batch=2)
    with torch.no_grad():
        bare = model(**inputs).logits
    attach(model, TrolMixer(initial_gate=initial))
    with trace(model) as seen:
        out = model(**inputs).logits
    assert gap(seen.weights[:, 2], torch.full_like(seen.weights[:, 2], initial)) <= 1e-6
    assert (gap(out, bare) < 0.05) == (initial == 0.001)
    _loss(model, inputs).backward()
    assert all(_learns(gate.weight) for gate in gates_of(attached(model)[1]))


@pytest.mark.parametrize(
    ("host", "name"),
    [
        pytest.param(host, name, id=f"{host.name}-{name}")
        for host in HOSTS.values()
        for name in ("trol_question", "trol", "trol_three", "trol_tau", "skip_answer")
        if name == "trol_question" or host.name in ("llama", "gpt2", "qwen3_next", "gemma3_vl")
    ],
)
def test_gradient_checkpointing_changes_nothing(host: Host, name: str) -> None:
    """Loss and every gradient; with labels a question is in scope and its answer is not.

    Forward runs again when the call is over: the roles must come along with it.
    """
    policy = TrolMixer(training_scope="question") if name == "trol_question" else made(name)
    results = []
    for reentrant in (None, False, True):
        model = attach_settled(host.build(), policy).train()
        if reentrant is not None:
            checkpoint_activations(model, use_reentrant=reentrant)
            model.enable_input_require_grads()
        loss = _loss(model, host.inputs(batch=2))
        loss.backward()
        results.append((loss, {n: p.grad for n, p in model.named_parameters()}))
    (plain, gradients), *others = results
    assert any(g is not None and g.abs().max() > 0 for g in gradients.values())
    for loss, grads in others:
        assert gap(loss, plain) <= 1e-6
        for key, gradient in gradients.items():
            if gradient is not None:  # an image tower below frozen inputs may get none
                assert gap(grads[key], gradient) <= 1e-5 * (1 + gradient.abs().max()), key


@pytest.mark.parametrize("host", some_hosts("llama", "mistral", "gpt2", "falcon_h1", "llava"))
@pytest.mark.parametrize("scope", ["question", "answer"])
def test_labels_tell_the_roles(host: Host, scope: str) -> None:
    """In training as in inference; training has a scope of its own, published as `all`."""
    model, inputs = host.build(), host.inputs(batch=2)
    labels = _labels(inputs)
    told = {"assistant_masks": (labels != -100).long()}
    attach_settled(model, TrolMixer(scope=scope, training_scope=scope))
    with torch.no_grad():
        expected = model(**inputs, **told, use_cache=False).logits
        assert torch.equal(model(**inputs, labels=labels, use_cache=False).logits, expected)
        assert gap(model.train()(**inputs, labels=labels, use_cache=False).logits, expected) < 1e-4
        detach(model)
        attach_settled(model, TrolMixer(scope=scope))  # training_scope: all
        everywhere = model.train()(**inputs, labels=labels, use_cache=False).logits
        assert gap(everywhere, expected) > 1e-2
        assert gap(model.eval()(**inputs, labels=labels, use_cache=False).logits, expected) < 1e-4


@pytest.mark.parametrize("host", some_hosts("llama", "gemma3", "qwen3_next"))
@pytest.mark.parametrize("name", [name for name in POLICIES if name != "plain"])
def test_gradients_flow_through_every_policy(host: Host, name: str) -> None:
    """Into every layer that somebody visits, and into none that all skip."""
    model = attach_settled(host.build(), made(name)).train()
    _loss(model, host.inputs(batch=2)).backward()
    skipped = {"skip": {1}, "skip_first": {0}, "exit": {2, 3}, "repeat": {2}}.get(name, set())
    layers = attached(model)[1].layers
    for i, layer in enumerate(layers):
        grads = [p.grad for p in layer.parameters() if p.grad is not None]
        assert all(g.isfinite().all() for g in grads)
        assert any(g.abs().max() > 0 for g in grads) == (i not in skipped)


def test_one_step_of_the_trainer(tmp_path: Path) -> None:
    """Trainer passes labels, accelerate wraps the forward, and gates and layers move."""
    host = HOSTS["llama"]
    model = attach(host.build(), TrolMixer(training_scope="question"))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    inputs = host.inputs(batch=4)
    rows = [
        {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
        for ids, labels in zip(inputs["input_ids"], _labels(inputs), strict=True)
    ]
    settings = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        save_strategy="no",
        dataloader_pin_memory=False,
    )
    Trainer(model=model, args=settings, train_dataset=rows).train()
    still = [name for name, p in model.named_parameters() if torch.equal(p, before[name])]
    assert not still
    detach(model.eval())
    assert model(**inputs).logits.isfinite().all()


def _lora(model: PreTrainedModel) -> PeftModel:
    settings = {"r": 4, "target_modules": "all-linear", "init_lora_weights": False}
    settings["fan_in_fan_out"] = model.config.model_type == "gpt2"
    return get_peft_model(model, LoraConfig(**settings))


@pytest.mark.parametrize("host", some_hosts("llama", "gpt2", "qwen2_5_vl"))
@pytest.mark.parametrize("name", ["trol", "trol_all", "skip_first", "skip_answer"])
def test_lora_on_an_attached_model(host: Host, name: str) -> None:
    """Attach first, then PEFT: generate, trace, another depth, merge; the same as on the host."""
    inputs = host.inputs(batch=2)
    model = attach_settled(host.build(), made(name))
    alone = greedy(model, inputs)[1]
    tuned = _lora(model)
    said = greedy(tuned, inputs)
    assert gap(said[1], alone) > 1e-2  # the LoRA weights matter
    with torch.no_grad(), tuned.disable_adapter():
        assert gap(greedy(tuned, inputs)[1], alone) <= host.default_exact
    with torch.no_grad(), depth(tuned, "exit@1"), trace(tuned) as seen:
        tuned(**inputs)
    assert seen.visits[1:].sum() == 0
    merged = tuned.merge_and_unload()
    assert gap(greedy(merged, inputs)[1], said[1]) <= 1e-3
    with depth(merged, "all"):
        plain = greedy(merged, inputs)[1]
    detach(merged)
    assert gap(greedy(merged, inputs)[1], plain) <= host.default_exact
    assert gap(plain, said[1]) > 1e-2


def test_gates_learn_beside_lora(tmp_path: Path) -> None:
    """`modules_to_save` keeps the gates training; the adapter of trol saves them all the same."""
    host = HOSTS["llama"]
    model, inputs = attach_settled(host.build(), made("trol")), host.inputs(batch=2)
    for gate in gates_of(attached(model)[1]):
        gate.requires_grad_(True)
    tuned = _lora(model)
    for name, parameter in tuned.named_parameters():
        if ".depth." in name:
            parameter.requires_grad_(True)
    loss = _loss(tuned, inputs)
    loss.backward()
    grown = [name for name, p in tuned.named_parameters() if p.grad is not None and _learns(p)]
    assert sum(".depth.weight" in name for name in grown) == 4
    assert all(".depth." in name or "lora_" in name for name in grown)
    save(tuned, tmp_path)
    fresh = load(host.build(), tmp_path)
    gates = zip(gates_of(attached(fresh)[1]), gates_of(attached(tuned)[1]), strict=True)
    assert all(torch.equal(mine.weight, theirs.weight) for mine, theirs in gates)


def test_modules_to_save_keeps_the_gates(tmp_path: Path) -> None:
    """PEFT's own way to train the gates beside LoRA: a copy of each, saved with the adapter."""
    host = HOSTS["llama"]
    model, inputs = attach_settled(host.build(), made("trol")), host.inputs(batch=2)
    alone = greedy(model, inputs)[1]
    config = LoraConfig(
        r=4, target_modules=["q_proj"], exclude_modules=["depth"], modules_to_save=["depth"]
    )
    tuned = get_peft_model(model, config)
    assert gap(greedy(tuned, inputs)[1], alone) <= 5e-5
    _loss(tuned, inputs).backward()
    trained = {n: p for n, p in tuned.named_parameters() if p.requires_grad and ".depth." in n}
    assert sum(p.ndim == 2 and _learns(p) for p in trained.values()) == 4
    with torch.no_grad():
        for parameter in trained.values():
            parameter.add_(1.0)
    said = greedy(tuned, inputs)[1]
    assert gap(said, alone) > 1e-2
    tuned.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(attach_settled(host.build(), made("trol")), tmp_path)
    assert gap(greedy(again, inputs)[1], said) <= 5e-5
    with depth(tuned, TrolMixer(scope="all")):
        assert gap(greedy(tuned, inputs)[1], said) > 1e-2
    save(tuned, tmp_path / "trol")
    merged = tuned.merge_and_unload()
    assert gap(greedy(merged, inputs)[1], said) <= 1e-3
    alone = load(host.build(), tmp_path / "trol")
    gates = zip(gates_of(attached(merged)[1]), gates_of(attached(alone)[1]), strict=True)
    assert all(torch.equal(mine.weight, theirs.weight) for mine, theirs in gates)


def _labels(inputs: Inputs) -> Tensor:
    """The last four tokens are answer."""
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[:, -4:] = inputs["input_ids"][:, -4:]
    return labels


def _loss(model: nn.Module, inputs: Inputs) -> Tensor:
    return model(**inputs, labels=_labels(inputs), use_cache=False).loss


def _learns(parameter: Tensor) -> bool:
    gradient = parameter.grad if isinstance(parameter, nn.Parameter) else parameter
    return gradient is not None and bool(gradient.isfinite().all()) and gradient.abs().max() > 1e-9
