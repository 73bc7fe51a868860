"""Sets of question and answer pairs by name: built in, or a published set in a local file.

Docstrings: questions about Python's standard library, answered by its own documentation.

A pair asks what a module, class, function, method or property is; the answer is the first
sentence of its docstring. The sources of the running Python are parsed and never imported: nothing
runs, opens a window or prints, and the pairs are the same on every call.
"""

from __future__ import annotations

import ast
import inspect
import re
import sysconfig
import warnings
import zlib
from collections.abc import Iterator
from functools import cache, lru_cache
from pathlib import Path

from trol.data.own_files import (
    FORMATS,
    SPLITS,
    Pair,
    check_split,
    check_there,
    drawn,
    read_pairs,
    shortened,
)
from trol.errors import DataError, UsageError, unknown

ASKED = {
    "module": "What is the module {name} for?",
    "class": "What is {name}{signature}?",
    "function": "What does {name}{signature} do?",
    "method": "What does {name}{signature} do?",
    "property": "What is the property {name}?",
}
"""Question type -> how it is asked."""

WORDS = (3, 20)
"""Fewest and most words of an answer."""

LONGEST_SIGNATURE = 40
"""Characters; a longer signature is asked without its defaults, or left out."""

LEFT_OUT = ("test", "tests", "idlelib", "turtledemo", "lib2to3", "pydoc_data", "encodings")
"""Packages that document nothing a reader would ask about."""

_INSTALLED = ("site-packages", "dist-packages", "ensurepip", "__pycache__")
_SENTENCE_END = re.compile(r"(?<!e\.g)(?<!i\.e)(?<!etc)(?<!vs)[.!?](?=\s|$)")

Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def docstring_pairs(split: str, *, limit: int | None = None, seed: int = 0) -> list[Pair]:
    """Pairs of a split (train, validation or test) in the order that `seed` gives.

    Which pair belongs to which split follows from its answer alone, whatever the seed: no object,
    and no answer (as inherited docstrings would be), is in two splits.

    Raises:
        UsageError: an unknown split, or a limit below 1.
        DataError: this Python came without the sources of its library.
    """
    check_split(split)
    return drawn(_splits()[split], limit, seed)


@cache
def _splits() -> dict[str, tuple[Pair, ...]]:
    """All pairs by split; a question or (last name, answer) that came before is left out."""
    owned: dict[str, list[Pair]] = {split: [] for split in SPLITS}
    seen: set[object] = set()
    for name, pair in _all_pairs():
        marks = {pair.question, (name.rpartition(".")[2], pair.answer)}
        if not marks & seen:
            owned[_split_of(pair.answer)].append(pair)
        seen |= marks
    if not all(owned.values()):
        raise DataError(
            f"{_library()} holds no documented sources of Python's standard library; install "
            "them, or use a Python that came with them."
        )
    return {split: tuple(pairs) for split, pairs in owned.items()}


def _split_of(answer: str) -> str:
    place = zlib.crc32(answer.lower().encode()) / 2**32
    for split, share in SPLITS.items():
        place -= share
        if place < 0:
            return split
    return split


def _library() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


def _all_pairs() -> Iterator[tuple[str, Pair]]:
    """Every documented public object with its full name, module by module."""
    library = _library()
    for path in sorted(library.rglob("*.py")):
        parts = path.relative_to(library).with_suffix("").parts
        if parts[-1] == "__init__":
            parts = parts[:-1]
        if any(p.startswith("_") or p in (*LEFT_OUT, *_INSTALLED) or "-" in p for p in parts):
            continue
        with warnings.catch_warnings():  # of old escapes in the library's own sources
            warnings.simplefilter("ignore")
            tree = ast.parse(path.read_bytes())
        name = ".".join(parts)
        yield from _pair("module", name, "", ast.get_docstring(tree, clean=False))
        yield from _inside(tree, name, in_class=False)


def _inside(
    node: ast.Module | ast.ClassDef, name: str, *, in_class: bool
) -> Iterator[tuple[str, Pair]]:
    for child in node.body:
        if not isinstance(child, Definition) or child.name.startswith("_"):
            continue
        full = f"{name}.{child.name}"
        doc = ast.get_docstring(child, clean=False)
        yield from _pair(_type(child, in_class), full, _signature(child, in_class), doc)
        if isinstance(child, ast.ClassDef):
            yield from _inside(child, full, in_class=True)


def _pair(kind: str, name: str, signature: str, doc: str | None) -> Iterator[tuple[str, Pair]]:
    answer = None if doc is None else first_sentence(doc, name.rpartition(".")[2])
    if answer is not None:
        yield name, Pair(ASKED[kind].format(name=name, signature=signature), answer, kind)


def first_sentence(doc: str, name: str) -> str | None:
    """The first sentence of a docstring, in one line; None where it is no short plain sentence."""
    first, _, rest = inspect.cleandoc(doc).partition("\n\n")
    if first.startswith((f"{name}(", f"{name} (")):  # some begin with the signature
        _, _, after = first.partition("\n")
        first = after or rest.partition("\n\n")[0]
    text = " ".join(first.split())
    end = _SENTENCE_END.search(text)
    text = text[: end.end()] if end else text.rstrip(":;,") + "."
    fits = WORDS[0] <= len(text.split()) <= WORDS[1]
    return text if fits and text.isascii() and text[0].isalpha() and ">>>" not in text else None


def _type(node: Definition, in_class: bool) -> str:
    if isinstance(node, ast.ClassDef):
        return "class"
    if any(isinstance(d, ast.Name) and d.id.endswith("property") for d in node.decorator_list):
        return "property"
    return "method" if in_class else "function"


def _signature(node: Definition, in_class: bool) -> str:
    """What stands in brackets behind the name: arguments without their annotations."""
    if isinstance(node, ast.ClassDef):
        made = (n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__")
        found = next(made, None)
        return "" if found is None else _signature(found, in_class=True)
    static = any(isinstance(d, ast.Name) and d.id == "staticmethod" for d in node.decorator_list)
    given = node.args
    whole = _arguments(given, bound=in_class and not static, defaults=True)
    if len(whole) <= LONGEST_SIGNATURE:
        return whole
    short = _arguments(given, bound=in_class and not static, defaults=False)
    return short if len(short) <= LONGEST_SIGNATURE else "(...)"


def _arguments(given: ast.arguments, *, bound: bool, defaults: bool) -> str:
    """The arguments as Python writes them; a bound method's are without the first."""
    before, names = list(given.posonlyargs), list(given.args)
    if bound:
        (before or names or [None]).pop(0)
    kept = given.defaults[-len(before + names) :] if defaults and before + names else []
    plain = ast.arguments(
        posonlyargs=[_bare(a) for a in before],
        args=[_bare(a) for a in names],
        vararg=given.vararg and _bare(given.vararg),
        kwonlyargs=[_bare(a) for a in given.kwonlyargs],
        kw_defaults=given.kw_defaults if defaults else [None] * len(given.kwonlyargs),
        kwarg=given.kwarg and _bare(given.kwarg),
        defaults=kept,
    )
    return f"({ast.unparse(plain)})"


def _bare(argument: ast.arg) -> ast.arg:
    return ast.arg(argument.arg)


__all__ = ["NAMES", "SPLITS", "Pair", "check_set", "is_pairs", "pairs_of", "shortened"]

NAMES = ("docstrings", *(f"{form}:FILE" for form in FORMATS))
"""How sets of pairs are named."""


def is_pairs(name: str) -> bool:
    """Whether the name is a set of pairs; a file of it is looked for only by `pairs_of`."""
    form, colon, _ = name.partition(":")
    return name == "docstrings" or (bool(colon) and form in FORMATS)


def pairs_of(name: str, split: str, *, limit: int | None = None, seed: int = 0) -> list[Pair]:
    """The pairs of a split of `docstrings`, `alpaca:FILE`, `cnn_dailymail:FILE` or `samsum:FILE`.

    Which pairs a split has is fixed; the seed gives their order, of which the first `limit` are
    taken.

    Raises:
        UsageError: no such set or split.
        DataError: the file is missing or damaged as a whole.
    """
    check_split(split)
    if not is_pairs(name):
        raise unknown("set of pairs", name, NAMES)
    if name == "docstrings":
        return docstring_pairs(split, limit=limit, seed=seed)
    form, path = _file_of(name)
    changed = path.stat().st_mtime_ns if path.exists() else 0
    return drawn(_read(form, path, split, changed), limit, seed)


def check_set(name: str) -> None:
    """Raises where the set of pairs is to be read from a file, and none is named or there."""
    if name != "docstrings":
        form, path = _file_of(name)
        check_there(form, path)


def _file_of(name: str) -> tuple[str, Path]:
    form, _, file = name.partition(":")
    if not file:
        raise UsageError(f"{name!r} names no file; write {form}:FILE.")
    return form, Path(file)


@lru_cache(maxsize=8)
def _read(form: str, path: Path, split: str, changed: int) -> tuple[Pair, ...]:
    del changed  # a file that was written anew is read anew
    return tuple(read_pairs(form, path, split))
