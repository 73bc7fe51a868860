"""A plan: how often each layer is to be visited, decided beforehand, as text and as JSON."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from trol.errors import UsageError

MOST_VISITS = 64
"""The most visits that a plan may give a layer: more is a slip of the keyboard."""

_SEGMENT = re.compile(r"(?P<first>\d+)(?:-(?P<last>\d+))?(?::(?P<visits>\d+))?")
_EVERY = re.compile(r"all(?::(?P<visits>\d+))?")
_EXIT = re.compile(r"exit@(?P<layer>\d+)")


@dataclass(frozen=True, init=False)
class Plan:
    """Intended visits per layer: `0-7:2 8-23` visits layers 0-7 twice and 8-23 once.

    Layers are numbered from 0, ranges are inclusive, and layers that are not named are skipped.
    `all` and `all:2` name every layer of whatever stack the plan meets; `exit@12` is `0-11`, and
    beside other segments it asserts that nothing from layer 12 on is named.

    Args:
        spec: plan text, or visits per layer as integers.

    Raises:
        UsageError: the text is no plan, a layer is named twice, or a count is negative.
    """

    visits: tuple[int, ...]
    """Visits of layers 0, 1, ...; layers beyond the end have `beyond`. Unit: visits per token."""
    beyond: int = 0
    """Visits of every layer that `visits` does not reach: 0, unless the plan says `all`."""

    def __init__(self, spec: str | Iterable[int] = "all", *, beyond: int = 0) -> None:
        counts: list[Any]
        if isinstance(spec, str):
            counts, beyond = _parse(spec)
        else:
            given: Any = spec
            counts = list(given) if isinstance(given, Iterable) else [None]
        if not all(type(count) is int for count in [*counts, beyond]):
            raise UsageError(
                f"{spec!r:.80} is no plan; write plan text, such as '0-7:2 8-23', or how often "
                "each layer is visited, such as Plan([2, 1, 0])."
            )
        if any(not 0 <= count <= MOST_VISITS for count in (*counts, beyond)):
            raise UsageError(
                f"a plan got visits {[*counts, beyond]}; give each layer 0 (skipped) to "
                f"{MOST_VISITS}."
            )
        while counts and counts[-1] == beyond:  # one plan has one form, so that == and hash agree
            counts.pop()
        object.__setattr__(self, "visits", tuple(counts))
        object.__setattr__(self, "beyond", beyond)

    def __str__(self) -> str:
        if self.beyond and not self.visits:
            return "all" if self.beyond == 1 else f"all:{self.beyond}"
        if self.beyond:
            raise UsageError(
                f"the plan {list(self.visits)} then {self.beyond} for all others has no text form; "
                "give every layer its count."
            )
        return " ".join(_segments(self.visits)) or "exit@0"

    def for_layers(self, layers: int) -> tuple[int, ...]:
        """Visits of each layer of a stack of `layers` layers.

        Raises:
            UsageError: the plan names a layer that the stack does not have.
        """
        named = len(self.visits)
        if named > layers:
            # Plan text `exit@20` is kept as '0-19': both are named, whichever was written.
            leaves = set(self.visits) == {1}
            form, most = (
                (f" (which is exit@{named})", f" (exit@{layers} at most)") if leaves else ("", "")
            )
            raise UsageError(
                f"layer {named - 1} of plan '{self}'{form}: this stack has {layers} layers "
                f"(0-{layers - 1}); name no layer above {layers - 1}{most}."
            )
        return self.visits + (self.beyond,) * (layers - named)

    def to_json(self) -> dict[str, Any]:
        """The JSON form: `{"visits": [2, 2, 1], "beyond": 0}`."""
        return {"visits": list(self.visits), "beyond": self.beyond}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Plan":
        """The plan of a JSON form; raises `UsageError` when it is none."""
        if not isinstance(data.get("visits"), list) or set(data) - {"visits", "beyond"}:
            raise UsageError(f'{data!r} is no plan; write {{"visits": [2, 1, 0], "beyond": 0}}.')
        return cls(data["visits"], beyond=data.get("beyond", 0))


def _segments(visits: tuple[int, ...]) -> Iterable[str]:
    for count, run in groupby(enumerate(visits), key=lambda pair: pair[1]):
        layers = [layer for layer, _ in run]
        if count == 0:
            continue
        span = f"{layers[0]}" if len(layers) == 1 else f"{layers[0]}-{layers[-1]}"
        yield span if count == 1 else f"{span}:{count}"


def _parse(text: str) -> tuple[list[int], int]:
    words = text.split()
    if not words:
        raise UsageError("an empty plan; write 'all' for the plain model or '0-7:2 8-23'.")
    every = _EVERY.fullmatch(words[0])
    if every and len(words) == 1:
        return [], int(every["visits"] or 1)
    exits = [match for word in words if (match := _EXIT.fullmatch(word))]
    named = _named([word for word in words if not _EXIT.fullmatch(word)], text)
    if len(exits) > 1:
        raise UsageError(f"plan '{text}' exits {len(exits)} times; name one exit.")
    if exits:
        exit_layer = int(exits[0]["layer"])
        if named and max(named) >= exit_layer:
            raise UsageError(
                f"plan '{text}' names layer {max(named)} but exits before layer {exit_layer}; "
                f"end its ranges at {exit_layer - 1}."
            )
        named = named or dict.fromkeys(range(exit_layer), 1)
    return [named.get(layer, 0) for layer in range(max(named, default=-1) + 1)], 0


def _named(words: list[str], text: str) -> dict[int, int]:
    named: dict[int, int] = {}
    for word in words:
        match = _SEGMENT.fullmatch(word)
        if match is None:
            raise UsageError(
                f"'{word}' in plan '{text}' is no segment; write '3', '0-7', '0-7:2', 'exit@12', "
                "or 'all' and 'all:2' alone."
            )
        first, last = int(match["first"]), int(match["last"] or match["first"])
        if last < first:
            raise UsageError(f"'{word}' in plan '{text}' runs backwards; write '{last}-{first}'.")
        for layer in range(first, last + 1):
            if layer in named:
                raise UsageError(f"plan '{text}' names layer {layer} twice; name it once.")
            named[layer] = int(match["visits"] or 1)
    return named
