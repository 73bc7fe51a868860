"""What is watched while a stage trains: gates, speed, and the clock."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback

from trol.depth import attached
from trol.depth.host import gates_of
from trol.training import processes

GATE = "gate/"
"""What the logged names of gates begin with; the layer's number follows."""


class GateMeans:
    """The mean of each layer's gate over the tokens of one step, looked at only when asked.

    Of gates that are told their scope (a controller's), over the tokens in it.
    """

    def __init__(self, model: nn.Module) -> None:
        stack = attached(model)[1]
        # Exit heads translate states: they have no mean that would say anything.
        self._gates = [] if stack.depth_policy.translates else gates_of(stack)
        self._means: dict[int, list[Tensor]] = {}
        self._handles: dict[int, RemovableHandle] = {}

    def watch(self) -> None:
        """Looks at all gates until `take`."""
        self._means.clear()
        for layer, gate in enumerate(self._gates):
            if gate is not None and layer not in self._handles:
                self._handles[layer] = gate.register_forward_hook(self._hook(layer))

    def take(self) -> dict[str, float]:
        """`{"gate/0": mean, ...}` since `watch`; nothing of gates that nobody asked."""
        for handle in self._handles.values():
            handle.remove()
        self._handles.clear()
        if not self._means:
            return {}
        means = torch.stack([torch.stack(seen).mean() for seen in self._means.values()])
        named = zip(sorted(self._means), means.tolist(), strict=True)
        self._means = {}
        return {f"{GATE}{layer}": mean for layer, mean in named}

    def _hook(self, layer: int) -> Any:
        def look(_: nn.Module, given: tuple[Tensor, ...], answer: Tensor) -> None:
            looked_at = answer[given[1]] if len(given) > 1 else answer
            if looked_at.numel():
                self._means.setdefault(layer, []).append(looked_at.detach().float().mean())

        return look


class Speed:
    """Tokens per second, padding included."""

    def __init__(self) -> None:
        self._tokens, self._since = 0, time.perf_counter()

    def count(self, tokens: int) -> None:
        """Notes that a step had so many tokens."""
        self._tokens += tokens

    def since_last(self) -> dict[str, float]:
        """The rate since the last call; nothing where nothing was counted."""
        now = time.perf_counter()
        tokens, spent = self._tokens, now - self._since
        self._tokens, self._since = 0, now
        return {"tokens_per_second": tokens / spent} if tokens else {}


class Rhythm(TrainerCallback):
    """When a stage is saved, and when the time is over.

    Args:
        save_every: steps between checkpoints; 0 for none.
        deadline: when to save and stop, on the clock of `time.monotonic`; None for never.
    """

    def __init__(self, save_every: int, deadline: float | None) -> None:
        self.save_every, self.deadline = save_every, deadline

    def on_step_end(self, _: Any, state: Any, control: Any, **__: Any) -> None:
        """Asks for a checkpoint, or for the end; the last step's state is the stage's result."""
        if state.global_step >= state.max_steps:
            return
        if self.save_every and state.global_step % self.save_every == 0:
            control.should_save = True
        if self.deadline is not None and processes.any_of(time.monotonic() > self.deadline):
            control.should_save = control.should_training_stop = True
