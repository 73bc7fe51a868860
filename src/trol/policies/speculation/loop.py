"""The decoding loop of speculation: draft on a fork of the cache, verify, keep what stands.

Rows of a batch gain different numbers of tokens in a round. The cache has one length, so all go
on by what the slowest row gained; what a faster row has verified beyond it is *known*, and comes
before its drafts in the next round. Rows that are finished know that padding follows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from trol.host.generation import (
    decoded,
    decoding,
    is_stateless,
    padding_token,
    stops_at_tokens,
)
from trol.host.names import cache_among
from trol.policies.speculation.passes import Passes, reads_planes, recording, under
from trol.policies.speculation.refusals import check_cache, check_config
from trol.policies.speculation.room import Room
from trol.policies.speculation.verdict import Drafts, Known, greedy, sampled

if TYPE_CHECKING:
    from trol.policies.speculation.speculate import Speculation


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
    return decoded(loop.ids, loop.passes.cache, **asked_for)


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
