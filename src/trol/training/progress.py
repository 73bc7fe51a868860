"""Progress of whatever takes long: a bar on a terminal, a line every few seconds elsewhere."""

import sys
import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from transformers import TrainerCallback

GATE = "gate/"
"""Prefix of the logged names of gates, before the layer's number."""


SECONDS_BETWEEN_LINES = 10.0

HEIGHTS = "▁▂▃▄▅▆▇█"
"""A gate's mean as a character, 0 to 1."""

AS_NUMBERS = 8
"""Layers, at most, whose gates are shown as numbers."""


class Shown:
    """Progress of one task on stderr: `shown(done, of)` moves a bar, or prints a line at times.

    Args:
        name: what is being done.
        unit: what is counted, such as `step`.
    """

    def __init__(self, name: str, unit: str = "") -> None:
        self.name, self.unit = name, unit
        self.figures = ""
        """Text shown behind the bar."""
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
        """Shows that `done` of `of` are done; `name` replaces the task's name."""
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
        """Prints the progress as a line."""
        self._said = time.perf_counter()
        fresh = self._done - (self._from or 0)
        count = " ".join(filter(None, (self.unit, f"{self._done}/{self._of}")))
        parts = [f"{self.name}: {count}", self.figures]
        if fresh > 0:
            left = (self._said - self._began) * (self._of - self._done) / fresh
            parts.append(f"{left:.0f} s left")
        print(", ".join(filter(None, parts)), file=sys.stderr, flush=True)

    def close(self, *, last: bool = False) -> None:
        """Gives the terminal back, after an error too; `last`: with what it showed last."""
        if self._bars is not None:
            self._bars.live.transient = not last
            self._bars.stop()
        elif last:
            self.say()


class Progress(Shown, TrainerCallback):
    """Shows loss, learning rate, tokens per second, gates and time left of a stage on stderr."""

    def __init__(self, name: str) -> None:
        super().__init__(name, "step")

    def on_train_begin(self, _: Any, state: Any, *__: Any, **___: Any) -> None:
        """Shows where a stage begins, or goes on."""
        self(state.global_step, state.max_steps)

    def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
        """Takes over the newest figures."""
        if "loss" in logs:
            self.figures = _figures(logs)

    def on_step_end(self, _: Any, state: Any, *__: Any, **___: Any) -> None:
        """Moves the bar, or prints a line when the last one is old."""
        self(state.global_step, state.max_steps)

    def on_train_end(self, *_: Any, **__: Any) -> None:
        """Closes the bar with what it shows, or prints the last line."""
        self.close(last=True)


def _figures(logs: dict[str, float]) -> str:
    """`loss 1.234, lr 1.0e-03, 5200 tokens/s, gates 0.48 0.51`."""
    parts = [f"loss {logs['loss']:.3f}", f"lr {logs['learning_rate']:.1e}"]
    if "tokens_per_second" in logs:
        parts.append(f"{logs['tokens_per_second']:.0f} tokens/s")
    gates = [value for key, value in logs.items() if key.startswith(GATE)]
    if len(gates) > AS_NUMBERS:
        tops = [min(int(gate * len(HEIGHTS)), len(HEIGHTS) - 1) for gate in gates]
        parts.append("gates " + "".join(HEIGHTS[top] for top in tops))
    elif gates:
        parts.append("gates " + " ".join(f"{gate:.2f}" for gate in gates))
    return ", ".join(parts)
