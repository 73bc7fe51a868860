"""Progress of whatever takes long: a bar on a terminal, a line every few seconds elsewhere.

What is watched while a stage trains: gates, speed, and the clock.
"""

from __future__ import annotations

import sys
import time
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback

from trol.depth import attached
from trol.depth.attachment import gates_of
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


SECONDS_BETWEEN_LINES = 10.0

HEIGHTS = "▁▂▃▄▅▆▇█"
"""A gate's mean as a character, 0 to 1."""

AS_NUMBERS = 8
"""Layers, at most, whose gates are shown as numbers."""


class Shown:
    """How far a thing is, on stderr: `shown(done, of)` moves a bar, or prints a line at times.

    Args:
        name: what is being done.
        unit: what is counted, such as `step`.
    """

    def __init__(self, name: str, unit: str = "") -> None:
        self.name, self.unit = name, unit
        self.figures = ""
        """What else is shown."""
        self._began = self._said = time.perf_counter()
        self._from: int | None = None
        self._done = self._of = 0
        self._bars: Bars | None = None
        if sys.stderr.isatty():
            self._bars = Bars(
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[figures]}"),
                console=Console(stderr=True),
            )
            self._bars.start()
            self._task = self._bars.add_task(name, total=None, figures="")

    def __call__(self, done: int, of: int, name: str | None = None) -> None:
        """Says that `done` of `of` are done; `name`: what is next, where that changes."""
        if self._from is None:  # a run that goes on has done some of them before
            self._from, self._began = done, time.perf_counter()
        self.name, self._done, self._of = name or self.name, done, of
        if self._bars is not None:
            self._bars.update(
                self._task, description=self.name, completed=done, total=of, figures=self.figures
            )
        elif time.perf_counter() - self._said > SECONDS_BETWEEN_LINES:
            self.say()

    def say(self) -> None:
        """Prints how far it is, as a line."""
        self._said = time.perf_counter()
        made = self._done - (self._from or 0)
        count = " ".join(filter(None, (self.unit, f"{self._done}/{self._of}")))
        parts = [f"{self.name}: {count}", self.figures]
        if made > 0:
            left = (self._said - self._began) * (self._of - self._done) / made
            parts.append(f"{left:.0f} s left")
        print(", ".join(filter(None, parts)), file=sys.stderr, flush=True)

    def close(self, *, last: bool = False) -> None:
        """Gives the terminal back, after an error too; `last`: with what it showed last."""
        if self._bars is not None:
            self._bars.live.transient = not last
            self._bars.stop()
        elif last:
            self.say()


class Progress(TrainerCallback):
    """Shows loss, learning rate, tokens per second, gates and time left of a stage on stderr."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._shown: Shown | None = None

    def on_train_begin(self, _: Any, state: Any, *__: Any, **___: Any) -> None:
        """Opens the bar."""
        self._shown = Shown(self.name, "step")
        self._shown(state.global_step, state.max_steps)

    def on_log(self, *_: Any, logs: dict[str, float] | None = None, **__: Any) -> None:
        """Takes over the newest figures."""
        if self._shown is not None and "loss" in (logs := logs or {}):
            self._shown.figures = _figures(logs)

    def on_step_end(self, _: Any, state: Any, *__: Any, **___: Any) -> None:
        """Moves the bar, or prints a line when the last one is old."""
        if self._shown is not None:
            self._shown(state.global_step, state.max_steps)

    def on_train_end(self, *_: Any, **__: Any) -> None:
        """Closes the bar, or prints the last line."""
        self.close(last=True)

    def close(self, *, last: bool = False) -> None:
        """Gives the terminal back, after an error too."""
        if self._shown is not None:
            self._shown.close(last=last)
            self._shown = None


def _figures(logs: dict[str, float]) -> str:
    """`loss 1.234, lr 1.0e-03, 5200 tokens/s, gates 0.48 0.51`."""
    parts = [f"loss {logs['loss']:.3f}", f"lr {logs['learning_rate']:.1e}"]
    if "tokens_per_second" in logs:
        parts.append(f"{logs['tokens_per_second']:.0f} tokens/s")
    if gates := [value for key, value in logs.items() if key.startswith(GATE)]:
        parts.append("gates " + _row(gates))
    return ", ".join(parts)


def _row(gates: list[float]) -> str:
    if len(gates) <= AS_NUMBERS:
        return " ".join(f"{gate:.2f}" for gate in gates)
    return "".join(HEIGHTS[min(int(gate * len(HEIGHTS)), len(HEIGHTS) - 1)] for gate in gates)
