"""Work that processes and machines share through one folder: each does part I of N, one merges.

No process waits for another: each writes what it has finished into a file of its own, and the one
that finishes last finds all parts there.
"""

from trol.errors import UsageError
from trol.host import processes

Shard = tuple[int, int]
"""Which part, from 0, of how many: (0, 2) is the first of two."""

WHOLE: Shard = (0, 1)


def shard_of(text: str | None) -> Shard:
    """`0/2`, the first of two parts, as numbers; without a text, what `torchrun` says, or all.

    Raises:
        UsageError: the text is no part.
    """
    if text is None:
        return processes.rank(), processes.count()
    first, slash, second = text.partition("/")
    if not (slash and first.isdecimal() and second.isdecimal() and int(first) < int(second)):
        raise UsageError(
            f"--shard is {text!r}; give I/N with I from 0 to N - 1, such as 0/2 and 1/2."
        )
    return int(first), int(second)


def missing_text(missing: list[str]) -> str:
    """What the process says whose part is finished while others are not."""
    parts = ", ".join(f"--shard {one}" for one in missing)
    return f"This part is finished. Missing: {parts}; run them with the same settings."
