"""How many tokens a round may draft without leaving the text's length or crossing a RoPE switch."""

from __future__ import annotations

from typing import Any

from torch import Tensor

ANY = 1 << 30


class Room:
    """Bounds on drafts.

    `longrope` rotates all keys anew where a row outgrows the original length, and `dynamic` RoPE
    rotates by the longest position of each pass: passes that a plain loop would not make would
    then give other keys. Rounds that could meet this draft nothing.

    Args:
        config: the stack's configuration.
        longest: the most columns that ids may have, if there is a bound.
    """

    def __init__(self, config: Any, longest: int | None) -> None:
        self.longest = longest
        self.switch, self.settles = _switch(config)

    def drafts(self, columns: int, cache: Any, mask: Tensor | None) -> int:
        """How many tokens may be drafted behind this many columns of ids; `mask` is [B, S]."""
        room = ANY if self.longest is None else self.longest - columns - 1
        if self.switch is not None:
            held = int(cache.get_seq_length()) + 1  # embeddings given as a prompt included
            shortest = held if mask is None or mask.ndim != 2 else int(mask.sum(-1).min())
            if not (self.settles and shortest > self.switch):
                room = min(room, self.switch - held)
        return max(room, 0)


def _switch(config: Any) -> tuple[int | None, bool]:
    """The length at which RoPE changes, and whether it stays as it is beyond."""
    found = getattr(config, "rope_parameters", None) or {}
    kinds = [one for one in found.values() if isinstance(one, dict)] or [found]
    for kind in kinds:
        name = kind.get("rope_type", "default")
        if name in ("longrope", "dynamic"):
            original = kind.get("original_max_position_embeddings")
            return int(original or config.max_position_embeddings), name == "longrope"
    return None, True
