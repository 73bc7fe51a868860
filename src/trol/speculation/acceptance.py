"""How many tokens a round may draft, and which of them are accepted.

Greedy decoding accepts a draft that is the model's best token; sampling accepts it with the
probability that leaves the model's distribution unchanged.
"""

import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Drafts:
    """Drafted tokens, and the probabilities by which they were drawn."""

    tokens: Tensor
    """Shape: [B, k]."""
    chances: Tensor | None = None
    """The draft's distribution at each of them, in sampling. Shape: [B, k, V]."""

    def column(self, number: int) -> "Drafts":
        """Draft `number` alone; no draft if `number` is past the last."""
        here = slice(number, number + 1)
        return Drafts(self.tokens[:, here], None if self.chances is None else self.chances[:, here])


@dataclass(frozen=True)
class Known:
    """Tokens that are verified already, in rows that are ahead of the others."""

    tokens: Tensor
    """Shape: [B, k + 1]."""
    certain: Tensor
    """Where one is known: from the left, without gaps. Shape: [B, k + 1]."""

    def over(self, others: Tensor) -> Tensor:
        """The known tokens, and `others` [B, j <= k + 1] where none is known."""
        here = self.columns(0, others.shape[1])
        return torch.where(here.certain, here.tokens, others)

    def columns(self, start: int, count: int) -> "Known":
        """`count` columns from `start` on; nothing is known of those past the last."""
        more = max(start + count - self.tokens.shape[1], 0)
        tokens, certain = (
            torch.nn.functional.pad(values, (0, more))[:, start : start + count]
            for values in (self.tokens, self.certain)
        )
        return Known(tokens, certain)


def greedy(scores: Tensor, drafts: Drafts, known: Known) -> tuple[Tensor, Tensor]:
    """The best tokens [B, k + 1], and how many drafts of each row are accepted [B].

    Tokens beyond the first wrong draft + 1 follow a wrong prefix. Shape of scores: [B, k + 1, V].
    """
    tokens = known.over(scores.argmax(-1))
    return tokens, _leading(tokens[:, :-1] == drafts.tokens)


def sampled(scores: Tensor, drafts: Drafts, known: Known) -> tuple[Tensor, Tensor]:
    """Tokens [B, k + 1] of the distribution p = softmax(scores), and the drafts accepted [B].

        draft x ~ q is accepted with probability min(1, p(x) / q(x)); in place of the first that is
        rejected, one is drawn from max(p - q, 0), scaled to 1; behind the last one, from p.

    Algorithm 1 of https://arxiv.org/abs/2211.17192. Shape of scores: [B, k + 1, V].
    """
    p = scores.softmax(-1)
    rows, columns, vocabulary = p.shape
    q = torch.zeros_like(p)
    if drafts.chances is not None:
        q[:, : columns - 1] = drafts.chances
    at = drafts.tokens[..., None]
    p_of, q_of = p[:, :-1].gather(-1, at)[..., 0], q[:, :-1].gather(-1, at)[..., 0]
    right = torch.rand_like(p_of) * q_of < p_of
    accepted = _leading(right | known.certain[:, :-1])
    here = accepted[:, None, None].expand(rows, 1, vocabulary)
    p_here, q_here = p.gather(1, here)[:, 0], q.gather(1, here)[:, 0]
    left = (p_here - q_here).clamp_min(0)
    # Where rounding leaves nothing, p and q are equal and no draft can have been rejected.
    left = torch.where(left.sum(-1, keepdim=True) > 0, left, p_here)
    drawn = torch.multinomial(left, 1)
    padded = torch.nn.functional.pad(drafts.tokens, (0, 1))
    return known.over(padded.scatter(1, accepted[:, None], drawn)), accepted


def _leading(right: Tensor) -> Tensor:
    """How many columns of each row are True before the first that is not. [B, k] -> [B]."""
    return right.long().cumprod(1).sum(1)


def draft_budget(
    config: Any, longest: int | None, columns: int, cache: Any, mask: Tensor | None
) -> int:
    """How many tokens may be drafted behind `columns` columns of ids.

    `longrope` rotates all keys anew where a row outgrows the original length, and `dynamic` RoPE
    rotates by the longest position of each pass: passes that a plain loop would not make would
    then give other keys. Rounds that could meet this draft nothing. `longest`: the most columns
    that ids may have. `mask`: the attention mask [B, S].
    """
    budget = sys.maxsize if longest is None else longest - columns - 1
    switch, settles = _rope_switch(config)
    if switch is not None:
        held = int(cache.get_seq_length()) + 1  # embeddings given as a prompt included
        shortest = held if mask is None or mask.ndim != 2 else int(mask.sum(-1).min())
        if not (settles and shortest > switch):
            budget = min(budget, switch - held)
    return max(budget, 0)


def _rope_switch(config: Any) -> tuple[int | None, bool]:
    """The length at which RoPE changes, and whether it stays as it is beyond."""
    parameters = getattr(config, "rope_parameters", None) or {}
    by_kind = [one for one in parameters.values() if isinstance(one, dict)]  # one per layer type
    for rope in by_kind or [parameters]:
        name = rope.get("rope_type", "default")
        if name in ("longrope", "dynamic"):
            original = rope.get("original_max_position_embeddings")
            return int(original or config.max_position_embeddings), name == "longrope"
    return None, True
