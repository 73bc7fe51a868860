"""Which releases of transformers trol is tested with: those that its own metadata allows."""

from __future__ import annotations

import functools
from importlib.metadata import PackageNotFoundError, requires, version

from packaging.requirements import Requirement

from trol.errors import HostError

DISTRIBUTION = "trol-vlm"


def allowed(name: str) -> Requirement | None:
    """What trol's metadata asks of a distribution; None in a source tree that is not installed."""
    try:
        wanted = [Requirement(line) for line in requires(DISTRIBUTION) or ()]
    except PackageNotFoundError:
        return None
    return next(one for one in wanted if one.name == name and one.marker is None)


@functools.cache
def check_release() -> None:
    """Raises `HostError`, in one line, for a transformers older or newer than what is tested."""
    wanted, installed = allowed("transformers"), version("transformers")
    if wanted is None or wanted.specifier.contains(installed):
        return
    newest = max(wanted.specifier, key=lambda one: one.operator.startswith("<"))
    how = "newer" if not newest.contains(installed) else "older"
    raise HostError(
        f"transformers {installed} is {how} than what this trol is tested with "
        f"({wanted.specifier}); run: pip install '{wanted.name}{wanted.specifier}'"
    )
