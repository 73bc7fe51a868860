"""`with trol.speculate(model, draft)`: what is asked for, and what it came to."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from trol.depth import AbstractPolicy, PolicyLike
from trol.depth.attachment import decoding
from trol.depth.policy import check_share, resolve
from trol.errors import UsageError
from trol.host.layers import find_decoder
from trol.speculation.loop import decode
from trol.speculation.refusals import check_arguments, check_draft, check_stack


@dataclass
class Speculation:
    """A draft, how far it may run ahead, and what came of it in all `generate` calls so far."""

    draft: AbstractPolicy
    """The policy in force while drafting."""
    tokens: int
    """The most tokens drafted before they are verified."""
    confidence: float | None = None
    """Drafting ends early once the draft's greatest probability is below this in every row."""
    rounds: int = 0
    """Verifying passes of the model's own policy; the pass over the prompt is not counted."""
    drafted: int = 0
    """Tokens drafted, of all rows that were not finished."""
    accepted: int = 0
    """Drafted tokens that the model would have said itself."""
    steps: int = 0
    """Tokens that `generate` gave in these rounds, counted once for the whole batch."""

    @property
    def acceptance(self) -> float:
        """accepted / drafted, in [0, 1]; 0 where nothing was drafted."""
        return self.accepted / self.drafted if self.drafted else 0.0

    @property
    def tokens_per_round(self) -> float:
        """Tokens that each row gained by one verifying pass; 1 without speculation."""
        return self.steps / self.rounds if self.rounds else 0.0


@contextmanager
def speculate(
    model: nn.Module,
    draft: PolicyLike = "exit@4",
    *,
    tokens: int = 4,
    confidence: float | None = None,
) -> Generator[Speculation]:
    """Has `generate` draft with another policy of the same model and verify with its own.

    A round drafts k tokens, one after another, on a fork of the cache, so that they attend to the
    model's own keys and values of all that is verified. One pass over these k tokens then tells
    how many a of them the model would have said, and the next one as well: a + 1 tokens. Greedy
    tokens are those of plain `generate`, up to the rounding of equal logits; sampled ones are of
    the same distribution (https://arxiv.org/abs/2211.17192, algorithm 1; drafting by skipping
    layers: https://arxiv.org/abs/2309.08168). In a batch all rows go on by what the slowest row
    gained, and the others keep what they have verified. RoPE that changes with the length is left
    to plain steps where a round could cross its switch, and `dynamic` RoPE beyond it.

    Args:
        model: a model, plain or attached; what it carries is its own policy.
        draft: plan text, a plan, a policy or the name of one.
        tokens: k, at least 1.
        confidence: ends a draft early, in [0, 1); None for always k tokens.

    Yields:
        The figures of all `generate` calls of this thread inside the block.

    Raises:
        UsageError: the draft does not fit, or `tokens` or `confidence` is out of range; from
            `generate`: beams, or something else that cannot be drafted.
        HostError: the model keeps a recurrent state; from `generate`: a cache that cannot be cut.
    """
    if not isinstance(tokens, int) or tokens < 1:
        raise UsageError(
            f"tokens is {tokens!r}; draft a whole number, at least 1, before each verifying pass."
        )
    if confidence is not None:
        check_share("confidence", confidence)
    spoken = Speculation(resolve(draft), tokens, confidence)
    with decoding(model, partial(_with_loop, spoken), spoken.draft):
        check_stack(find_decoder(model))
        yield spoken


def _with_loop(spoken: Speculation, host: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of `generate` with the drafting loop among them."""
    stack = find_decoder(host)
    check_arguments(host, kwargs)
    check_draft(stack, spoken.draft)
    loop = partial(decode, stack=stack, spoken=spoken, streamer=kwargs.get("streamer"))
    return {**kwargs, "custom_generate": loop}
