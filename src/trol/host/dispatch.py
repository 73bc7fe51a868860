"""Steps past torch's dispatch: what trol needs of it that has no public name."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from contextlib import contextmanager

from torch import nn

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
