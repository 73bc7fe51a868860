"""Dataclasses made of YAML values: unknown keys, missing keys and wrong kinds are errors."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any

from trol.errors import UsageError, unknown


def built(cls: Any, data: Any, where: str, **fixed: Any) -> Any:
    """The dataclass `cls` with the values of `data`; `where` is what messages call the place.

    Fields in `fixed` are set by the caller, and are no keys of `data`.

    Raises:
        UsageError: an unknown key ("did you mean"), a missing one, or a value of a wrong kind.
    """
    if not isinstance(data, Mapping):
        raise UsageError(f"{where} holds {data!r}; give keys and values.")
    hints = {key: hint for key, hint in typing.get_type_hints(cls).items() if key not in fixed}
    for key in data:
        if key not in hints:
            raise unknown(f"key in {where}", key, hints)
    required = {f.name for f in dataclasses.fields(cls) if _is_required(f)}
    if missing := sorted(required - set(data) - set(fixed)):
        raise UsageError(f"{where} lacks {', '.join(missing)}.")
    values = {key: _typed(hints[key], value, f"{where}.{key}") for key, value in data.items()}
    return cls(**values, **fixed)


def plain(value: Any) -> Any:
    """The value with every tuple in it as a list, as YAML and JSON want it."""
    if isinstance(value, dict):
        return {key: plain(inner) for key, inner in value.items()}
    return [plain(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def _is_required(field_: Any) -> bool:
    return field_.default is dataclasses.MISSING and field_.default_factory is dataclasses.MISSING


def _typed(kind: Any, value: Any, where: str) -> Any:
    if isinstance(kind, types.UnionType):  # X | None: leaving the key out means None
        kind = typing.get_args(kind)[0]
    origin = typing.get_origin(kind) or kind
    inner = typing.get_args(kind)[-1:]
    if origin is dict and inner and dataclasses.is_dataclass(inner[0]):
        if not isinstance(value, Mapping):
            raise UsageError(f"{where} holds {value!r}; name stages, each with its settings.")
        return {str(name): built(inner[0], row, f"{where}.{name}") for name, row in value.items()}
    if origin is tuple and isinstance(value, list):
        value = tuple(value)
    if kind is float and isinstance(value, (int, str)) and not isinstance(value, bool):
        value = _number(value, where)  # YAML 1.1 reads 1e-3 as a string
    if not _fits(kind, value):
        must = _KINDS.get(kind) or _KINDS.get(origin, str(kind))
        raise UsageError(f"{where} is {value!r}, but must be {must}.")
    return value


def _fits(kind: Any, value: Any) -> bool:
    """Whether the value, and each in it if it is a list or has keys, is of the kind."""
    origin, inner = typing.get_origin(kind) or kind, typing.get_args(kind)[-1:]
    if origin is Any:
        return True
    if isinstance(value, bool) or not isinstance(value, origin):
        return origin is bool and isinstance(value, bool)
    if origin is dict and inner:
        return all(isinstance(key, str) and _fits(inner[0], v) for key, v in value.items())
    return origin is not list or not inner or all(_fits(inner[0], one) for one in value)


_KINDS: dict[Any, str] = {
    tuple: "a list, such as [decoder]",
    dict: "keys and values, such as {policy: plain}",
    dict[str, str]: "names and names, such as {instruction: question}",
    dict[str, list[str]]: "columns and lists of patterns, such as {image: [ai2d/*]}",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a text",
}


def _number(value: int | str, where: str) -> float:
    try:
        return float(value)
    except ValueError as error:
        raise UsageError(f"{where} is {value!r}, but must be a number.") from error
