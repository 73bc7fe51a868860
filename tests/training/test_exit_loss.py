"""The exit loss is LayerSkip's formula, its parts add up, and what it teaches learns."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from hosts import HOSTS, Host
from hosts.host import Inputs
from training.standins import chats, llm
from trol import load_model
from trol.depth import attach, attached, depth
from trol.depth.attachment import gates_of
from trol.depth.readout import Readout
from trol.errors import UsageError
from trol.host.trainer import checkpoint_activations
from trol.policies.exits import EarlyExit, LayerDropout
from trol.training import resolve, run
from trol.training.losses import ExitLoss, exits_of, final_loss, weights
from trol.training.recipe import CURRICULA

HOST = HOSTS["llama"]
SOME = [pytest.param(HOSTS[name], id=name) for name in ("llama", "gpt2", "gemma2", "llava", "opt")]


def _labelled(host: Host, batch: int = 2, seed: int = 0) -> Inputs:
    inputs = host.inputs(batch=batch, seed=seed)
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[:, -5:] = inputs["input_ids"][:, -5:]
    labels[0, -5:-3] = -100
    return inputs | {"labels": labels}


def test_weights_are_layerskip_s() -> None:
    """By hand for L = 5: sums 0, 1, 3, 6 below, and L - 1 + scale * 6 at the top."""
    assert weights(5, 0.5) == [0, 0.5, 1.5, 3, 4 + 3]
    assert weights(5, 0.0) == [0, 0, 0, 0, 4]
    assert all(a < b for a, b in pairwise(weights(24, 0.2)))


@pytest.mark.parametrize("host", SOME)
def test_the_loss_is_its_formula(host: Host) -> None:
    """(sum_l e(l) CE_l) / sum_l e(l), every output of a layer read by the bare host itself."""
    model, inputs = host.build(layers=5), _labelled(host)
    losses = [_cut(model, inputs, layer) for layer in range(1, 6)]
    shares = weights(5, 0.3)
    expected = sum(e * loss for e, loss in zip(shares, losses, strict=True)) / sum(shares)
    attach(model, "all")
    loss = ExitLoss(0.3)(model, **inputs)
    assert abs(loss - expected) <= 1e-5
    assert abs(loss - final_loss(model, **inputs)) > 1e-3
    assert abs(ExitLoss(0.0)(model, **inputs) - final_loss(model, **inputs)) <= 1e-6


def _cut(model: PreTrainedModel, inputs: Inputs, layer: int) -> Tensor:
    """The host's own loss with every layer from `layer` on left out."""
    with torch.no_grad(), depth(model, f"exit@{layer}"):
        return model(**inputs, use_cache=False).loss


@pytest.mark.parametrize("curriculum", CURRICULA)
def test_parts_of_a_batch_add_up(curriculum: str) -> None:
    """With the answer tokens of the whole batch told, parts add to the loss and its gradient."""
    whole, ask = _labelled(HOST, batch=3), ExitLoss(0.5, curriculum, 2, step=3, steps=8)
    items = (whole["labels"] != -100).sum()
    model = attach(HOST.build(layers=6), "all").train()
    loss = ask(model, **whole)
    loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    parts = [{k: v[rows] for k, v in whole.items()} for rows in (slice(0, 1), slice(1, 3))]
    total = 0.0
    for part in parts:
        share = ask(model, **part, num_items_in_batch=items)
        share.backward()
        total += share.detach()
    assert abs(total - loss) <= 1e-5
    for name, parameter in model.named_parameters():
        assert (parameter.grad - expected[name]).abs().max() <= 1e-4 * (
            1 + expected[name].abs().max()
        ), name


def test_curricula_over_steps() -> None:
    exits = [1, 2, 3, 4, 5]
    turns = [ExitLoss(0.2, "rotational", 3, step=step).enabled(exits) for step in range(4)]
    assert turns == [[1, 4], [2, 5], [3], [1, 4]]
    assert [ExitLoss(0.2, "rotational", 9, step=step).enabled([2, 3]) for step in (0, 1)] == [
        [2],
        [3],
    ]
    grown = [ExitLoss(0.2, "gradual", step=step, steps=20).enabled(exits) for step in (0, 2, 8, 19)]
    assert grown == [[5], [4, 5], [1, 2, 3, 4, 5], [1, 2, 3, 4, 5]]
    assert ExitLoss(0.2, "none", 2).enabled(exits) == [1, 3, 5]


def test_only_heads_learn_and_they_learn() -> None:
    """The decoder frozen, each trained exit head gets a gradient, and its exit gets better."""
    model = attach(HOST.build(layers=6), EarlyExit(heads=True, first=2, every=2)).train()
    heads = {i: g for i, g in enumerate(gates_of(attached(model)[1])) if g is not None}
    assert list(heads) == [2, 4]
    assert exits_of(attached(model)[1]) == [1, 3]
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".depth." in name)
    learner = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    inputs, ask = _labelled(HOST), ExitLoss(0.5)
    before = _read_early(model, inputs, heads)
    losses = []
    for _ in range(12):
        loss = ask(model, **inputs)
        loss.backward()
        for head in heads.values():
            assert head.weight.grad.isfinite().all()
            assert head.weight.grad.abs().max() > 1e-9
        learner.step()
        learner.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.05
    after = _read_early(model, inputs, heads)
    assert all(a < b - 0.1 for a, b in zip(after, before, strict=True))


def _read_early(model: PreTrainedModel, inputs: Inputs, heads: dict[int, nn.Module]) -> list[float]:
    with torch.no_grad():
        states = model(**inputs, output_hidden_states=True).hidden_states
        losses = []
        for layer, head in heads.items():
            logits = Readout(model)(head(states[layer]))[:, :-1].flatten(0, 1)
            labels = inputs["labels"][:, 1:].flatten()
            losses.append(nn.functional.cross_entropy(logits, labels).item())
    return losses


def test_checkpointed_activations_change_nothing() -> None:
    """With layer dropout too: LayerSkip's recipe, whose draws come out the same again."""
    inputs, results = _labelled(HOST), []
    for checkpointed in (False, True):
        model = attach(HOST.build(layers=5), LayerDropout(0.5)).train()
        if checkpointed:
            checkpoint_activations(model)
        torch.manual_seed(3)
        loss = ExitLoss(0.3)(model, **inputs)
        loss.backward()
        results.append((loss.detach(), {n: p.grad for n, p in model.named_parameters()}))
    (loss, grads), (again, others) = results
    assert abs(loss - again) <= 1e-6
    for name, gradient in grads.items():
        assert (others[name] - gradient).abs().max() <= 1e-5 * (1 + gradient.abs().max()), name


def test_exits_that_are_not_there() -> None:
    with pytest.raises(UsageError, match="stack of 2 layers"):
        exits_of(attached(attach(HOST.build(layers=2), "all"))[1])
    shallow = attach(HOST.build(), EarlyExit(heads=True, first=1, every=9))
    with pytest.raises(UsageError, match="has none there"):
        exits_of(attached(shallow)[1])


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("exit_loss=-0.1", "0 to 1"),
        ("exit_loss=2", "0 to 1"),
        ("exit_curriculum=rotating", "Did you mean 'rotational'"),
        ("exit_every=0", "give 1 to"),
        ("exit_curriculum=gradual", "give 0.2"),
    ],
)
def test_settings_that_cannot_be(setting: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        resolve("any-llm", [f"stages.{_stage()}.{setting}"])
    with pytest.raises(UsageError, match="cells teach the vision tower"):
        resolve("demo", ["stages.vision.exit_loss=0.2"])


def _stage() -> str:
    return next(iter(resolve("any-llm").stages))


def test_a_stage_teaches_exit_heads(tmp_path: Path) -> None:
    """A recipe with `train: [mixers]`, accumulation and turns: only the heads move."""
    host = llm(tmp_path / "host", num_hidden_layers=4)
    recipe = tmp_path / "exits.yaml"
    recipe.write_text(
        f"host: {host}\n"
        "policy: {policy: early_exit, heads: true, first: 2}\n"
        "stages:\n  heads:\n    train: [mixers]\n"
        f"    data: {chats(tmp_path / 'chats', pictures=False)}\n"
        "    steps: 4\n    batch: 4\n    accumulate: 2\n    mixer_learning_rate: 0.01\n"
        "    exit_loss: 0.5\n    exit_curriculum: rotational\n    exit_every: 2\n",
        encoding="utf-8",
    )
    results = run(resolve(recipe), tmp_path / "out")
    assert "gates" not in results["losses"]["heads"]
    model, _ = load_model(str(tmp_path / "out"))
    bare = AutoModelForCausalLM.from_pretrained(host)
    moved = {
        name
        for name, parameter in model.named_parameters()
        if ".depth." in name and parameter.any()
    }
    assert moved == {f"model.layers.{i}.depth.{part}" for i in (2, 3) for part in _PARTS}
    own = dict(model.named_parameters())
    assert all(torch.equal(own[name], parameter) for name, parameter in bare.named_parameters())


_PARTS = ("weight", "bias")
