"""Progress of a stage: a bar on a terminal, a line every few seconds elsewhere."""

from __future__ import annotations

import sys
import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from transformers import TrainerCallback

from trol.training.watching import GATE

SECONDS_BETWEEN_LINES = 10.0

HEIGHTS = "▁▂▃▄▅▆▇█"
"""A gate's mean as a character, 0 to 1."""

AS_NUMBERS = 8
"""Layers, at most, whose gates are shown as numbers."""


class Progress(TrainerCallback):
    """Shows loss, learning rate, tokens per second, gates and time left of a stage on stderr."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.shown = ""
        self._bars: Bars | None = None

    def on_train_begin(self, _: Any, state: Any, *__: Any, **___: Any) -> None:
        """Opens the bar."""
        self._began = self._said = time.perf_counter()
        self._from = state.global_step
        if sys.stderr.isatty():
            self._bars = Bars(
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[shown]}"),
                console=Console(stderr=True),
            )
            self._bars.start()
            self._task = self._bars.add_task(self.name, total=state.max_steps, shown="")

    def on_log(self, *_: Any, logs: dict[str, float] | None = None, **__: Any) -> None:
        """Takes over the newest figures."""
        logs = logs or {}
        if "loss" in logs:
            self.shown = _figures(logs)

    def on_step_end(self, _: Any, state: Any, *__: Any, **___: Any) -> None:
        """Moves the bar, or prints a line when the last one is old."""
        if self._bars is not None:
            self._bars.update(self._task, completed=state.global_step, shown=self.shown)
        elif time.perf_counter() - self._said > SECONDS_BETWEEN_LINES:
            self._say(state)

    def on_train_end(self, _: Any, state: Any, *__: Any, **___: Any) -> None:
        """Closes the bar, or prints the last line."""
        if self._bars is None:
            self._say(state)
        self.close()

    def close(self) -> None:
        """Gives the terminal back, after an error too."""
        if self._bars is not None:
            self._bars.stop()

    def _say(self, state: Any) -> None:
        self._said = time.perf_counter()
        step, steps = state.global_step, state.max_steps
        left = (self._said - self._began) * (steps - step) / max(step - self._from, 1)
        parts = [f"{self.name}: step {step}/{steps}", self.shown, f"{left:.0f} s left"]
        print(", ".join(filter(None, parts)), file=sys.stderr, flush=True)


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
