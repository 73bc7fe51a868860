"""The plain model: every token visits every layer once."""

from __future__ import annotations

from typing import Any

from trol.depth import AbstractPolicy, Answer, Bounds, Visit


class Plain(AbstractPolicy):
    """a_0 = 1, a_1 = 0: what the host does without trol."""

    name = "plain"
    decides = True

    def __init__(self) -> None:
        super().__init__()

    def bounds(self, layer: int) -> Bounds:
        return Bounds(1, 1)

    def again(self, visit: Visit) -> Answer:
        return 1.0

    def settings(self) -> dict[str, Any]:
        return {}
