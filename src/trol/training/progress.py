"""Progress of a stage: a bar on a terminal, a line every few seconds elsewhere."""

from __future__ import annotations

import sys
import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from transformers import TrainerCallback

SECONDS_BETWEEN_LINES = 10.0


class Progress(TrainerCallback):
    """Shows loss, learning rate and time left of one stage on stderr."""

    def __init__(self, name: str, steps: int) -> None:
        self.name, self.steps = name, steps
        self.loss = float("nan")
        self._bars: Bars | None = None
        self._said = 0.0

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Opens the bar."""
        self._began = time.perf_counter()
        if sys.stderr.isatty():
            self._bars = Bars(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("loss {task.fields[loss]:.3f}"),
                console=Console(stderr=True),
            )
            self._bars.start()
            self._task = self._bars.add_task(self.name, total=self.steps, loss=self.loss)

    def on_log(self, *_: Any, logs: dict[str, float] | None = None, **__: Any) -> None:
        """Takes over the newest loss."""
        self.loss = (logs or {}).get("loss", self.loss)

    def on_step_end(self, _: Any, state: Any, *__: Any, **___: Any) -> None:
        """Moves the bar, or prints a line when the last one is old."""
        if self._bars is not None:
            self._bars.update(self._task, completed=state.global_step, loss=self.loss)
        elif time.perf_counter() - self._said > SECONDS_BETWEEN_LINES:
            self._say(state.global_step)

    def on_train_end(self, _: Any, state: Any, *__: Any, **___: Any) -> None:
        """Closes the bar."""
        if self._bars is not None:
            self._bars.stop()
        else:
            self._say(state.global_step)

    def _say(self, step: int) -> None:
        self._said = time.perf_counter()
        spent = self._said - self._began
        left = spent * (self.steps - step) / max(step, 1)
        line = f"{self.name}: step {step}/{self.steps}, loss {self.loss:.3f}, {left:.0f} s left"
        print(line, file=sys.stderr, flush=True)
