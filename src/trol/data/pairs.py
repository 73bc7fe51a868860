"""Sets of question and answer pairs by name: built in, or a published set in a local file.

A built-in set, `docstrings`, asks about Python's standard library. A question is about a module,
class, function, method or property, and the answer is the first sentence of its docstring. The
sources of the running Python are parsed and never imported: nothing runs, opens a window or prints,
and the pairs are the same on every call.
"""

import ast
import copy
import inspect
import re
import sysconfig
import warnings
from collections.abc import Iterator
from functools import cache, lru_cache, partial
from pathlib import Path

from trol.data import own_files
from trol.data.hops import hop_pairs
from trol.errors import DataError, UsageError, unknown

ASKED = {
    "module": "What is the module {name} for?",
    "class": "What is {name}{signature}?",
    "function": "What does {name}{signature} do?",
    "method": "What does {name}{signature} do?",
    "property": "What is the property {name}?",
}
"""Question type -> sentence."""

WORDS = (3, 20)
"""Fewest and most words of an answer."""

LONGEST_SIGNATURE = 40
"""Characters; a longer signature is asked without its defaults, or left out."""

LEFT_OUT = ("test", "tests", "idlelib", "turtledemo", "lib2to3", "pydoc_data", "encodings")
"""Packages whose documentation is of no use to a reader."""

_INSTALLED = ("site-packages", "dist-packages", "ensurepip", "__pycache__")
_SENTENCE_END = re.compile(r"(?<!e\.g)(?<!i\.e)(?<!etc)(?<!vs)[.!?](?=\s|$)")

Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def docstring_pairs(split: str, *, limit: int | None = None, seed: int = 0) -> list[own_files.Pair]:
    """Pairs of a split (train, validation or test) in the order that `seed` gives.

    Which pair belongs to which split follows from its answer alone, whatever the seed: no object,
    and no answer (as inherited docstrings would be), is in two splits.

    Raises:
        UsageError: an unknown split, or a limit below 1.
        DataError: this Python came without the sources of its library.
    """
    own_files.check_split(split)
    return own_files.drawn(_splits()[split], limit, seed)


@cache
def _splits() -> dict[str, tuple[own_files.Pair, ...]]:
    """All pairs by split; a question or (last name, answer) that came before is left out."""
    pairs: dict[str, list[own_files.Pair]] = {split: [] for split in own_files.SPLITS}
    seen: set[object] = set()
    for name, pair in _all_pairs():
        keys = {pair.question, (name.rpartition(".")[2], pair.answer)}
        if not keys & seen:
            pairs[own_files.split_of(pair.answer.lower())].append(pair)
        seen |= keys
    if not all(pairs.values()):
        raise DataError(
            f"{_library()} holds no documented sources of Python's standard library; install "
            "them, or use a Python that came with them."
        )
    return {split: tuple(some) for split, some in pairs.items()}


def _library() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


def _all_pairs() -> Iterator[tuple[str, own_files.Pair]]:
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
) -> Iterator[tuple[str, own_files.Pair]]:
    for child in node.body:
        if not isinstance(child, Definition) or child.name.startswith("_"):
            continue
        full = f"{name}.{child.name}"
        doc = ast.get_docstring(child, clean=False)
        yield from _pair(_type(child, in_class), full, _signature(child, in_class), doc)
        if isinstance(child, ast.ClassDef):
            yield from _inside(child, full, in_class=True)


def _pair(
    kind: str, name: str, signature: str, doc: str | None
) -> Iterator[tuple[str, own_files.Pair]]:
    answer = None if doc is None else first_sentence(doc, name.rpartition(".")[2])
    if answer is not None:
        yield name, own_files.Pair(ASKED[kind].format(name=name, signature=signature), answer, kind)


def first_sentence(doc: str, name: str) -> str | None:
    """The first sentence of a docstring, in one line; None if it is not short and plain."""
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
    """The arguments in brackets, without annotations."""
    if isinstance(node, ast.ClassDef):
        functions = (n for n in node.body if isinstance(n, ast.FunctionDef))
        init = next((n for n in functions if n.name == "__init__"), None)
        return "" if init is None else _signature(init, in_class=True)
    static = any(isinstance(d, ast.Name) and d.id == "staticmethod" for d in node.decorator_list)
    bound = in_class and not static
    signatures = (_arguments(node.args, bound=bound, defaults=d) for d in (True, False))
    return next((text for text in signatures if len(text) <= LONGEST_SIGNATURE), "(...)")


def _arguments(arguments: ast.arguments, *, bound: bool, defaults: bool) -> str:
    """The arguments as Python writes them, those of a bound method without the first."""
    plain = copy.deepcopy(arguments)
    if bound:
        (plain.posonlyargs or plain.args or [None]).pop(0)
    positional = plain.posonlyargs + plain.args
    for argument in (*positional, *plain.kwonlyargs, plain.vararg, plain.kwarg):
        if argument is not None:
            argument.annotation = None
    plain.defaults = plain.defaults[-len(positional) :] if defaults and positional else []
    if not defaults:
        plain.kw_defaults = [None] * len(plain.kwonlyargs)
    return f"({ast.unparse(plain)})"


BUILT_IN = {"docstrings": docstring_pairs, "hops": hop_pairs, "hops4": partial(hop_pairs, most=4)}
"""The sets that need no file, by name."""

NAMES = (*BUILT_IN, *(f"{form}:FILE" for form in own_files.PAIR_FORMATS))
"""Forms of the names of sets."""


def is_pairs(name: str) -> bool:
    """Whether the name is that of a set of pairs, whose file need not be there."""
    form, colon, _ = name.partition(":")
    return name in BUILT_IN or (bool(colon) and form in own_files.PAIR_FORMATS)


def pairs_of(
    name: str, split: str, *, limit: int | None = None, seed: int = 0
) -> list[own_files.Pair]:
    """The pairs of a split of a set: built in, `alpaca:FILE`, `cnn_dailymail:FILE`, `samsum:FILE`.

    Which pairs a split has is fixed; the seed gives their order, of which the first `limit` are
    taken.

    Raises:
        UsageError: no such set or split.
        DataError: the file is missing or damaged as a whole.
    """
    own_files.check_split(split)
    if not is_pairs(name):
        raise unknown("set of pairs", name, NAMES)
    if name in BUILT_IN:
        return BUILT_IN[name](split, limit=limit, seed=seed)
    form, path = _file_of(name)
    changed = path.stat().st_mtime_ns if path.exists() else 0
    return own_files.drawn(_pairs(form, path, split, changed), limit, seed)


def check_set(name: str) -> None:
    """Raises if the set is a file's and no file is named, or there is none of that name."""
    if name not in BUILT_IN:
        form, path = _file_of(name)
        own_files.check_there(form, path)


def _file_of(name: str) -> tuple[str, Path]:
    form, _, file = name.partition(":")
    if not file:
        raise UsageError(f"{name!r} names no file; write {form}:FILE.")
    return form, Path(file)


@lru_cache(maxsize=8)
def _pairs(form: str, path: Path, split: str, changed: int) -> tuple[own_files.Pair, ...]:
    del changed  # part of the cache's key: a file that has changed is read again
    return tuple(own_files.read_pairs(form, path, split))
