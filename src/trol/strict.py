"""The strict reader of YAML files: dataclasses made of their values, bounds stated at the fields.

Unknown keys, missing keys, values of a wrong kind and values out of bounds are errors that say
where in the file they stand.
"""

import contextlib
import dataclasses
import math
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from trol.errors import UsageError, unknown


def setting(
    default: Any,
    *,
    bounds: tuple[float, float] | None = None,
    choices: Sequence[Any] | None = None,
) -> Any:
    """A dataclass field whose values lie within `bounds`, or are (in a list: all) of `choices`."""
    return dataclasses.field(default=default, metadata={"bounds": bounds, "choices": choices})


def read_yaml(path: Path) -> dict[str, Any]:
    """The keys and values of a YAML file.

    Raises:
        UsageError: the file is no text, no YAML, or holds something else.
    """
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is no YAML: it is not text.") from error
    except yaml.YAMLError as error:
        raise UsageError(f"{path} is no YAML: {error}") from error
    if not isinstance(data, dict):
        raise UsageError(f"{path} holds {type(data).__name__}, not keys and values.")
    return data


def built(cls: Any, data: Any, where: str, **more: Any) -> Any:
    """The dataclass `cls` of the values in `data` and of `more`, fields that are no keys.

    `where` is what messages call the place.

    Raises:
        UsageError: an unknown key ("did you mean"), a missing one, a value of a wrong kind, or
            one that `setting` does not allow.
    """
    if not isinstance(data, Mapping):
        raise UsageError(f"{where} holds {data!r}; give keys and values.")
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls) if f.name not in more}
    for key in data:
        if key not in fields:
            raise unknown(f"key in {where}", key, fields)
    if missing := sorted(name for name in set(fields) - set(data) if _is_required(fields[name])):
        raise UsageError(f"{where} lacks {', '.join(missing)}.")
    values = {key: _typed(hints[key], value, f"{where}.{key}") for key, value in data.items()}
    settings = cls(**values, **more)
    check(settings, f"{where}.")
    return settings


def check(settings: Any, where: str = "") -> None:
    """Raises `UsageError` where a value of a dataclass is not what `setting` allows."""
    for field in dataclasses.fields(settings):
        value, name = getattr(settings, field.name), f"{where}{field.name}"
        least, most = field.metadata.get("bounds") or (None, None)
        if least is not None and not least <= value <= most:  # a NaN is in no range
            limit = f"{least} or more" if most == math.inf else f"{least} to {most}"
            raise UsageError(f"{name} is {value}; give {limit}.")
        choices = field.metadata.get("choices")
        for one in value if isinstance(value, tuple) else (value,):
            if choices is not None and one not in choices:
                raise unknown(name, one, map(str, choices))


def plain(value: Any) -> Any:
    """The value with every tuple in it as a list, as YAML and JSON want it."""
    if isinstance(value, dict):
        return {key: plain(inner) for key, inner in value.items()}
    return [plain(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def _is_required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _typed(kind: Any, value: Any, where: str) -> Any:
    if isinstance(kind, types.UnionType):  # `int | None`: None is the default, and no value
        kind = typing.get_args(kind)[0]
    origin, inner = typing.get_origin(kind) or kind, typing.get_args(kind)
    if origin is dict and dataclasses.is_dataclass(inner[-1]) and isinstance(value, Mapping):
        return {str(name): built(inner[-1], row, f"{where}.{name}") for name, row in value.items()}
    if origin is tuple and isinstance(value, list):
        value = tuple(value)
    if kind is float and isinstance(value, (int, str)) and not isinstance(value, bool):
        with contextlib.suppress(ValueError):
            value = float(value)  # YAML 1.1 reads 1e-3 as a text
    if not _is(kind, value):
        wanted = _KINDS.get(kind) or _KINDS[origin]
        raise UsageError(f"{where} is {value!r}, but must be {wanted}.")
    return value


_KINDS: dict[Any, str] = {
    dict: "keys and values, such as {policy: plain}",
    dict[str, str]: "names and names, such as {instruction: question}",
    dict[str, list[str]]: "columns and lists of patterns, such as {image: [ai2d/*]}",
    tuple: "a list, such as [decoder]",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a text",
}


def _is(kind: Any, value: Any) -> bool:
    """Whether a value and all in it are of a kind; true and false are no numbers."""
    origin, inner = typing.get_origin(kind) or kind, typing.get_args(kind)
    if origin is Any:
        return True
    if isinstance(value, bool) or not isinstance(value, origin):
        return kind is bool and isinstance(value, bool)
    if origin is dict:
        return all(_is(inner[0], key) and _is(inner[1], one) for key, one in value.items())
    return not inner or all(_is(inner[0], one) for one in value)
