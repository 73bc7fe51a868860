"""What trol assumes of transformers, torch, PEFT, accelerate and bitsandbytes, in one room.

Nothing outside this room, and `family/` where it subclasses, names a private thing of theirs. What
differs between releases is learnt from signatures and attributes, never from a version; every other
assumption is a row of `trol.host.assumptions`, with a check. Imports `errors` and `files`.

Here itself: which releases of transformers trol is tested with, those that its metadata allows.
"""

import functools
import logging
from importlib.metadata import PackageNotFoundError, requires, version

from packaging.requirements import Requirement

from trol.errors import HostError


def _is_no_request_for_kernels(record: logging.LogRecord) -> bool:
    return "from kernels-community" not in str(record.msg)


# Here, before any module of trol imports transformers: bitsandbytes, which comes with it through
# PEFT, asks in every process for a package that it does not need.
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(_is_no_request_for_kernels)


def required(name: str, extra: str = "") -> Requirement | None:
    """What trol's metadata asks of a distribution, in an extra if one is named.

    None in a source tree that is not installed, and where it asks nothing.
    """
    try:
        lines = requires("trol-vlm") or ()
    except PackageNotFoundError:
        return None
    for line in lines:
        one = Requirement(line)
        asked = one.marker.evaluate({"extra": extra}) if one.marker else not extra
        if one.name == name and asked:
            return one
    return None


@functools.cache
def check_release(name: str = "transformers", extra: str = "") -> None:
    """Raises `HostError`, in one line, for a release older or newer than what is tested."""
    tested, installed = required(name, extra), version(name)
    if tested is None or tested.specifier.contains(installed):
        return
    newest = max(tested.specifier, key=lambda one: one.operator.startswith("<"))
    how = "newer" if not newest.contains(installed) else "older"
    raise HostError(
        f"{name} {installed} is {how} than what this trol is tested with "
        f"({tested.specifier}); run: pip install '{tested.name}{tested.specifier}'"
    )
