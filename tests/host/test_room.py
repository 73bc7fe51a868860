"""Outside `host/` and `family/`, no code says what transformers calls a thing of its own."""

import ast
from pathlib import Path

import pytest

from trol.host.names import KNOWN_CACHE_NAMES

SOURCE = Path(__file__).parents[2] / "src" / "trol"
FILES = [
    path
    for path in sorted(SOURCE.rglob("*.py"))
    if path.relative_to(SOURCE).parts[0] not in ("host", "family")
]
THEIRS = {*KNOWN_CACHE_NAMES, "logits_to_keep", "_old_forward"} - {"cache"}
"""Names that a release may change; `cache` is also our word, and no string may be it."""


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_no_name_of_theirs(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            assert node.attr not in THEIRS, f"line {node.lineno}: .{node.attr}"
        elif isinstance(node, ast.keyword):
            assert node.arg not in THEIRS, f"line {node.value.lineno}: {node.arg}="
        elif isinstance(node, ast.Constant) and id(node) not in docstrings:
            assert node.value not in {*THEIRS, "cache"}, f"line {node.lineno}: {node.value!r}"
