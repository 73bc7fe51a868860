"""Measurements on disk as soon as they are made: what ends a run costs the one it was at.

Lines of JSON are appended; a last line that a kill tore does not count. What they belong to is
told by a header, and only a run that agrees with all of it goes on with them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from trol.checkpoints.adapter import text_digest
from trol.errors import DataError, UsageError, unwritable
from trol.evaluation.tasks import Item


class Measurements:
    """What was measured, by name: each made once, and kept in a file if one is named.

    Args:
        path: the file; None to keep nothing after this process.
        header: what the measurements belong to, as JSON; it is the file's first line.

    Raises:
        UsageError: the file belongs to another run, or cannot be made.
        DataError: it is damaged.
    """

    def __init__(self, path: Path | None = None, header: Mapping[str, Any] | None = None) -> None:
        self.path = path
        self.found: dict[str, Any] = {}
        if path is None:
            return
        wanted = json.loads(json.dumps(header or {}))
        cut_torn_end(path)
        lines = _lines(path)
        if not lines:
            append_lines(path, [json.dumps(wanted)])
        elif told := differences(lines[0], wanted):
            raise UsageError(
                f"{path} keeps measurements of an unfinished run with other settings ({told}); "
                "give the same settings to go on with it, name another file with --out, or remove "
                "it."
            )
        for line in lines[1:]:
            self.found |= line

    def value(self, name: str, measure: Callable[[], Any]) -> Any:
        """What `measure()` gives, JSON values; it is called where nothing of that name is kept."""
        if name not in self.found:
            self.found[name] = measure()
            if self.path is not None:
                append_lines(self.path, [json.dumps({name: self.found[name]})])
        return self.found[name]

    def finish(self) -> None:
        """Removes the file: what it was for is done."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)


def items_digest(items: Sequence[Item]) -> str:
    """What a set of questions with references is known by."""
    return text_digest("\n".join(repr((i.question, i.answer, i.type)) for i in items))


def _lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a file, none where there is no file."""
    try:
        found = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        if all(isinstance(line, dict) for line in found):
            return found
    except FileNotFoundError:
        return []
    except (OSError, ValueError):
        pass
    raise DataError(f"{path} is no file of measurements; remove it, and they are made anew.")


def append_lines(path: Path, lines: Iterable[str]) -> None:
    """Puts lines behind those of a file, on the disk before this returns."""
    data = "".join(line + "\n" for line in lines).encode()
    try:
        with path.open("ab") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise unwritable(path.parent, error) from error


def cut_torn_end(path: Path) -> None:
    """Takes a last line without an end away: a kill tore it, and it is made anew."""
    if not path.is_file():
        return
    with path.open("rb+") as file:
        data = file.read()
        whole = data.rfind(b"\n") + 1
        if whole < len(data):
            file.truncate(whole)
            os.fsync(file.fileno())


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    """What tells two headers apart, in words; nothing where they agree."""
    return "; ".join(
        f"{key} {_short(there.get(key))} there, {_short(here.get(key))} here"
        for key in {**there, **here}
        if there.get(key) != here.get(key)
    )


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."
