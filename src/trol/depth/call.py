"""What belongs to one forward call: who is in scope, what is kept, who watches.

Nothing of this lives on the model, so two threads on one model cannot mix their calls up.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cached_property
from threading import Lock, Thread, current_thread
from threading import enumerate as enumerate_threads
from typing import Any, Literal

from torch import Tensor

from trol.depth.planes import ALONG, HOLES, PlanedCache
from trol.depth.policy import PLAIN, AbstractPolicy, StackBounds, Visit
from trol.depth.readout import Readout
from trol.depth.roles import Context, Prompt, Roles
from trol.depth.trace import Recorder, StackCost
from trol.host.cache import new_cache
from trol.host.generation import shows_all
from trol.host.torch_internals import CompileableContextVar


@dataclass(frozen=True)
class Step:
    """What the caller of the model knows about the tokens of one forward pass."""

    roles: Roles
    keep: bool = True
    """Whether a later token can still be question; planes above 1 are dropped otherwise."""
    start: int | None = None
    """Columns before these tokens, where the caller knows and the policy reads it."""
    last_only: Callable[[], bool] | None = None
    """Whether nobody reads what comes out above any token but the last of each row; None: no."""
    tokens: int | None = None
    """How many tokens of each row the caller knew of; a wrapper may put its own before them."""
    real: Tensor | None = None
    """1 at tokens that are no padding, as the caller says. Shape: [B, S]."""
    readout: Readout | None = None
    """The host's final norm and head."""
    notes: dict[Any, Any] | None = None
    """Where the policy's notes go, for the host to read when the pass is over."""


Executor = Literal["auto", "dense", "token-wise"]
"""`dense` computes all tokens, `token-wise` has a layer's parts compute those that go, `auto`
where that saves more than it takes."""


Kernel = Literal["auto", "operators", "triton"]
"""`triton` makes gate and mixture in one launch, where there is one; `auto` on CUDA devices."""


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
    bounds: StackBounds
    """What the policy says of the layers beforehand."""
    context: Context
    """What the policy may know of the call."""
    keep: bool
    """Whether planes above 1 outlive this call."""
    everywhere: bool
    """Whether the scope in force is `all`: then a layer skipped by plan is never needed."""
    recorder: Recorder | None
    config: Any
    """The stack's configuration."""
    costs: Callable[[], StackCost]
    """What visits of the layers cost."""
    applied: list[int | None]
    """How often each layer was applied; written by the layers, None where none was called."""
    cache: Any = None
    """The cache that the layers were handed; written by them."""
    entered: bool = False
    """Whether some layer has seen this call; written by the layers."""
    absent: frozenset[int] = frozenset()
    """Layers that the whole batch, always, skips: they have no keys and values."""
    last_only: Callable[[], bool] | None = None
    """Whether only the last token's output of the last layer is read; None where it is watched."""
    free: bool = False
    """Whether neither gradients nor a compiler follow the program, and no dropout draws."""
    executor: Executor = "dense"
    """Who makes visits that not all tokens make."""
    parts: bool = False
    """Whether the layers' token-wise parts can compute some tokens alone."""
    asked: Mapping[str, Any] = field(default_factory=dict)
    """Keyword arguments of the stack."""

    @property
    def looks(self) -> bool:
        """Whether who goes may be looked at, to leave the others out.

        Neither where gradients or a compiler follow, nor where something of all tokens is shown.
        """
        return self.free and self._looks  # compiled code, never free, cannot read what is cached

    @cached_property
    def _looks(self) -> bool:
        # Hidden states are shown between layers, whole in either way.
        asked = {**self.asked, "output_hidden_states": False}
        return self.executor != "dense" and not shows_all(self.config, asked)

    def runs_once(self, layer: int, cache: Any) -> bool:
        """Whether this layer does what the plain model's does, and nobody watches."""
        if self.recorder is not None or self.bounds.layers[layer] != PLAIN:
            return False
        planes = cache.planes if isinstance(cache, PlanedCache) else ()
        return not any((layer, plane) in planes for plane in (2, HOLES, ALONG))

    def only_last_of(self, layer: int) -> bool:
        """Whether only the last token's output of this layer is read."""
        asked = self.last_only if layer == len(self.applied) - 1 else None
        return asked is not None and self.parts and self.looks and asked()

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
    kernel: Kernel = "auto"
    decoding: Decoding | None = None

    @property
    def fuses(self) -> bool:
        """Whether kernels may run in the place of operators; the reference is made of operators."""
        return self.kernel == "triton" or (self.kernel == "auto" and self.executor != "dense")


NOTHING = Ambience()
"""Where no such block is open."""

# Compileable: a set and its get that lie in one compiled graph see each other, also in dynamo.
CALL = CompileableContextVar("trol_call")
STEP = CompileableContextVar("trol_step")

_PROMPTS: ContextVar[tuple[tuple[int, Prompt], ...]] = ContextVar("trol_prompts", default=())
_AMBIENCES: ContextVar[dict[int, Ambience]] = ContextVar("trol_ambiences")


def prompt_of(host: object) -> Prompt | None:
    """The prompt that `host` is generating from, in this thread, or None."""
    innermost = _PROMPTS.get()[-1:]
    return innermost[0][1] if innermost and innermost[0][0] == id(host) else None


def prompts() -> list[Prompt]:
    """The prompts of all `generate` calls open in this thread: assistants are called inside."""
    return [prompt for _, prompt in _PROMPTS.get()]


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
    return _AMBIENCES.get({}).get(id(stack), NOTHING)


_THREADS: dict[int, list[set[Thread]]] = {}
"""Stack -> the threads that there were when each of the blocks open on it was opened."""
_COUNTING = Lock()
"""Held while open blocks are counted, which threads do together."""


def started_inside(stack: object) -> bool:
    """Whether this thread was started while a block was open on `stack`."""
    return any(current_thread() not in threads for threads in _THREADS.get(id(stack), ()))


@contextmanager
def open_on(stack: Any, ambience: Ambience) -> Generator[None]:
    """A block on `stack`: counted there, and in force in this thread."""
    threads = set(enumerate_threads())
    with _COUNTING:
        stack.depth_ambiences += 1
        _THREADS.setdefault(id(stack), []).append(threads)
    try:
        with in_force(stack, ambience):
            yield
    finally:
        with _COUNTING:
            stack.depth_ambiences -= 1
            there = _THREADS[id(stack)]
            del there[next(i for i, one in enumerate(there) if one is threads)]


@contextmanager
def in_force(stack: object, ambience: Ambience) -> Generator[None]:
    """Puts `ambience` in force on `stack`."""
    token = _AMBIENCES.set({**_AMBIENCES.get({}), id(stack): ambience})
    try:
        yield
    finally:
        _AMBIENCES.reset(token)
