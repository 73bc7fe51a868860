"""Placing a mixin in front of a live object's own class, as FSDP2 does."""

from __future__ import annotations

import functools
from typing import Any

Class = type[Any]

SIGNED = ("forward", "prepare_inputs_for_generation")
"""Methods whose signature transformers and PEFT inspect, to learn which inputs a model takes."""


class Specialised:
    """Base of the mixins: keeps objects of a made-up class picklable and deep-copyable.

    The made-up class cannot be found by name, so a pickle names the mixins and the original class.
    """

    trol_mixins: tuple[Class, ...] = ()
    trol_original: Class = object

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced: Any = super().__reduce_ex__(protocol)
        return (_blank, (self.trol_original, *self.trol_mixins), *reduced[2:])


@functools.cache
def specialised(original: Class, *mixins: Class) -> Class:
    """The class `original` with `mixins` in front; its name, module and signatures stay."""
    body: dict[str, Any] = {
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
        "trol_mixins": mixins,
        "trol_original": original,
    }
    for name in SIGNED:
        if hasattr(original, name) and hasattr(mixins[0], name):
            body[name] = _signed_as(original, mixins[0], name)
    return type(original.__name__, (*mixins, original), body)


def specialise(target: object, *mixins: Class) -> None:
    """Puts `mixins` in front of the class of `target`, in place."""
    target.__class__ = specialised(type(target), *mixins)
    _rebind(target)


def restore(target: Specialised) -> None:
    """Undoes `specialise`."""
    target.__class__ = target.trol_original
    _rebind(target)


def _signed_as(original: Class, mixin: Class, name: str) -> Any:
    @functools.wraps(getattr(original, name))
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return getattr(mixin, name)(self, *args, **kwargs)

    return method


def _rebind(target: Any) -> None:
    # accelerate's hooks keep the class's old bound forward on the instance and call that one.
    if "_old_forward" in vars(target):
        target._old_forward = type(target).forward.__get__(target)


def _blank(original: Class, *mixins: Class) -> Any:
    made: Any = specialised(original, *mixins)
    return made.__new__(made)
