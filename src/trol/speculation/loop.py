"""The decoding loop of speculation: draft on a fork of the cache, verify, keep what stands.

Rows of a batch gain different numbers of tokens in a round. The cache has one length, so all go
on by what the slowest row gained; what a faster row has verified beyond it is *known*, and comes
before its drafts in the next round. Rows that are finished know that padding follows.

Passes of a model inside a decoding loop, prepared as transformers prepares its own.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from trol.depth import AbstractPolicy
from trol.depth.call import ambience_of, in_force
from trol.depth.planes import PlanedCache, forked
from trol.host.cache import record_past
from trol.host.generation import (
    SLICES_LOGITS,
    decoding,
    extended,
    generate_output,
    is_stateless,
    next_pass,
    padding_token,
    prefill,
    stops_at_tokens,
    with_cache,
)
from trol.host.names import CACHE, cache_among
from trol.speculation.acceptance import Drafts, Known, Room, greedy, sampled
from trol.speculation.refusals import check_cache, check_config

if TYPE_CHECKING:
    from trol.speculation.speculate import Speculation


class Passes:
    """One model in one `generate` call: its keyword arguments, as long as its tokens are.

    Args:
        model: the host.
        kwargs: what `generate` hands to its decoding loop beside the ids, the cache included.
    """

    def __init__(self, model: Any, kwargs: dict[str, Any]) -> None:
        self.model, self.kwargs = model, kwargs
        self.outputs: Any = None

    @property
    def cache(self) -> Any:
        return self.kwargs.get(CACHE)

    def prompt(self, ids: Tensor, config: Any) -> Tensor:
        """The pass over the prompt. Gives the last token's logits. Shape: [B, 1, V]."""
        self.outputs = prefill(self.model, ids, config, self.kwargs)
        return self._logits(1)

    def over(self, ids: Tensor, new: int, *, read: int | None = None) -> Tensor:
        """A pass over the last `new` of the ids [B, n]; `over` and `grow` keep n in step.

        Gives the logits of the last `read` (default: `new`) of them. Shape: [B, read, V].
        """
        read = new if read is None else read
        inputs = next_pass(self.model, ids, new, self.kwargs)
        if SLICES_LOGITS in inputs:
            inputs[SLICES_LOGITS] = read
        self.outputs = self.model(**inputs, return_dict=True)
        return self._logits(read)

    def grow(self, tokens: int) -> None:
        """Tells masks and positions that there are `tokens` more ids."""
        if tokens:
            self.kwargs = extended(self.model, self.outputs, self.kwargs, tokens)

    def fork(self, *, planes: bool) -> Passes:
        """The same passes on a cache of their own, which starts from what this one holds."""
        twin = Passes(self.model, dict(self.kwargs))
        cache = twin.kwargs[CACHE] = forked(self.cache, planes=planes)
        recording(cache, on=False)  # nothing is cut off a fork
        twin.outputs = with_cache(self.outputs, twin.cache)
        return twin

    def _logits(self, read: int) -> Tensor:
        logits = self.outputs.logits[:, -read:].to(torch.float32, copy=True)
        self.outputs.logits = logits  # not all those of a long prompt
        return logits


def recording(cache: Any, *, on: bool) -> None:
    """Has sliding windows keep what a crop may need again, or no longer."""
    planes = cache.planes.values() if isinstance(cache, PlanedCache) else ()
    record_past(cache, (*cache.layers, *planes), on=on)


@contextmanager
def under(stack: Any, policy: AbstractPolicy) -> Generator[None]:
    """Puts `policy` in force inside a block of `attachment.decoding`, without its checks."""
    assert stack.depth_ambiences  # or the stack would not look
    with in_force(stack, replace(ambience_of(stack), policy=policy)):
        yield


def reads_planes(policy: AbstractPolicy, layers: int) -> bool:
    """Whether a policy looks at more of a cache than its first keys and values."""
    deep = any(policy.bounds(layer).most > 1 for layer in range(layers))
    return deep or policy.reads_start or policy.observes or policy.skipped_kv == "hole"


def decode(
    model: Any,
    input_ids: Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    *,
    stack: Any,
    spoken: Speculation,
    streamer: Any = None,
    **model_kwargs: Any,
) -> Any:
    """What `generate` gives, in fewer passes: a `custom_generate` of transformers.

    Raises:
        UsageError, HostError: drafts cannot be verified here; before anything has run.
    """
    check_config(generation_config, model_kwargs, logits_processor)
    check_cache(cache_among(model_kwargs))
    passes = Passes(model, model_kwargs)
    asked = _Asked(logits_processor, stopping_criteria, generation_config, streamer)
    loop = _Loop(passes, stack, spoken, asked)
    with decoding(model):
        loop.run(input_ids)
    if streamer is not None:
        streamer.end()
    if not generation_config.return_dict_in_generate:
        return loop.ids
    asked_for: dict[str, Any] = {
        "scores": tuple(loop.scores) if generation_config.output_scores else None,
        "logits": tuple(loop.logits) if generation_config.output_logits else None,
    }
    return generate_output(loop.ids, loop.passes.cache, **asked_for)


@dataclass(frozen=True)
class _Asked:
    """What `generate` prepares for whoever decodes."""

    processor: Any
    criteria: Any
    config: Any
    streamer: Any


class _Loop:
    """One `generate` call."""

    ids: Tensor
    """The prompt and all tokens given so far. Shape: [B, n]; the cache holds n - 1 of them."""
    ahead: Tensor
    """Tokens verified behind those, as many of each row as `lead` says. Shape: [B, any]."""

    def __init__(self, passes: Passes, stack: Any, spoken: Speculation, asked: _Asked) -> None:
        self.passes, self.stack, self.spoken = passes, stack, spoken
        self.processor, self.criteria = asked.processor, asked.criteria
        self.drafter = type(asked.processor)(filter(is_stateless, asked.processor))
        self.in_order = len(self.drafter) < len(asked.processor)
        self.config, self.streamer = asked.config, asked.streamer
        config, criteria = asked.config, asked.criteria
        self.verdict = sampled if config.do_sample else greedy
        # As transformers' own loop: without an end token, finished rows go on until all are.
        self.pads = stops_at_tokens(criteria)
        self.records = config.return_dict_in_generate
        self.scores: list[Tensor] = []
        self.logits: list[Tensor] = []
        self.room = Room(stack.config, criteria.max_length)
        self.deep = reads_planes(spoken.draft, stack.depth_layers)

    def run(self, ids: Tensor) -> None:
        """Decodes until every row is finished."""
        self.ids, self.ahead = ids, ids[:, :0]
        self.unfinished = torch.ones(len(ids), dtype=torch.bool, device=ids.device)
        self.active = [True] * len(ids)
        self.lead = [0] * len(ids)
        self.over = False
        logits = self.passes.prompt(ids, self.config)
        check_cache(self.passes.cache)
        self._keep(logits, Drafts(ids[:, :0]), self._known(1))
        try:
            while not self.over:
                self._round()
        finally:
            recording(self.passes.cache, on=False)

    def _round(self) -> None:
        known, drafts = self._draft()
        columns = drafts.tokens.shape[1] + 1
        ids = torch.cat([self.ids, drafts.tokens], 1)
        cache = self.passes.cache
        recording(cache, on=True)
        verifying = Passes(self.passes.model, self.passes.kwargs)
        verifying.outputs = self.passes.outputs
        verifying.grow(columns - 1)
        logits = verifying.over(ids, columns)
        self.passes.outputs = verifying.outputs
        kept = self._keep(logits, drafts, known)
        self.passes.cache.crop(kept - columns)
        self.spoken.rounds += 1
        self.spoken.steps += kept

    def _draft(self) -> tuple[Known, Drafts]:
        """Guesses behind what each row knows, by passes of the draft's policy."""
        lengths = self.passes.kwargs.get("attention_mask")
        room = self.room.drafts(self.ids.shape[1], self.passes.cache, lengths)
        most = min(self.spoken.tokens, room)
        leads = [lead for lead, on in zip(self.lead, self.active, strict=True) if on]
        least, longest = min([*leads, most]), min(max(leads), most)
        known = self._known(most + 1)
        tokens, chances = known.tokens[:, :least], []
        passes = self.passes
        if least < most:
            passes = passes.fork(planes=self.deep)
            passes.grow(least)
        sure = torch.ones_like(self.unfinished)
        with under(self.stack, self.spoken.draft):
            while tokens.shape[1] < most:
                ids = torch.cat([self.ids, tokens], 1)
                logits = passes.over(ids, 1 if chances else least + 1, read=1)[:, 0]
                passes.grow(1)
                token, chance = self._guess(ids, logits)
                chances.append(chance)
                tokens = known.over(torch.cat([tokens, token], 1))
                sure &= self._is_sure(logits)
                if tokens.shape[1] >= longest and self._all_unsure(sure):
                    break
        self._count_drafted(tokens.shape[1])
        return known.first(tokens.shape[1] + 1), Drafts(tokens, _stacked(chances, least))

    def _guess(self, ids: Tensor, logits: Tensor) -> tuple[Tensor, Tensor | None]:
        """The draft's next tokens [B, 1], and their distribution [B, V] in sampling."""
        scores = self.drafter(ids, logits)
        if not self.config.do_sample:
            return scores.argmax(-1, keepdim=True), None
        chances = scores.softmax(-1)
        return torch.multinomial(chances, 1), chances

    def _is_sure(self, logits: Tensor) -> Tensor:
        if self.spoken.confidence is None:
            return torch.ones_like(self.unfinished)
        return logits.softmax(-1).amax(-1) >= self.spoken.confidence

    def _all_unsure(self, sure: Tensor) -> bool:
        if self.spoken.confidence is None:
            return False
        return not any(a and s for a, s in zip(self.active, sure.tolist(), strict=True))

    def _known(self, columns: int) -> Known:
        """What is known of the next `columns` tokens."""
        ahead = self.ahead[:, :columns]
        tokens = torch.nn.functional.pad(ahead, (0, columns - ahead.shape[1]))
        lead = torch.tensor(self.lead, device=tokens.device)
        certain = torch.arange(columns, device=tokens.device) < lead[:, None]
        if not all(self.active):
            done = ~torch.tensor(self.active, device=tokens.device)[:, None]
            padding = padding_token(self.config).to(tokens.device)
            tokens, certain = torch.where(done, padding, tokens), certain | done
        return Known(tokens, certain)

    def _keep(self, logits: Tensor, drafts: Drafts, known: Known) -> int:
        """Adds the tokens that all rows have now to the ids; gives how many."""
        if self.in_order:
            return self._keep_in_order(logits, drafts, known)
        columns = logits.shape[1]
        ids = torch.cat([self.ids, drafts.tokens], 1)
        length = self.ids.shape[1]
        raw = logits.clone() if self.records else logits
        scores = torch.stack(
            [self.processor(ids[:, : length + j], logits[:, j]) for j in range(columns)], 1
        )
        tokens, right = self.verdict(scores, drafts, known)
        gained = [count + 1 for count in right.tolist()]
        self._count_accepted(gained)
        kept, slowest = 0, min(n for n, on in zip(gained, self.active, strict=True) if on)
        while kept < slowest:
            if self.records:
                self.scores.append(scores[:, kept])
                self.logits.append(raw[:, kept])
            kept += 1
            if self._give(tokens[:, kept - 1]):
                break
        self.ahead = tokens[:, kept:]
        self.lead = [n - kept for n in gained]
        self.passes.grow(kept)
        return kept

    def _keep_in_order(self, logits: Tensor, drafts: Drafts, known: Known) -> int:
        """As `_keep`; but processors see no token that does not stand, and none twice."""
        raw = logits.clone() if self.records else logits
        kept, wrong = 0, False
        while kept < logits.shape[1] and not wrong:
            scores = self.processor(self.ids, logits[:, kept])
            if self.records:
                self.scores.append(scores)
                self.logits.append(raw[:, kept])
            draft = drafts.column(kept)
            both = scores[:, None].repeat(1, 1 + draft.tokens.shape[1], 1)
            tokens, right = self.verdict(both, draft, known.columns(kept, both.shape[1]))
            rights = right.tolist()
            stood = sum(on and bool(n) for n, on in zip(rights, self.active, strict=True))
            wrong = not all(n for n, on in zip(rights, self.active, strict=True) if on)
            self.spoken.accepted += stood
            kept += 1
            if self._give(tokens[:, 0]):
                break
        self.passes.grow(kept)
        return kept

    def _give(self, tokens: Tensor) -> bool:
        """Gives one token of each row [B]; whether the others of this round must wait."""
        self.ids = torch.cat([self.ids, tokens[:, None]], 1)
        # As transformers' own loop: criteria see the scores only where they are returned.
        scores = tuple(self.scores) if self.records and self.config.output_scores else None
        self.unfinished = self.unfinished & ~self.criteria(self.ids, scores)
        if self.streamer is not None:
            self.streamer.put(tokens.cpu())
        unfinished = self.unfinished.tolist()
        self.over = not any(unfinished)
        # A row that just finished was verified with drafts behind its end, where padding belongs.
        ended = self.pads and unfinished != self.active
        if self.pads and not self.over:
            self.active = unfinished
        return self.over or ended

    def _count_drafted(self, tokens: int) -> None:
        for lead, on in zip(self.lead, self.active, strict=True):
            self.spoken.drafted += max(tokens - lead, 0) if on else 0

    def _count_accepted(self, gained: list[int]) -> None:
        for n, lead, on in zip(gained, self.lead, self.active, strict=True):
            self.spoken.accepted += max(n - 1 - lead, 0) if on else 0


def _stacked(chances: list[Tensor | None], before: int) -> Tensor | None:
    """One distribution for each draft; of tokens known to all rows nobody asks. [B, k, V]."""
    some = [one for one in chances if one is not None]
    if not some:
        return None
    return torch.stack([torch.zeros_like(some[0])] * before + some, 1)
