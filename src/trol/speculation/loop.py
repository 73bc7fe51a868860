"""The decoding loop of speculation: draft on a fork of the cache, verify, keep what is accepted.

Rows of a batch gain different numbers of tokens in a round. The cache has one length, so all rows
advance by what the slowest one gained; what a faster row has verified beyond that is *known*, and
comes before its drafts in the next round. For rows that are finished, padding is known to follow.
"""

import copy
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from trol.depth import AbstractPolicy
from trol.depth.call import in_force, overrides_of
from trol.depth.planes import PlanedCache, fork_cache
from trol.errors import HostError
from trol.host import generation
from trol.host.cache import can_take_back, record_past
from trol.host.names import CACHE
from trol.speculation.acceptance import Drafts, Known, draft_budget, greedy, sampled


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
    """Drafted tokens that the model would have generated itself."""
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


@dataclass
class ForwardPasses:
    """The forward passes of one model in one `generate` call, prepared as transformers does."""

    model: Any
    kwargs: dict[str, Any]
    """What `generate` hands to its decoding loop beside the ids, the cache included."""
    outputs: Any = None
    """Those of the last pass."""

    @property
    def cache(self) -> Any:
        return self.kwargs.get(CACHE)

    def prompt(self, ids: Tensor, config: Any) -> Tensor:
        """The pass over the prompt. Gives the last token's logits. Shape: [B, 1, V]."""
        self.outputs = generation.prefill(self.model, ids, config, self.kwargs)
        return self._logits(1)

    def run(self, ids: Tensor, new: int, *, read: int | None = None) -> Tensor:
        """A pass over the last `new` of the ids [B, n]; `extend` keeps masks as long as the ids.

        Gives the logits of the last `read` (default: `new`) of them. Shape: [B, read, V].
        """
        read = new if read is None else read
        inputs = generation.next_pass(self.model, ids, new, self.kwargs)
        if generation.SLICES_LOGITS in inputs:
            inputs[generation.SLICES_LOGITS] = read
        self.outputs = self.model(**inputs, return_dict=True)
        return self._logits(read)

    def extend(self, tokens: int) -> None:
        """Makes masks and positions longer by `tokens` ids."""
        if tokens:
            self.kwargs = generation.extended(self.model, self.outputs, self.kwargs, tokens)

    def fork(self, *, planes: bool) -> "ForwardPasses":
        """The same passes on a cache of their own, which starts from what this one holds."""
        twin = copy.copy(self)
        cache = fork_cache(self.cache, planes=planes)
        _record_past(cache, on=False)  # nothing is cut off a fork
        twin.kwargs, twin.outputs = (
            {**self.kwargs, CACHE: cache},
            generation.with_cache(self.outputs, cache),
        )
        return twin

    def _logits(self, read: int) -> Tensor:
        logits = self.outputs.logits[:, -read:].to(torch.float32, copy=True)
        self.outputs.logits = logits  # not all those of a long prompt
        return logits


def check_cache(cache: Any) -> None:
    """Raises `HostError` where tokens cannot be cut off this cache again."""
    layers = getattr(cache, "layers", None)
    if layers is None or cache.offloading or not all(can_take_back(layer) for layer in layers):
        raise HostError(
            f"drafted tokens cannot be cut off this {type(cache).__name__} (static, quantised and "
            "offloaded caches stay as they are); use the dynamic cache, which is the default."
        )


def _record_past(cache: Any, *, on: bool) -> None:
    """Has sliding windows keep what a crop may need again, or no longer."""
    planes = cache.planes.values() if isinstance(cache, PlanedCache) else ()
    record_past(cache, (*cache.layers, *planes), on=on)


@contextmanager
def with_policy(stack: Any, policy: AbstractPolicy) -> Generator[None]:
    """Puts `policy` in force inside a block of `attachment.decoding`, without its checks."""
    assert stack.depth_blocks  # or the stack would not look
    with in_force(stack, replace(overrides_of(stack), policy=policy)):
        yield


@dataclass
class Loop:
    """One `generate` call: `run` decodes until every row is finished."""

    passes: ForwardPasses
    """Those of the model's own policy."""
    stack: Any
    stats: Speculation
    processor: Any
    criteria: Any
    config: Any
    streamer: Any
    ids: Tensor
    """The prompt and all tokens given so far. Shape: [B, n]; the cache holds n - 1 of them."""

    def __post_init__(self) -> None:
        rows, device = len(self.ids), self.ids.device
        self.draft_processor = type(self.processor)(filter(generation.is_stateless, self.processor))
        self.in_order = len(self.draft_processor) < len(self.processor)
        self.accept = sampled if self.config.do_sample else greedy
        # As transformers' own loop: without an end token, finished rows go on until all are.
        self.pads = generation.stops_at_tokens(self.criteria)
        self.records = self.config.return_dict_in_generate
        self.scores: list[Tensor] = []
        self.logits: list[Tensor] = []
        # Whether drafts read more of a cache than its first keys and values.
        draft, layers = self.stats.draft, range(self.stack.depth_layers)
        repeats = any(draft.bounds(layer).most > 1 for layer in layers)
        holes = draft.skipped_kv == "hole"
        self.fork_planes = repeats or holes or draft.reads_start or draft.observes
        # Tokens [B, any] verified behind the ids, as many of each row as its lead.
        self.ahead, self.lead = self.ids[:, :0], [0] * rows
        self.unfinished = torch.ones(rows, dtype=torch.bool, device=device)
        self.active, self.over = [True] * rows, False

    def run(self) -> None:
        """Decodes until every row is finished."""
        ids = self.ids
        logits = self.passes.prompt(ids, self.config)
        check_cache(self.passes.cache)
        self._keep(logits, Drafts(ids[:, :0]), self._known(1))
        try:
            while not self.over:
                self._round()
        finally:
            _record_past(self.passes.cache, on=False)

    def _round(self) -> None:
        known, drafts = self._draft()
        columns = drafts.tokens.shape[1] + 1
        _record_past(self.passes.cache, on=True)
        verifying = copy.copy(self.passes)
        verifying.extend(columns - 1)
        logits = verifying.run(torch.cat([self.ids, drafts.tokens], 1), columns)
        self.passes.outputs = verifying.outputs
        kept = self._keep(logits, drafts, known)
        self.passes.cache.crop(kept - columns)
        self.stats.rounds += 1
        self.stats.steps += kept

    def _draft(self) -> tuple[Known, Drafts]:
        """Drafts behind what each row knows, by passes of the draft's policy."""
        passes, confidence = self.passes, self.stats.confidence
        mask, longest = passes.kwargs.get("attention_mask"), self.criteria.max_length
        columns = self.ids.shape[1]
        budget = draft_budget(self.stack.config, longest, columns, passes.cache, mask)
        most, leads = min(self.stats.tokens, budget), self._of_active(self.lead)
        least, furthest = min([*leads, most]), min(max(leads), most)
        known = self._known(most + 1)
        tokens, chances = known.tokens[:, :least], []
        if least < most:
            passes = passes.fork(planes=self.fork_planes)
            passes.extend(least)
        sure = torch.ones_like(self.unfinished)
        with with_policy(self.stack, self.stats.draft):
            while tokens.shape[1] < most:
                ids = torch.cat([self.ids, tokens], 1)
                new = least + 1 if tokens.shape[1] == least else 1
                logits = passes.run(ids, new, read=1)[:, 0]
                passes.extend(1)
                scores = self.draft_processor(ids, logits)
                if self.config.do_sample:
                    chances.append(scores.softmax(-1))
                    token = torch.multinomial(chances[-1], 1)
                else:
                    token = scores.argmax(-1, keepdim=True)
                tokens = known.over(torch.cat([tokens, token], 1))
                if confidence is None:
                    continue
                sure &= logits.softmax(-1).amax(-1) >= confidence
                if tokens.shape[1] >= furthest and not any(self._of_active(sure.tolist())):
                    break
        drafted = tokens.shape[1]
        self.stats.drafted += sum(max(drafted - lead, 0) for lead in leads)
        known = known.columns(0, drafted + 1)
        if not chances:
            return known, Drafts(tokens)
        nothing = torch.zeros_like(chances[0])  # never read: all rows know these tokens
        return known, Drafts(tokens, torch.stack([nothing] * least + chances, 1))

    def _known(self, columns: int) -> Known:
        """What is known of the next `columns` tokens."""
        ahead = self.ahead[:, :columns]
        tokens = torch.nn.functional.pad(ahead, (0, columns - ahead.shape[1]))
        lead = torch.tensor(self.lead, device=tokens.device)
        certain = torch.arange(columns, device=tokens.device) < lead[:, None]
        if not all(self.active):
            done = ~torch.tensor(self.active, device=tokens.device)[:, None]
            padding = generation.padding_token(self.config).to(tokens.device)
            tokens, certain = torch.where(done, padding, tokens), certain | done
        return Known(tokens, certain)

    def _keep(self, logits: Tensor, drafts: Drafts, known: Known) -> int:
        """Adds the tokens that all rows have now to the ids; gives how many."""
        raw = logits.clone() if self.records else logits
        keep = self._keep_in_order if self.in_order else self._keep_at_once
        kept = keep(logits, raw, drafts, known)
        self.passes.extend(kept)
        return kept

    def _keep_at_once(self, logits: Tensor, raw: Tensor, drafts: Drafts, known: Known) -> int:
        ids, length = torch.cat([self.ids, drafts.tokens], 1), self.ids.shape[1]
        each = range(logits.shape[1])
        scores = torch.stack([self.processor(ids[:, : length + j], logits[:, j]) for j in each], 1)
        tokens, accepted = self.accept(scores, drafts, known)
        gained = [count + 1 for count in accepted.tolist()]
        pairs = self._of_active(zip(gained, self.lead, strict=True))
        self.stats.accepted += sum(max(n - 1 - lead, 0) for n, lead in pairs)
        kept = 0
        for kept in range(1, min(self._of_active(gained)) + 1):
            if self._give(tokens[:, kept - 1], scores[:, kept - 1], raw[:, kept - 1]):
                break
        self.ahead = tokens[:, kept:]
        self.lead = [n - kept for n in gained]
        return kept

    def _keep_in_order(self, logits: Tensor, raw: Tensor, drafts: Drafts, known: Known) -> int:
        """Processors with a state see no token that is rejected, and none twice."""
        kept, right, waits = 0, True, False
        while kept < logits.shape[1] and right and not waits:
            scores = self.processor(self.ids, logits[:, kept])
            draft = drafts.column(kept)
            both = scores[:, None].repeat(1, 1 + draft.tokens.shape[1], 1)
            tokens, accepted = self.accept(both, draft, known.columns(kept, both.shape[1]))
            counts = self._of_active(accepted.tolist())
            right = all(counts)
            self.stats.accepted += sum(counts)
            waits = self._give(tokens[:, 0], scores, raw[:, kept])
            kept += 1
        return kept

    def _give(self, tokens: Tensor, scores: Tensor, logits: Tensor) -> bool:
        """Gives one token of each row [B]; whether the others of this round must wait."""
        if self.records:
            self.scores.append(scores)
            self.logits.append(logits)
        self.ids = torch.cat([self.ids, tokens[:, None]], 1)
        # As transformers' own loop: criteria see the scores only where they are returned.
        shown = tuple(self.scores) if self.records and self.config.output_scores else None
        self.unfinished = self.unfinished & ~self.criteria(self.ids, shown)
        if self.streamer is not None:
            self.streamer.put(tokens.cpu())
        unfinished = self.unfinished.tolist()
        self.over = not any(unfinished)
        # A row that just finished was verified with drafts behind its end, where padding belongs.
        ended = self.pads and unfinished != self.active
        if self.pads and not self.over:
            self.active = unfinished
        return self.over or ended

    def _of_active(self, values: Iterable[Any]) -> list[Any]:
        """The values of the rows that are not finished; `values` has one for each row."""
        return [value for value, on in zip(values, self.active, strict=True) if on]
