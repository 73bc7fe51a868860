"""Steps past torch's dispatch: what trol needs of it that has no public name."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

LOOKS = frozenset(("_local_scalar_dense", "nonzero", "is_nonzero", "equal"))
"""Operators that bring a value of a tensor to the program, and wait for the device."""

FREE = frozenset(("_unsafe_view",))
"""Operators that launch nothing, beside those that torch itself calls views."""

HOOKS = ("_forward_pre_hooks", "_forward_hooks")
"""Where modules keep what is called before and behind their forward."""


@contextmanager
def without_hooks(modules: Iterable[nn.Module]) -> Generator[None]:
    """Inside, these modules have no forward hooks but those that are added inside."""
    before = [(module, {name: vars(module)[name] for name in HOOKS}) for module in modules]
    for module, hooks in before:
        vars(module).update({name: type(held)() for name, held in hooks.items()})
    try:
        yield
    finally:
        for module, hooks in before:
            vars(module).update(hooks)


def has_hooks(module: nn.Module) -> bool:
    """Whether somebody watches this module."""
    return any(vars(module)[name] for name in HOOKS)


class Launches(TorchDispatchMode):
    """Counts the operators inside that launch something, and the looks at values."""

    def __init__(self) -> None:
        super().__init__()
        self.operators = self.looks = 0

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """The operator itself, counted."""
        name = func._schema.name.partition("::")[2]
        self.operators += not (func.is_view or name in FREE)
        self.looks += name in LOOKS
        return func(*args, **(kwargs or {}))
