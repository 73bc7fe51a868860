"""What trol needs of torch and Triton that has no public name.

Forward hooks of modules, and what transformers collects by hooks of its own; a count of the
operators that launch something; a context variable that `torch.compile` can trace; and a way to
run a Triton kernel of ours where Triton is installed, which is never required.
"""

import functools
import importlib
import inspect
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextvars import ContextVar, Token
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as torch_module
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.utils import output_capturing

HOOKS = ("_forward_pre_hooks", "_forward_hooks")
"""Where modules keep what is called before and behind their forward."""

CAPTURING = output_capturing.__name__
"""The module that makes transformers' own hooks, by which it collects outputs of modules inside
layers, such as attentions, when a caller asks for them. They stay on the modules afterwards."""


def remove_hooks(module: nn.Module) -> None:
    """Removes the forward hooks of a module; the dictionaries that held them stay as they are."""
    vars(module).update({name: type(vars(module)[name])() for name in HOOKS})


def has_hooks(module: nn.Module) -> bool:
    """Whether a module has a forward hook."""
    return any(vars(module)[name] for name in HOOKS)


def watched(modules: Iterable[nn.Module]) -> bool:
    """Whether some hook sees what enters or leaves one of these modules, or any module.

    transformers' own do not count: whether they do anything depends on the arguments of a pass.
    """
    if any(vars(torch_module)[f"_global{name}"] for name in HOOKS):
        return True
    hooks = (hook for one in modules for name in HOOKS for hook in vars(one)[name].values())
    return any(getattr(hook, "__module__", None) != CAPTURING for hook in hooks)


def captured_by_layer(
    values: Sequence[Any], layers: Sequence[nn.Module], runs: Sequence[int | None], key: str
) -> tuple[Any, ...]:
    """What transformers collected in the first run of each layer; None for a skipped layer.

    Its hooks collect a value each time that a module runs: none of a skipped layer, several of one
    that is visited again. Here an index into the values keeps its meaning.

    Args:
        values: what was collected, in order.
        layers: the layers that hold the modules.
        runs: how often each ran; None for one that the host did not call.
        key: under which name it was collected.
    """
    counts = [
        0 if count is None else _capturing_hooks(layer, key)
        for layer, count in zip(layers, runs, strict=True)
    ]
    if len(values) != sum(n * (count or 0) for n, count in zip(counts, runs, strict=True)):
        return tuple(values)  # the family collects them in a way of its own
    first_runs: list[Any] = []
    remaining = list(values)
    for n, count in zip(counts, runs, strict=True):
        first_runs += remaining[:n] if count else [None] * n
        del remaining[: n * (count or 0)]
    return tuple(first_runs)


def _capturing_hooks(layer: nn.Module, key: str) -> int:
    """How many hooks of transformers on the modules of a layer collect under this name."""
    hooks = (hook for module in layer.modules() for hook in module._forward_hooks.values())
    return sum(
        getattr(hook, "__module__", None) == CAPTURING
        and inspect.getclosurevars(hook).nonlocals.get("key") == key
        for hook in hooks
    )


LOOKS = frozenset(("_local_scalar_dense", "nonzero", "is_nonzero", "equal"))
"""Operators that bring a value of a tensor to the program, and wait for the device."""

FREE = frozenset(("_unsafe_view",))
"""Operators that launch nothing, beside those that torch itself calls views."""


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


_FAILED: set[str] = set()
"""Triton kernels that failed in this process."""


@functools.cache
def _installed() -> bool:
    return find_spec("triton") is not None


def why_no_triton(device: torch.device) -> str:
    """Why no Triton kernel can run on a device; an empty text where one can."""
    if device.type != "cuda":
        return f"it runs on CUDA devices, and the model is on {device.type}"
    return "" if _installed() else "triton is not installed (pip install triton)"


@functools.cache
def _kernel(module: str, name: str) -> Callable[..., Any]:
    return getattr(importlib.import_module(module), name)


def run_kernel(module: str, name: str, *args: Any) -> Any:
    """The output of a Triton kernel of ours; None without Triton, or once it failed, which warns.

    Args:
        module: the file that defines it, which imports triton.
        name: its function there.
        args: the function's arguments.
    """
    if name in _FAILED or not _installed():
        return None
    try:
        return _kernel(module, name)(*args)
    except Exception as error:  # whatever a compiler raises: the operators give the same numbers
        _FAILED.add(name)
        warnings.warn(
            f"the Triton kernel {name} failed ({type(error).__name__}: {error!s:.200}), so plain "
            "operators run in its place.",
            stacklevel=2,
        )
        return None
