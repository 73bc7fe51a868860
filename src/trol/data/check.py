"""Reading a whole mixture once, in parallel, to learn which rows cannot be trained on."""

from __future__ import annotations

import multiprocessing
import signal
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from typing import Any

from trol.data.formats import KINDS, RowError, row_errors
from trol.data.mixture import Mixture, Part
from trol.data.mixture_file import Damaged
from trol.errors import DataError, UsageError

ROWS_AT_ONCE = 256
"""Rows of one task."""

Task = tuple[int, int, int]
"""Source, first place, and the place behind the last."""


@dataclass(frozen=True)
class SourceReport:
    """What was found in one source."""

    source: str
    rows: int
    """Rows that were read: all that the source's filter lets through."""
    images: int
    """Pictures that they refer to."""
    expected: int | None
    """Sound rows that the mixture file says there are."""
    damaged: dict[str, int] = field(default_factory=dict)
    """Kind of damage -> rows; kinds that did not occur are left out."""

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
    """What a check has found."""

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
        processor: also encodes every row, which finds what only it can refuse.
        most_tokens: positions that the model has; longer rows are damaged. Needs a processor.
        workers: processes that read.
        progress: is told how many more rows have been read.

    Raises:
        UsageError: `most_tokens` without a processor, or no worker.
        DataError: a process died, or the processor has no chat template.
    """
    if most_tokens is not None and processor is None:
        raise UsageError("rows have no length in tokens without a processor; name one as well.")
    if workers < 1:
        raise UsageError(f"workers is {workers}; give 1 or more.")
    if processor is not None:
        from trol.data.answers import Answers  # noqa: PLC0415 - torch

        Answers(processor)  # without a chat template no row is to blame
    damaged: list[Damaged] = []
    for task, found in _results(mixture, (processor, most_tokens), workers):
        damaged += found
        progress(task[2] - task[1])
    kinds = Counter((one.source, one.reason) for one in damaged)
    return Report(tuple(_summed(part, kinds) for part in mixture.parts), tuple(damaged))


def _summed(part: Part, kinds: Counter[tuple[str, str]]) -> SourceReport:
    name = part.source.name
    return SourceReport(
        source=name,
        rows=len(part.index),
        images=int(part.index.images.sum()),
        expected=part.source.count,
        damaged={kind: kinds[name, kind] for kind in KINDS if kinds[name, kind]},
    )


def _results(
    mixture: Mixture, encoding: tuple[Any, int | None], workers: int
) -> Iterator[tuple[Task, list[Damaged]]]:
    """Each task with what it found, in order, so that any number of workers reports the same."""
    tasks = list(_tasks(mixture))
    if workers == 1 or len(tasks) < 2:
        reader = _Reader(mixture, *encoding)
        yield from ((task, reader.read(task)) for task in tasks)
        return
    # Not forked: a child of a process with torch's threads can hang.
    fresh = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(
        min(workers, len(tasks)), fresh, initializer=_begin, initargs=(mixture, *encoding)
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


@dataclass(frozen=True)
class _Reader:
    """What a process needs to do tasks."""

    mixture: Mixture
    processor: Any
    most_tokens: int | None

    def read(self, task: Task) -> list[Damaged]:
        number, first, behind = task
        part, found = self.mixture.parts[number], []
        for place in range(first, behind):
            try:
                with row_errors():
                    messages = part.messages(place)
                    if self.processor is not None:
                        self._encode(messages)
            except RowError as damage:
                row = part.row_number(place)
                found.append(Damaged(part.source.name, row, damage.kind, str(damage)))
        return found

    def _encode(self, messages: Sequence[dict[str, Any]]) -> None:
        from trol.data.chat import encode  # noqa: PLC0415 - torch, which reading alone does without

        encode(self.processor, messages, most_tokens=self.most_tokens)


_reader: list[_Reader] = []
"""This process's reader, if it is a worker."""


def _begin(mixture: Mixture, processor: Any, most_tokens: int | None) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that started this one
    _reader[:] = [_Reader(mixture, processor, most_tokens)]


def _read(task: Task) -> list[Damaged]:
    return _reader[0].read(task)
