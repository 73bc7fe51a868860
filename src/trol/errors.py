"""The errors trol raises: each says what is wrong, what was got, and what to do."""

import inspect
import sys
import warnings
from collections.abc import Iterable
from difflib import get_close_matches


class TrolError(Exception):
    """Something trol was asked for cannot be done; the message says why and gives the cure."""


class UsageError(TrolError, ValueError):
    """The request itself is malformed (a bad plan, name, key or setting); commands exit with 2."""


class HostError(TrolError):
    """This transformers model, or what was asked of it, cannot be treated rightly by trol."""


class DataError(TrolError):
    """An input file, picture or conversation cannot be read as what it should be."""


class TrainingError(TrolError):
    """A training run cannot go on; what it had saved before is intact."""


class AdapterError(TrolError):
    """A saved depth adapter does not belong to the host it is loaded onto, or is damaged."""


class UntrainedWarning(UserWarning):
    """A policy runs with untrained parameters, or exits with a threshold that was not calibrated.

    The message says what they do.
    """


CALLED_THROUGH = ("trol", "torch", "transformers", "peft", "contextlib")
"""Packages and modules between a line of the user's and a policy."""


def warn_untrained(message: str) -> None:
    """Gives an `UntrainedWarning` that points at the line which called trol or its host."""
    homes = [sys.modules[name].__file__ for name in CALLED_THROUGH if name in sys.modules]
    inside = tuple(home.removesuffix("__init__.py") for home in homes if home)
    frame, level = inspect.currentframe(), 1
    while frame and frame.f_back and frame.f_code.co_filename.startswith(inside):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, UntrainedWarning, stacklevel=level)


def unwritable(folder: object, error: OSError) -> UsageError:
    """The error for a folder that takes no files, or is not there and cannot be made."""
    return UsageError(
        f"cannot write into '{folder}': {error.strerror}; name a folder that can be made."
    )


def unknown(kind: str, name: object, known: Iterable[str]) -> UsageError:
    """The error for a name that is not registered: "did you mean", then all that exist."""
    names = sorted(known)
    close = get_close_matches(str(name), names, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return UsageError(f"unknown {kind} {name!r}.{hint} Known: {', '.join(names)}.")
