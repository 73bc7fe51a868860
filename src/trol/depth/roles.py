"""Roles: which tokens are question and which are answer, and what a policy may know of a call.

`Prompt` lasts for one `generate` and gives the `Roles` of each forward pass in it; `Context` is
what a policy may ask about the tokens of one pass: their scope, position, padding and logits.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from jaxtyping import Integer, Shaped
from torch import Tensor

from trol.axes import Logits, States, TokenIds, TokenMask
from trol.errors import HostError, UsageError, unknown

Scope = Literal["question", "answer", "all"]
"""The roles a policy applies to; all other tokens pass as in the plain model."""

Mask = bool | TokenMask
"""One truth for all tokens of a call, known without looking at the device, or BoolTensor [B, T]."""

IGNORED_LABEL = -100


def check_scope(scope: str) -> None:
    """Raises `UsageError` unless `scope` is question, answer or all."""
    if scope not in get_args(Scope):
        raise unknown("scope", scope, get_args(Scope))


@dataclass(frozen=True)
class Roles:
    """The roles of the B x T tokens of one call.

    What the user, the system and the template say is *question*; what the assistant says is
    *answer*. A forward pass that is told nothing holds questions only, outside `generate`.
    """

    answer: Mask = False
    """Where the answer is. Shape: [B, T]."""

    def in_scope(self, scope: Scope) -> Mask:
        """Where a policy of this scope applies. Shape: [B, T]."""
        if scope == "all":
            return True
        if isinstance(self.answer, bool):
            return self.answer == (scope == "answer")
        return self.answer if scope == "answer" else ~self.answer

    def behind(self, more: int) -> "Roles":
        """The same roles behind `more` tokens of question, such as PEFT's virtual ones."""
        if more <= 0 or not isinstance(self.answer, Tensor):
            return self
        return Roles(torch.nn.functional.pad(self.answer, (more, 0)))

    @classmethod
    def of_labels(cls, labels: TokenIds) -> "Roles":
        """Training labels [B, T]: what the loss looks at is answer."""
        return cls(labels != IGNORED_LABEL)

    @classmethod
    def of_assistant_masks(cls, masks: Shaped[Tensor, "B T"]) -> "Roles":
        """A chat template's `assistant_masks` [B, T]: 1 where the assistant speaks."""
        return cls(masks.bool())


@dataclass
class Prompt:
    """What `generate` was given: columns before `length` are the prompt, all later ones answer."""

    length: int
    """Columns of the prompt, padding included. Unit: tokens."""
    columns: int
    """Columns that are there when `generate` starts: more than the prompt where it runs as the
    assistant of another `generate`."""
    ids: int
    """How many of them came as `input_ids`, and not as embeddings or in a cache."""
    answers: TokenMask | None = None
    """Assistant turns inside the prompt, where there are any. Shape: [B, length]."""
    cache_is_the_callers: bool = False
    """Whether the cache lives on after `generate`, so that later questions may read it."""
    ids_so_far: Tensor | None = None
    """All ids so far, as `generate` prepared its last pass from them. Shape: [R, n]."""
    fewest: int | None = None
    """Real tokens of the prompt in the row that has fewest; None until that was looked at."""

    @classmethod
    def of(
        cls,
        length: int,
        masks: Tensor | None,
        *,
        columns: int,
        ids: int,
        cache_is_the_callers: bool,
    ) -> "Prompt":
        """The prompt of a `generate` call; `masks` is `assistant_masks` [B, length] or None.

        Raises:
            UsageError: the masks cover another number of tokens than the prompt.
        """
        if masks is not None and masks.shape[-1] != length:
            raise UsageError(
                f"assistant_masks cover {masks.shape[-1]} tokens, the prompt has {length}; take "
                "both from one apply_chat_template(..., return_assistant_tokens_mask=True)."
            )
        has_answers = masks is not None and bool(masks.any())
        return cls(
            length,
            columns,
            ids,
            masks.bool() if has_answers and masks is not None else None,
            cache_is_the_callers,
        )

    def end(self, ids: int) -> int | None:
        """Columns up to the last of so many ids; None for fewer than given: a chunk of them."""
        return None if ids < self.ids else self.columns + ids - self.ids

    def roles(self, start: int, tokens: int, rows: int, device: torch.device) -> Roles:
        """Roles of columns start .. start + tokens - 1 for `rows` rows (beams included)."""
        if start >= self.length:
            return Roles(answer=True)
        if start + tokens <= self.length and self.answers is None:
            return Roles(answer=False)
        answer = torch.ones(rows, tokens, dtype=torch.bool, device=device)
        known = min(tokens, self.length - start)
        if self.answers is None:
            answer[:, :known] = False
        else:
            here = self.answers[:, start : start + known].to(device)
            answer[:, :known] = expand_rows(here, rows)
        return Roles(answer)

    def roles_beside(self, ids: TokenIds) -> Roles | None:
        """Roles of a pass over `ids` [R, T] that `generate` did not prepare: a processor's own.

        It holds all ids so far, and candidates behind them; or it ends with as many of the new
        ones as it has room for, behind a prompt of its own. None where it holds something else.
        """
        ids_so_far, tokens = self.ids_so_far, ids.shape[1]
        if ids_so_far is None or ids_so_far.shape[0] != ids.shape[0]:
            return None
        end = self.columns + ids_so_far.shape[1] - self.ids
        if tokens >= ids_so_far.shape[1] > 0 and torch.equal(
            ids[:, : ids_so_far.shape[1]], ids_so_far
        ):
            return self.roles(end - ids_so_far.shape[1], tokens, len(ids), ids.device)
        new = min(max(end - self.length, 0), tokens)
        if not torch.equal(ids[:, tokens - new :], ids_so_far[:, ids_so_far.shape[1] - new :]):
            return None
        answer = torch.arange(tokens, device=ids.device) >= tokens - new
        return Roles(answer.expand(ids.shape) if 0 < new < tokens else new > 0)

    def holds_first(self, first: int, start: int, mask: Tensor | None) -> bool:
        """Whether it is known that the first so many tokens of each row come before `start`.

        The padding mask [B, S] is looked at once, behind the prompt.
        """
        if not first or start < self.length:
            return not first
        if self.fewest is None:
            self.fewest = self.length
            if isinstance(mask, Tensor) and mask.ndim == 2:
                self.fewest = int(mask[:, : self.length].sum(-1).min())
        return start - self.length + self.fewest >= first

    def may_ask_again(self, start: int, tokens: int) -> bool:
        """Whether a token after these can still be question."""
        return self.cache_is_the_callers or start + tokens < self.length


def expand_rows(values: Tensor, rows: int) -> Tensor:
    """Repeats each row for its beams: [R, ...] -> [rows, ...] where R divides rows.

    Raises:
        UsageError: R does not divide rows.
    """
    if values.shape[0] == rows:
        return values
    if rows % values.shape[0]:
        raise UsageError(
            f"plans, masks or visits to follow are given for {values.shape[0]} rows, but this "
            f"batch has {rows}; give one for each row, or one for all."
        )
    return values.repeat_interleave(rows // values.shape[0], dim=0)


def positions_in_sequences(position_ids: Integer[Tensor, "B T"]) -> Integer[Tensor, "B T"]:
    """How many tokens of its sequence came before each, in packed rows: [B, T] -> [B, T].

    A sequence begins where a position does not follow the one before, as transformers sees it.
    """
    columns = torch.arange(position_ids.shape[1], device=position_ids.device).expand_as(
        position_ids
    )
    follows = torch.nn.functional.pad(position_ids.diff(dim=-1) == 1, (1, 0))
    return columns - columns.masked_fill(follows, 0).cummax(-1).values


INPUT = "input"
"""Under this note, for policies that read it, lies what entered layer 0. Shape: [B, T, D]."""


@dataclass(frozen=True)
class Context:
    """The B x T tokens of one call: which are in scope, their positions, and their logits."""

    in_scope: Mask = True
    """Where the policy applies. Shape: [B, T]."""
    start: int = 0
    """Columns before these tokens, if the policy reads it (`reads_start`), else 0."""
    padding: Shaped[Tensor, "B S"] | None = None
    """The caller's padding mask: 1 at real tokens, 0 at padding. Shape: [B, S]."""
    position_ids: Integer[Tensor, "B T"] | None = None
    """The caller's, where they tell the sequences of a packed row apart. Shape: [B, T]."""
    readout: Callable[[Tensor], Tensor] | None = None
    """The host's final norm and head; None where the stack is called without its host."""
    training: bool = False
    """Whether the stack is in training mode."""
    layers: int = 0
    """How many layers the stack has."""
    fuses: bool = False
    """Whether kernels of ours may run in the place of operators."""
    notes: dict[Any, Any] = field(default_factory=dict)
    """What the policy itself writes down for its later layers. Key a note by its layer: a layer
    runs again in the backward pass of gradient checkpointing, and must find what it found."""

    def real(self, state: States) -> TokenMask:
        """Which of these tokens are no padding. Shape: [B, T, D] -> BoolTensor [B, T]."""
        rows, tokens = state.shape[:2]
        if self.padding is None:
            return torch.ones(rows, tokens, dtype=torch.bool, device=state.device)
        return self.padding[:, -tokens:].bool().to(state.device)

    def positions(self, state: States) -> Integer[Tensor, "#B T"]:
        """How many tokens of its sequence came before each: [B, T, D] -> [B, T].

        Padding is not counted, nor are the sequences that are packed before it in its row.
        """
        tokens = state.shape[1]
        if self.position_ids is not None:
            return positions_in_sequences(self.position_ids).to(state.device)
        if self.padding is None:
            return torch.arange(self.start, self.start + tokens, device=state.device)[None]
        counted = self.padding.long().cumsum(-1) - 1
        return counted.clamp(min=0)[:, -tokens:].to(state.device)

    def past_first(self, first: int, state: States) -> Mask:
        """Which tokens come behind the first so many of their sequence: [B, T, D] -> [B, T]."""
        if self.padding is None and self.position_ids is None and self.start >= first:
            return True
        return (self.positions(state) >= first).expand(state.shape[:2])

    def scope(self, state: States) -> TokenMask:
        """The real tokens in scope. Shape: [B, T, D] -> BoolTensor [B, T]."""
        return self.real(state) & self.in_scope

    def read(self, state: States) -> Logits:
        """The logits that these states would give if they left now. Shape: [B, T, D] -> [B, T, V].

        Raises:
            HostError: the stack runs without the model that owns the head.
        """
        if self.readout is None:
            raise HostError(
                "this policy reads predictions between layers, but the decoder is called without "
                "its head; call the model that it belongs to."
            )
        return self.readout(state)
