"""Reads a whole mixture once, in parallel, and reports the rows that cannot be trained on."""

import multiprocessing
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from typing import Any

from trol.data.formats import KINDS, RowError, row_errors
from trol.data.mixture import Damaged, Mixture, Part
from trol.errors import DataError, UsageError

ROWS_AT_ONCE = 256
"""Rows of one task."""

Task = tuple[int, int, int]
"""Source, first place, and the place behind the last."""


@dataclass(frozen=True)
class SourceReport:
    """Counts of one source."""

    source: str
    rows: int
    """Rows that the source's filter lets through."""
    images: int
    """Pictures that they refer to."""
    expected: int | None
    """Sound rows according to the mixture file."""
    damaged: dict[str, int] = field(default_factory=dict)
    """Kind of damage -> rows, for kinds that occur."""

    @property
    def sound(self) -> int:
        """Rows that can be trained on."""
        return self.rows - sum(self.damaged.values())

    @property
    def counted(self) -> bool:
        """Whether there are as many sound rows as there should be."""
        return self.expected in (None, self.sound)


@dataclass(frozen=True)
class Report:
    """Result of a check."""

    sources: tuple[SourceReport, ...]
    damaged: tuple[Damaged, ...]
    """Every damaged row, by source and row."""


def check(
    mixture: Mixture,
    *,
    processor: Any = None,
    most_tokens: int | None = None,
    workers: int = 1,
    progress: Callable[[int], None] = lambda _: None,
) -> Report:
    """Reads every row and every picture of the mixture's sources, quarantined ones as well.

    Args:
        mixture: an opened mixture.
        processor: also encodes every row, and so finds rows that only it refuses.
        most_tokens: positions that the model has; longer rows are damaged. Needs a processor.
        workers: processes that read.
        progress: called with the number of rows that each task has read.

    Raises:
        UsageError: `most_tokens` without a processor, or no worker.
        DataError: a process died, or the processor has no chat template.
    """
    if most_tokens is not None and processor is None:
        raise UsageError("rows have no length in tokens without a processor; name one as well.")
    if workers < 1:
        raise UsageError(f"workers is {workers}; give 1 or more.")
    collate = None
    if processor is not None:
        from trol.data.conversations import ConversationCollator  # noqa: PLC0415 - torch

        collate = ConversationCollator(processor, most_tokens=most_tokens)
    damaged: list[Damaged] = []
    for (_, first, end), rows in _results(_Reader(mixture, collate), workers):
        damaged += rows
        progress(end - first)
    kinds = Counter((one.source, one.reason) for one in damaged)
    return Report(tuple(_summed(part, kinds) for part in mixture.parts), tuple(damaged))


def _summed(part: Part, kinds: Counter[tuple[str, str]]) -> SourceReport:
    name = part.source.name
    return SourceReport(
        source=name,
        rows=len(part.index),
        images=int(part.index["images"].sum()),
        expected=part.source.count,
        damaged={kind: kinds[name, kind] for kind in KINDS if kinds[name, kind]},
    )


@dataclass(frozen=True)
class _Reader:
    """Does the tasks of a process."""

    mixture: Mixture
    collate: Callable[..., Any] | None

    def read(self, task: Task) -> list[Damaged]:
        number, first, end = task
        part, damaged = self.mixture.parts[number], []
        for place in range(first, end):
            try:
                with row_errors():
                    messages = part.messages(place)
                    if self.collate is not None:
                        self.collate([messages])
            except RowError as error:
                row = int(part.index["row"][place])
                damaged.append(Damaged(part.source.name, row, error.kind, str(error)))
        return damaged


def _results(reader: _Reader, workers: int) -> Iterator[tuple[Task, list[Damaged]]]:
    """Each task with its damaged rows, in order, so that any number of workers reports the same."""
    tasks = list(_tasks(reader.mixture))
    if workers == 1 or len(tasks) < 2:
        yield from ((task, reader.read(task)) for task in tasks)
        return
    # Not forked: a child of a process with torch's threads can hang.
    spawning = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(
        min(workers, len(tasks)), spawning, initializer=_begin, initargs=(reader,)
    ) as pool:
        try:
            yield from zip(tasks, pool.map(_read, tasks), strict=True)
        except BrokenProcessPool as died:
            raise DataError(
                "a reading process died, most likely for lack of memory; use fewer workers."
            ) from died
        finally:
            pool.shutdown(cancel_futures=True)


def _tasks(mixture: Mixture) -> Iterator[Task]:
    for number, part in enumerate(mixture.parts):
        for first in range(0, len(part.index), ROWS_AT_ONCE):
            yield number, first, min(first + ROWS_AT_ONCE, len(part.index))


_reader: list[_Reader] = []
"""This process's reader, if it is a worker."""


def _begin(reader: _Reader) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that started this one
    _reader[:] = [reader]


def _read(task: Task) -> list[Damaged]:
    return _reader[0].read(task)
