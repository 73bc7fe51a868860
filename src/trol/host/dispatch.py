"""Steps past torch's dispatch: what trol needs of it that has no public name."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes


def without_modes() -> AbstractContextManager[Any]:
    """Inside, nobody who counts or records operations sees them."""
    return _disable_current_modes()


def without_subclasses() -> AbstractContextManager[Any]:
    """Inside, functions take subclasses of tensors for plain ones."""
    return torch._C.DisableTorchFunctionSubclass()
