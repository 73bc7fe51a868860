"""Steps past torch's dispatch: what trol needs of it that has no public name."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes

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


def without_modes() -> AbstractContextManager[Any]:
    """Inside, nobody who counts or records operations sees them."""
    return _disable_current_modes()


def without_subclasses() -> AbstractContextManager[Any]:
    """Inside, functions take subclasses of tensors for plain ones."""
    return torch._C.DisableTorchFunctionSubclass()
