"""Placing a mixin in front of a live object's own class, as FSDP2 does."""

from __future__ import annotations

import functools
from typing import Any, TypeVar

Class = type[Any]
T = TypeVar("T", bound="Specialised")


class Specialised:
    """Base of the mixins: keeps objects of a made-up class picklable and deep-copyable.

    The made-up class cannot be found by name, so a pickle names the mixins and the original class.
    """

    trol_mixins: tuple[Class, ...] = ()
    trol_original: Class = object

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced: Any = super().__reduce_ex__(protocol)
        return (_blank, (self.trol_original, *self.trol_mixins), *reduced[2:])


@functools.lru_cache(maxsize=None)
def specialised(original: Class, *mixins: Class) -> Class:
    """The class `original` with `mixins` in front; its name, module and `forward` signature stay."""
    body: dict[str, Any] = {
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
        "trol_mixins": mixins,
        "trol_original": original,
    }
    if hasattr(original, "forward"):
        body["forward"] = _signed_as(original.forward, mixins[0])
    return type(original.__name__, (*mixins, original), body)


def specialise(target: object, *mixins: Class) -> None:
    """Puts `mixins` in front of the class of `target`, in place."""
    target.__class__ = specialised(type(target), *mixins)
    _rebind(target)


def restore(target: Specialised) -> None:
    """Undoes `specialise`."""
    target.__class__ = target.trol_original
    _rebind(target)


def _signed_as(base_forward: Any, mixin: Class) -> Any:
    # transformers and PEFT decide by inspect.signature(model.forward) which inputs a model takes.
    @functools.wraps(base_forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return mixin.forward(self, *args, **kwargs)

    return forward


def _rebind(target: Any) -> None:
    # accelerate's hooks keep the class's old bound forward on the instance and call that one.
    if "_old_forward" in vars(target):
        target._old_forward = type(target).forward.__get__(target)


def _blank(original: Class, *mixins: Class) -> Any:
    made = specialised(original, *mixins)
    return made.__new__(made)
