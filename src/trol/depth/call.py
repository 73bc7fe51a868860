"""What belongs to one forward call: who is in scope, what is kept, who watches.

Nothing of this lives on the model, so two threads on one model cannot mix their calls up.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from torch import Tensor

from trol.depth.context import Context
from trol.depth.cost import StackCost
from trol.depth.planes import PlanedCache
from trol.depth.policy import AbstractPolicy, Visit
from trol.depth.readout import Readout
from trol.depth.roles import Mask, Prompt, Roles
from trol.depth.trace import Recorder
from trol.host.cache import new_cache
from trol.host.context import CompileableContextVar
from trol.host.generation import shows_all
from trol.host.layers import GATHERED, attention_of


@dataclass(frozen=True)
class Step:
    """What the caller of the model knows about the tokens of one forward pass."""

    roles: Roles
    keep: bool = True
    """Whether a later token can still be question; planes above 1 are dropped otherwise."""
    start: int | None = None
    """Columns before these tokens, where the caller knows and the policy reads it."""
    last_only: bool = False
    """Whether nobody reads what comes out above any token but the last of each row."""
    real: Tensor | None = None
    """1 at tokens that are no padding, as the caller says. Shape: [B, S]."""
    readout: Readout | None = None
    """The host's final norm and head."""
    notes: dict[Any, Any] | None = None
    """Where the policy's notes go, for the host to read when the pass is over."""


Executor = Literal["auto", "dense", "packed"]
"""`dense` computes all tokens, `packed` those that go wherever it can, `auto` where it pays."""

Kind = tuple[int, type, type, bool, bool]
"""Visits that one comparison speaks for: (layer, its class, slot's class, tokens or rows, without a
mask). Layers of one class may differ: in some families every other one has a window of its own."""


def unpriced() -> StackCost:
    """Of no layers."""
    return StackCost((), ())


UNTOLD = Step(Roles())
"""The step of a forward pass that was told nothing: questions only."""


def told(assistant_masks: Tensor | None, labels: Tensor | None, real: Tensor | None) -> Step:
    """The step of a forward pass whose caller gave these, each [B, T], or None."""
    if assistant_masks is not None:
        return Step(Roles.of_assistant_masks(assistant_masks), real=real)
    if labels is not None:
        return Step(Roles.of_labels(labels), real=real)
    return UNTOLD if real is None else Step(Roles(), real=real)


@dataclass
class Call:
    """What the layers need to know during one forward pass of their stack."""

    policy: AbstractPolicy
    context: Context
    """What the policy may know of the call."""
    keep: bool
    """Whether planes above 1 outlive this call."""
    everywhere: bool
    """Whether the scope in force is `all`: then a layer skipped by plan is never needed."""
    recorder: Recorder | None
    config: Any
    """The stack's configuration."""
    applied: list[int]
    """How often each layer was applied; written by the layers."""
    cache: Any = None
    """The cache that the layers were handed; written by them."""
    entered: bool = False
    """Whether some layer has seen this call; written by the layers."""
    absent: frozenset[int] = frozenset()
    """Layers that the whole batch, always, skips: they have no keys and values."""
    last_only: bool = False
    """Whether only the last token's output of the last layer is read, and nobody watches."""
    free: bool = False
    """Whether a tensor may be looked at to decide where the program goes: neither gradients nor a
    compiler follow it."""
    executor: Executor = "dense"
    """Who makes visits that not all tokens make."""
    gathers: bool = False
    """Whether no quirk of the family forbids to compute some tokens alone."""
    asked: Mapping[str, Any] = field(default_factory=dict)
    """Keyword arguments of the stack."""
    costs: Callable[[], StackCost] = unpriced
    """What visits of the layers cost."""
    _real: tuple[Tensor | None] | None = field(default=None, init=False)
    verdicts: dict[Kind | type, bool] = field(default_factory=dict)
    """Whether packed visits of a kind gave what dense ones do, once they were compared; and False
    for a class of layers of which one did not."""

    @property
    def packs(self) -> bool:
        """Whether tokens may be left out: not where something of all of them is shown."""
        return self.free and self._packs  # compiled code, never free, cannot read what is cached

    @cached_property
    def _packs(self) -> bool:
        # Hidden states are shown between layers, whole in either way.
        asked = {**self.asked, "output_hidden_states": False}
        return self.executor != "dense" and not shows_all(self.config, asked)

    @cached_property
    def masks_gather(self) -> bool:
        """Whether the attention takes masks of which some queries' rows can be had."""
        return self.gathers and attention_of(self.config) in GATHERED

    @property
    def in_scope(self) -> Mask:
        """Where the policy applies. Shape: [B, T]."""
        return self.context.in_scope

    def runs_once(self, layer: int, cache: Any) -> bool:
        """Whether this layer does what the plain model's does, and nobody watches."""
        if self.recorder is not None or not self.policy.is_plain(layer):
            return False
        return not (isinstance(cache, PlanedCache) and any(of == layer for of, _ in cache.planes))

    def only_last_of(self, layer: int) -> bool:
        """Whether only the last token's output of this layer is read."""
        return self.last_only and layer == len(self.applied) - 1 and self.packs

    def real(self, state: Tensor) -> Tensor | None:
        """Which tokens are no padding, None where none is. [B, T, D] -> BoolTensor [B, T]."""
        if self._real is None:
            padding, (rows, tokens) = self.context.padding, state.shape[:2]
            told = padding is not None and len(padding) == rows and padding.shape[1] >= tokens
            real = self.context.real(state) if told else None
            self._real = (None if real is None or bool(real.all()) else real,)
        return self._real[0]

    def rows_going(self, visit: Visit) -> tuple[bool, ...] | None:
        """Which rows make the next visit, where a plan settles it for whole sequences."""
        if not self.everywhere:
            return None
        return self.policy.rows_going(visit.layer, visit.number, visit.state.shape[0])

    def scratch(self) -> Any:
        """A cache for one layer's pass, where keys and values are merged but none is kept."""
        return new_cache(self.config)


Decoding = Callable[[Any, dict[str, Any]], dict[str, Any]]
"""(host, keyword arguments of `generate`) -> the same with a decoding loop of its own in them."""


@dataclass(frozen=True)
class Ambience:
    """What blocks such as `trol.depth` put in force on one stack, in one thread, for a while."""

    policy: AbstractPolicy | None = None
    recorder: Recorder | None = None
    executor: Executor = "auto"
    decoding: Decoding | None = None


# Compileable: a set and its get that lie in one compiled graph see each other, also in dynamo.
CALL = CompileableContextVar("trol_call")
STEP = CompileableContextVar("trol_step")

_PROMPTS: ContextVar[tuple[tuple[int, Prompt], ...]] = ContextVar("trol_prompts", default=())
_AMBIENCES: ContextVar[dict[int, Ambience]] = ContextVar("trol_ambiences")


def prompt_of(host: object) -> Prompt | None:
    """The prompt that `host` is generating from, in this thread, or None."""
    innermost = _PROMPTS.get()[-1:]
    return innermost[0][1] if innermost and innermost[0][0] == id(host) else None


def outermost_prompt() -> Prompt | None:
    """The prompt of the outermost `generate` in this thread: assistants are called inside it."""
    prompts = _PROMPTS.get()
    return prompts[0][1] if prompts else None


@contextmanager
def generating(host: object, prompt: Prompt) -> Generator[None]:
    """Marks that `host` generates from `prompt`."""
    token = _PROMPTS.set((*_PROMPTS.get(), (id(host), prompt)))
    try:
        yield
    finally:
        _PROMPTS.reset(token)


def ambience_of(stack: object) -> Ambience:
    """What is in force on `stack` in this thread."""
    return _AMBIENCES.get({}).get(id(stack), Ambience())


@contextmanager
def in_force(stack: object, ambience: Ambience) -> Generator[None]:
    """Puts `ambience` in force on `stack`."""
    token = _AMBIENCES.set({**_AMBIENCES.get({}), id(stack): ambience})
    try:
        yield
    finally:
        _AMBIENCES.reset(token)
