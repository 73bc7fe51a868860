"""Progress of a verb on stderr: a bar on a terminal, a line from time to time elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager

from trol.cli import terminal

SECONDS_BETWEEN_LINES = 10.0

Progress = Callable[[str, float, int], None]
"""(what is being done, how much of it is done, how much there is to do)."""


@contextmanager
def shown() -> Generator[Progress]:
    """While open, progress that its function is told of is shown."""
    if not sys.stderr.isatty():
        yield _Lines()
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Bars(*columns, console=Console(stderr=True), transient=True) as bars:
        bar = bars.add_task("")
        yield lambda what, done, of: bars.update(
            bar, description=what, completed=int(done), total=of
        )


class _Lines:
    """Says how far it has come where the last line is old."""

    def __init__(self) -> None:
        self.what, self.began = "", time.perf_counter()
        self.said = self.began

    def __call__(self, what: str, done: float, of: int) -> None:
        now = time.perf_counter()
        if what != self.what:
            self.what, self.began = what, now
        if now - self.said > SECONDS_BETWEEN_LINES:
            self.said = now
            left = f", {(now - self.began) * (of - done) / done:.0f} s left" if done else ""
            terminal.note(f"{what}: {int(done)} of {of}{left}")
