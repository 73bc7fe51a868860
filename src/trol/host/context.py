"""A context variable that code under `torch.compile` can set and read."""

from __future__ import annotations

from contextvars import ContextVar, Token
from typing import Any

import torch


class CompileableContextVar:
    """A `ContextVar` with the default None; inside one compiled graph, a plain variable.

    dynamo cannot trace `ContextVar.get`. A value that is set while it traces is therefore kept on
    the object until it is reset: threads are kept apart in all code that is not being compiled.
    """

    def __init__(self, name: str) -> None:
        self._variable: ContextVar[Any] = ContextVar(name, default=None)
        self._traced: Any = None
        self._tracing = False

    def get(self) -> Any:
        """The value, or None."""
        return self._traced if self._tracing else self._variable.get()

    def set(self, value: Any) -> Token[Any] | None:
        """Sets the value; what it returns is for `reset`."""
        if not torch.compiler.is_compiling():
            return self._variable.set(value)
        self._traced, self._tracing = value, True
        return None

    def reset(self, token: Token[Any] | None) -> None:
        """Puts back what was there before `set`."""
        if token is None or self._tracing:
            self._traced, self._tracing = None, False
        else:
            self._variable.reset(token)
