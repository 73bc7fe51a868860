"""Steps past torch's dispatch: what trol needs of it that has no public name."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.nn.modules import module as torch_module
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.utils import output_capturing

LOOKS = frozenset(("_local_scalar_dense", "nonzero", "is_nonzero", "equal"))
"""Operators that bring a value of a tensor to the program, and wait for the device."""

FREE = frozenset(("_unsafe_view",))
"""Operators that launch nothing, beside those that torch itself calls views."""

HOOKS = ("_forward_pre_hooks", "_forward_hooks")
"""Where modules keep what is called before and behind their forward."""

CAPTURING = output_capturing.__name__
"""Where transformers' own hooks are made, which stay on modules once something was shown."""


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


def watched(modules: Iterable[nn.Module]) -> bool:
    """Whether some hook sees what enters or leaves one of these modules, or any module.

    Those by which transformers collects what a caller asks to be shown are not counted: they stay
    on a module, and whether they do anything is said by what is asked.
    """
    if any(vars(torch_module)[f"_global{name}"] for name in HOOKS):
        return True
    hooks = (hook for one in modules for name in HOOKS for hook in vars(one)[name].values())
    return any(getattr(hook, "__module__", None) != CAPTURING for hook in hooks)


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
