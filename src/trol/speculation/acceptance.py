"""Which drafted tokens stand: the same token in greedy decoding, a fair coin in sampling.

How many tokens a round may draft without leaving the text's length or crossing a RoPE switch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Drafts:
    """Tokens that were guessed, and with which probabilities."""

    tokens: Tensor
    """Shape: [B, k]."""
    chances: Tensor | None = None
    """The draft's distribution at each of them, in sampling. Shape: [B, k, V]."""

    def column(self, number: int) -> Drafts:
        """Draft `number` alone, or none behind the last."""
        here = slice(number, number + 1)
        return Drafts(self.tokens[:, here], None if self.chances is None else self.chances[:, here])


@dataclass(frozen=True)
class Known:
    """Tokens that are verified already in rows that are ahead of the others."""

    tokens: Tensor
    """Shape: [B, k + 1]."""
    certain: Tensor
    """Where one is known: from the left, without gaps. Shape: [B, k + 1]."""

    def over(self, others: Tensor) -> Tensor:
        """The tokens known, and `others` [B, j <= k + 1] where none is."""
        mine = self.first(others.shape[1])
        return torch.where(mine.certain, mine.tokens, others)

    def first(self, columns: int) -> Known:
        """Of the first columns only."""
        return self.columns(0, columns)

    def columns(self, start: int, count: int) -> Known:
        """Of `count` columns from `start` on; behind the last one nothing is known."""
        more = max(start + count - self.tokens.shape[1], 0)
        tokens, certain = (
            torch.nn.functional.pad(all_of, (0, more))[:, start : start + count]
            for all_of in (self.tokens, self.certain)
        )
        return Known(tokens, certain)


def greedy(scores: Tensor, drafts: Drafts, known: Known) -> tuple[Tensor, Tensor]:
    """The best tokens [B, k + 1], and how many drafts of each row are among them [B].

    Tokens beyond the first wrong draft + 1 follow a wrong prefix. Shape of scores: [B, k + 1, V].
    """
    tokens = known.over(scores.argmax(-1))
    return tokens, _leading(tokens[:, :-1] == drafts.tokens)


def sampled(scores: Tensor, drafts: Drafts, known: Known) -> tuple[Tensor, Tensor]:
    """Tokens [B, k + 1] of the distribution p = softmax(scores), and the drafts kept [B].

        draft x ~ q stands with probability min(1, p(x) / q(x)); in place of the first that falls,
        one is drawn from max(p - q, 0), scaled to 1; behind the last one, from p.

    Algorithm 1 of https://arxiv.org/abs/2211.17192. Shape of scores: [B, k + 1, V].
    """
    p = scores.softmax(-1)
    rows, columns, vocabulary = p.shape
    q = torch.zeros_like(p)
    if drafts.chances is not None:
        q[:, : columns - 1] = drafts.chances
    at = drafts.tokens[..., None]
    p_of, q_of = p[:, :-1].gather(-1, at)[..., 0], q[:, :-1].gather(-1, at)[..., 0]
    stands = torch.rand_like(p_of) * q_of < p_of
    kept = _leading(stands | known.certain[:, :-1])
    here = kept[:, None, None].expand(rows, 1, vocabulary)
    p_here, q_here = p.gather(1, here)[:, 0], q.gather(1, here)[:, 0]
    left = (p_here - q_here).clamp_min(0)
    # Where rounding leaves nothing, p and q are equal and nothing can have fallen.
    left = torch.where(left.sum(-1, keepdim=True) > 0, left, p_here)
    drawn = torch.multinomial(left, 1)
    padded = torch.nn.functional.pad(drafts.tokens, (0, 1))
    return known.over(padded.scatter(1, kept[:, None], drawn)), kept


def _leading(right: Tensor) -> Tensor:
    """How many columns of each row are True before the first that is not. [B, k] -> [B]."""
    return right.long().cumprod(1).sum(1)


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
