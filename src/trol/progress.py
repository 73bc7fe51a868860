"""Progress of whatever takes long: a bar on a terminal, a line every few seconds elsewhere."""

import sys
import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

SECONDS_BETWEEN_LINES = 10.0
"""Lines are what is shown where there is no terminal."""


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
