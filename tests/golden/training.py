"""Checks training: the loss, every gradient, and three plain steps of gate and projector."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .forward import images
from .names import GATE, reader
from .report import Report
from .sets import Case, GoldenSet

INPUTS_OF_TRAINING = "image_batch_pad"
"""The case whose inputs the format trains on, where it names no inputs of its own."""

LEARNING_RATE, STEPS = 0.05, 3


def check_training(model: Any, golden: GoldenSet, name: str, report: Report) -> None:
    """One batch in training mode, with gradient checkpointing, all tokens traversed."""
    own = f"{name}.input_ids" in golden.inputs
    case = golden.case(name if own else INPUTS_OF_TRAINING)
    labels = golden.inputs[f"{name}.labels"].clone()
    labels[case.mask == 0] = -100
    with training(model):
        _check_gradients(model, golden, case, labels, report, name)
        _check_steps(model, golden, case, labels, report, name)


@contextmanager
def training(model: Any) -> Iterator[None]:
    """Puts a model in training mode for a while, with checkpointing and without dropout."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    _checkpointing(model, "enable")
    try:
        yield
    finally:
        _checkpointing(model, "disable")
        model.zero_grad(set_to_none=True)
        model.eval()


def _checkpointing(model: Any, verb: str) -> None:
    old = getattr(model, f"gradient_checkpointing_{verb}")  # its name before transformers 5.23
    getattr(model, f"activation_checkpointing_{verb}", old)()


def loss_of(model: Any, case: Case, labels: Tensor) -> Tensor:
    """The mean loss over the labels."""
    out = model(
        input_ids=case.ids,
        attention_mask=case.mask,
        labels=labels,
        use_cache=False,
        **images(model, case),
    )
    return out.loss


def _check_gradients(
    model: Any, golden: GoldenSet, case: Case, labels: Tensor, report: Report, name: str
) -> None:
    model.zero_grad(set_to_none=True)
    loss = loss_of(model, case, labels)
    loss.backward()
    if f"{name}.loss" in golden.expected:
        report.close(f"{name}.loss", loss.detach()[None], golden.expected[f"{name}.loss"])
    if f"{name}.loss" in golden.facts:
        fact = torch.tensor(golden.facts[f"{name}.loss"])
        report.close(f"{name}.loss", loss.detach(), fact, note="ok (json)")
    gradient = reader(model, lambda parameter: parameter.grad)
    for full in sorted(golden.expected):
        if full.startswith(f"{name}.grad."):
            _compare(report, full, gradient(full.removeprefix(f"{name}.grad.")), golden)
    _check_norms(golden, gradient, report, name)


def _compare(report: Report, full: str, got: Tensor | None, golden: GoldenSet) -> None:
    if got is None:
        return report.add(full, None, "no such gradient", passed=False)
    report.close(full, got.detach(), golden.expected[full])


def _check_norms(golden: GoldenSet, gradient: Any, report: Report, name: str) -> None:
    norms = golden.facts.get(f"{name}.grad_norm_by_param", {})
    got = {one: gradient(one) for one in norms}
    there = {one: float(value.double().norm()) for one, value in got.items() if value is not None}
    if norms:
        names = [one for one in norms if one in there]
        pair = [torch.tensor([of[one] for one in names]) for of in (there, norms)]
        report.exact(f"{name}.grad_norm_by_param (names)", names, list(norms))
        report.close(f"{name}.grad_norm_by_param", pair[0], pair[1])
    if f"{name}.params_with_grad" in golden.facts:
        report.exact(
            f"{name}.params_with_grad", len(there), golden.facts[f"{name}.params_with_grad"]
        )
    if f"{name}.grad_global_norm" in golden.facts:
        whole = torch.tensor(list(there.values()), dtype=torch.float64).norm()
        fact = torch.tensor(golden.facts[f"{name}.grad_global_norm"], dtype=torch.float64)
        report.close(f"{name}.grad_global_norm", whole, fact)


def _check_steps(
    model: Any, golden: GoldenSet, case: Case, labels: Tensor, report: Report, name: str
) -> None:
    """The losses before each of the steps, and the gates after the last."""
    before = {key: value.clone() for key, value in model.state_dict().items()}
    moved = [p for n, p in model.named_parameters() if ".depth." in n or ".projector." in n]
    optimiser = torch.optim.SGD(moved, lr=LEARNING_RATE)
    losses = []
    for _ in range(STEPS):
        model.zero_grad(set_to_none=True)
        loss = loss_of(model, case, labels)
        loss.backward()
        optimiser.step()
        losses.append(loss.detach())
    key = f"{name}.sgd{STEPS}"
    if f"{key}_losses" in golden.expected:
        report.close(f"{key}_losses", torch.stack(losses), golden.expected[f"{key}_losses"])
    value = reader(model, lambda parameter: parameter.data)
    for full in sorted(golden.expected):
        after = full.removeprefix(f"{key}_after.")
        if after != full and (GATE.match(after) or after.startswith("vision_proj.")):
            _compare(report, full, value(after), golden)
    model.load_state_dict(before)
