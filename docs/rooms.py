"""Draws the rooms of trol and their imports: `python docs/rooms.py` writes docs/rooms.svg.

The lines are those of the import contract in pyproject.toml, and the arrows what import-linter's
own graph finds; an arrow that follows from others is left out. tests/test_documents.py compares.
"""

from __future__ import annotations

import ast
import re
from html import escape
from itertools import product
from pathlib import Path
from textwrap import wrap

import grimp

ROOT = Path(__file__).parents[1]
WIDTH, HEIGHT, LINE = 300, 60, 98
"""Size of a box, and from one line of rooms to the next. Unit: pixels."""


def contract() -> list[list[str]]:
    """The rooms, line by line, the highest first."""
    text = (ROOT / "pyproject.toml").read_text()
    lines = re.search(r'containers = \["trol"\]\nlayers = \[(.*?)\n\]', text, re.DOTALL)
    assert lines
    return [line.split(" | ") for line in re.findall(r'"(.*?)"', lines[1])]


def imports(rooms: list[str]) -> set[tuple[str, str]]:
    """(room, room that it imports), without those that follow from others."""
    graph = grimp.build_graph("trol", exclude_type_checking_imports=False)
    direct = {
        (room, other)
        for room, other in product(rooms, rooms)
        if room != other
        and graph.direct_import_exists(
            importer=f"trol.{room}", imported=f"trol.{other}", as_packages=True
        )
    }
    reached = set(direct)
    for middle, room, other in product(rooms, repeat=3):
        if (room, middle) in reached and (middle, other) in reached:
            reached.add((room, other))
    return {
        (room, other)
        for room, other in direct
        if not any((room, m) in reached and (m, other) in reached for m in rooms)
    }


def purpose(room: str) -> str:
    """The first sentence of a room's docstring, without its name."""
    package = ROOT / "src" / "trol" / room
    file = package / "__init__.py" if package.is_dir() else package.with_suffix(".py")
    first = (ast.get_docstring(ast.parse(file.read_text())) or "").split("\n")[0]
    return re.split(r"[;.]", first.split(": ", 1)[-1])[0]


def drawing() -> str:
    """The picture as SVG."""
    lines = contract()
    widest = max(map(len, lines))
    place = {
        room: (40 + (index + (widest - len(line)) / 2) * (WIDTH + 40), 30 + number * LINE)
        for number, line in enumerate(lines)
        for index, room in enumerate(line)
    }
    arrows = []
    for room, other in sorted(imports(list(place))):
        (x, y), (u, v) = place[room], place[other]
        start, end = (x + WIDTH / 2, y + HEIGHT), (u + WIDTH / 2, v - 4)
        bend = LINE / 3
        arrows.append(
            f'<path d="M{start[0]:g} {start[1]:g}C{start[0]:g} {start[1] + bend:g} '
            f'{end[0]:g} {end[1] - bend:g} {end[0]:g} {end[1]:g}"/>'
        )
    boxes = []
    for room, (x, y) in place.items():
        boxes.append(f'<rect x="{x:g}" y="{y:g}" width="{WIDTH}" height="{HEIGHT}" rx="6"/>')
        boxes.append(f'<text x="{x + 10:g}" y="{y + 19:g}" class="n">{room}</text>')
        for number, words in enumerate(wrap(purpose(room), 50)):
            boxes.append(
                f'<text x="{x + 10:g}" y="{y + 35 + 14 * number:g}">{escape(words)}</text>'
            )
    size = 40 + widest * (WIDTH + 40), 30 + len(lines) * LINE
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size[0]} {size[1]}" '
            'font-family="system-ui, sans-serif" font-size="10.5">',
            "<style>rect{fill:#eef3f8;stroke:#456}.n{font-size:14px;font-weight:600}"
            "path{fill:none;stroke:#89a;marker-end:url(#m)}</style>",
            '<defs><marker id="m" markerWidth="7" markerHeight="7" refX="5" refY="3" orient="auto">'
            '<path d="M0,0 L6,3 L0,6 z" style="fill:#89a;stroke:none;marker-end:none"/></marker>'
            "</defs>",
            f'<rect width="{size[0]}" height="{size[1]}" style="fill:#fff;stroke:none"/>',
            *arrows,
            *boxes,
            "</svg>\n",
        ]
    )


if __name__ == "__main__":
    (ROOT / "docs" / "rooms.svg").write_text(drawing())
