"""What the laws are tried on: policies with settled random gates, attached to hosts of the zoo."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel

from hosts import HOSTS, Host
from hosts.host import Inputs
from trol.depth import AbstractPolicy, attach, attached
from trol.depth.attachment import gates_of
from trol.depth.policy import Plain
from trol.host.layers import layer_list
from trol.policies.controller import Controller
from trol.policies.exits import EarlyExit
from trol.policies.mixer import TrolMixer
from trol.policies.planned import Planned
from trol.policies.random_tokens import RandomTokens
from trol.policies.router import Router

SURE = (0.3, 0.004, 0.1)
"""Margins of three looks, at which tokens of every host leave at different depths: hosts whose
head is their embedding have small ones."""

POLICIES: dict[str, Callable[[], AbstractPolicy]] = {
    "plain": Plain,
    "trol": TrolMixer,
    "trol_all": lambda: TrolMixer(scope="all"),
    "trol_three": lambda: TrolMixer(3, scope="all", sharing="shared"),
    "trol_answer": lambda: TrolMixer(scope="answer"),
    "trol_tau": lambda: TrolMixer(scope="all", tau=0.5),
    "skip": lambda: Planned("0 2-3"),
    "skip_first": lambda: Planned("1-3"),
    "exit": lambda: Planned("exit@2"),
    "repeat": lambda: Planned("0:2 1 3:3"),
    "skip_answer": lambda: Planned("1 3:2", scope="answer"),
    "skip_question": lambda: Planned("0:2 3", scope="question"),
    "skip_kept": lambda: Planned("0:2 2-3", keep_first=2),
    "exit_sure": lambda: EarlyExit("margin", SURE, scope="all"),
    "exit_heads": lambda: EarlyExit("margin", SURE, heads=True),
    "controller": Controller,
    "router": lambda: Router(["0 3", "0 2-3", "all"], hidden=8),
    "some_twice": lambda: RandomTokens(0.5),
    "some_skip": lambda: RandomTokens(0.5, visit=1),
}
"""Every kind of policy, every scope; on stacks of four layers."""

HOLED: dict[str, Callable[[], AbstractPolicy]] = {
    "hole_answer": lambda: Planned("1-3", scope="answer", skipped_kv="hole"),
    "hole_question": lambda: Planned("0 2", scope="question", skipped_kv="hole"),
    "hole_kept": lambda: Planned("0 2", skipped_kv="hole", keep_first=1),
    "hole_exit": lambda: EarlyExit("patience", 1, scope="all", skipped_kv="hole"),
    "hole_some": lambda: RandomTokens(0.5, visit=1, skipped_kv="hole"),
}
"""Policies that leave holes; not every family can have them."""


KEY = ("trol", "trol_all", "skip_first", "skip_answer", "hole_answer")
"""One policy of each kind: laws that hang on the family are tried on every host with these."""

NO_HOLES = tuple(host.name for host in HOSTS.values() if host.hybrid or host.name == "bloom")
"""Hosts on which `skipped_kv="hole"` is refused."""


def made(name: str) -> AbstractPolicy:
    """The policy of this name, new."""
    return {**POLICIES, **HOLED}[name]()


def attach_settled(
    model: PreTrainedModel, policy: AbstractPolicy, seed: int = 0
) -> PreTrainedModel:
    """Attaches, and gives the gates weights that spread their values over (0, 1)."""
    attach(model, policy)
    source = torch.Generator().manual_seed(seed)
    for gate in gates_of(attached(model)[1]):
        if gate is not None:
            for parameter in gate.parameters():
                scale = 0.15 if parameter.ndim > 1 else 0.5
                parameter.data.copy_(scale * torch.randn(parameter.shape, generator=source))
    return model


def hosts_and_attns() -> list[object]:
    """One pytest parameter for each family and attention."""
    return [
        pytest.param(host, attn, id=f"{host.name}-{attn}")
        for host in HOSTS.values()
        for attn in host.attns
    ]


def key_cases(*, every_attn: bool = True) -> list[object]:
    """(host, attention, policy's name) for every host and the key policies.

    `every_attn=False`: for laws that do not hang on it, only the last that the host supports.
    """
    return [
        pytest.param(host, attn, name, id=f"{host.name}-{attn}-{name}")
        for host in HOSTS.values()
        for attn in (host.attns if every_attn else host.attns[-1:])
        for name in KEY
        if not (name in HOLED and host.name in NO_HOLES)
    ]


def policy_cases(*hosts: str) -> list[object]:
    """(host, policy's name) for a few hosts and every policy that they can have."""
    return [
        pytest.param(HOSTS[host], name, id=f"{host}-{name}")
        for host in hosts
        for name in (*POLICIES, *HOLED)
        if not (name in HOLED and host in NO_HOLES)
    ]


def some_hosts(*names: str) -> list[object]:
    """A few families, for laws that do not depend on the family."""
    return [pytest.param(HOSTS[name], id=name) for name in names]


def answer_masks(prompt: Inputs, whole: Inputs) -> Tensor:
    """1 at the tokens that follow the prompt. Shape: [B, T]."""
    masks = torch.zeros_like(whole["input_ids"])
    masks[:, prompt["input_ids"].shape[1] :] = 1
    return masks


def recomputed(
    host: Host, model: PreTrainedModel, inputs: Inputs, new: int = 3
) -> tuple[Tensor, Tensor]:
    """Greedy tokens [B, new] and logits [B, new, V] from whole forwards without a cache."""
    tokens, steps = inputs["input_ids"][:, :0], []
    for _ in range(new):
        whole = host.extend(inputs, tokens)
        out = model(**whole, assistant_masks=answer_masks(inputs, whole), use_cache=False)
        steps.append(out.logits[:, -1])
        tokens = torch.cat([tokens, steps[-1].argmax(-1, keepdim=True)], 1)
    return tokens, torch.stack(steps, 1)


def gap(a: Tensor, b: Tensor) -> float:
    """The largest absolute difference."""
    return (a - b).abs().max().item()


def cuts(length: int, size: int) -> Iterator[slice]:
    """Slices of `size` columns that cover `length` columns."""
    for start in range(0, length, size):
        yield slice(start, min(start + size, length))


def layers_of(model: PreTrainedModel) -> torch.nn.ModuleList:
    """The decoder layers of a host, attached or bare."""
    layers = layer_list(model.get_decoder())
    assert layers is not None
    return layers


PARTS = ("mlp", "fc1", "feed_forward")
"""What the zoo's layers call their MLP or experts, or the first map of it."""


@contextmanager
def entered(model: PreTrainedModel) -> Iterator[list[int]]:
    """Counts the tokens that enter the MLP, or the experts, of each layer."""
    layers = layers_of(model)
    counts, hooks = [0] * len(layers), []
    for index, layer in enumerate(layers):

        def count(_module: object, args: tuple[Tensor, ...], index: int = index) -> None:
            counts[index] += args[0].numel() // args[0].shape[-1]

        mlp = next(part for name in PARTS if (part := getattr(layer, name, None)) is not None)
        hooks.append(mlp.register_forward_pre_hook(count))
    try:
        yield counts
    finally:
        for hook in hooks:
            hook.remove()


def gates_as_tensors(model: PreTrainedModel) -> list[tuple[Tensor, ...] | None]:
    """Parameters of each layer's module, a gate's as [D] and [1]; None where it has none."""
    return [
        None
        if gate is None
        else tuple(
            p.detach().clone().squeeze(0) if p.ndim > 1 else p.detach().clone()
            for p in gate.parameters()
        )
        for gate in gates_of(attached(model)[1])
    ]


class Spoken(LogitsProcessor):
    """Notes the logits of every step: `generate` then has no reason to hand out its cache."""

    def __init__(self) -> None:
        self.steps: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.steps.append(scores.clone())
        return scores


def spoken(model: PreTrainedModel, inputs: Inputs, **settings) -> tuple[Tensor, Tensor]:
    """Greedy new tokens [B, N] and logits [B, N, V] of a `generate` that keeps its cache."""
    notes = Spoken()
    settings = {"max_new_tokens": 3, "do_sample": False} | settings
    out = model.generate(**inputs, **settings, logits_processor=LogitsProcessorList([notes]))
    return out[:, inputs["input_ids"].shape[1] :], torch.stack(notes.steps, 1)


def assert_same(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor], exact: float) -> None:
    """The same tokens, and logits within `exact`."""
    assert a[0].tolist() == b[0].tolist()
    assert gap(a[1], b[1]) <= exact
