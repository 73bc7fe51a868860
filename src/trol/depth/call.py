"""`Call`: what the layers need to know during one forward pass of their stack.

It is made from `PassInfo`, what the caller knows of the tokens, and `Overrides`, what blocks such
as `trol.depth` put in force. None of them lives on the model, so two threads on one model cannot
mix their calls up.
"""

from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import cached_property
from threading import Lock, Thread, current_thread
from threading import enumerate as enumerate_threads
from typing import Any, Literal

from torch import Tensor

from trol.axes import States
from trol.depth.planes import HOLES, TOKEN_STATE, PlanedCache
from trol.depth.policy import PLAIN, AbstractPolicy, StackBounds, Visit
from trol.depth.readout import Readout
from trol.depth.roles import INPUT, Context, Prompt, Roles
from trol.depth.trace import Recorder, StackCost
from trol.host.cache import new_cache
from trol.host.generation import shows_all
from trol.host.torch_internals import CompileableContextVar


@dataclass(frozen=True)
class PassInfo:
    """What the caller of the model knows about the tokens of one forward pass."""

    roles: Roles
    keep: bool = True
    """Whether a later token can still be question; planes above 1 are dropped otherwise."""
    start: int | None = None
    """Columns before these tokens, where the caller knows and the policy reads it."""
    behind_first: bool = False
    """Whether the caller knows that none of these is among the policy's `keep_first` tokens."""
    asks_last_only: Callable[[], bool] | None = None
    """Whether only the output of each row's last token is read; None where all of it is."""
    tokens: int | None = None
    """How many tokens of each row the caller knew of; a wrapper may put its own before them."""
    real: Tensor | None = None
    """The caller's padding mask, 1 at real tokens. Shape: [B, S]."""
    readout: Readout | None = None
    """The host's final norm and head."""
    notes: dict[Any, Any] | None = None
    """The policy's notes, which the host reads when the pass is over."""


Executor = Literal["auto", "dense", "token-wise"]
"""`dense` computes all tokens, `token-wise` those that make the visit, `auto` the latter where
that saves time."""


Kernel = Literal["auto", "operators", "triton"]
"""`triton` computes gate and mixture in one kernel; `auto` does so on CUDA devices."""


NO_INFO = PassInfo(Roles())
"""A forward pass whose caller says nothing of its tokens: all are question."""


def pass_info(
    assistant_masks: Tensor | None, labels: Tensor | None, real: Tensor | None
) -> PassInfo:
    """What a caller says of a pass by these tensors, each [B, T] or None."""
    if assistant_masks is not None:
        return PassInfo(Roles.of_assistant_masks(assistant_masks), real=real)
    if labels is not None:
        return PassInfo(Roles.of_labels(labels), real=real)
    return NO_INFO if real is None else PassInfo(Roles(), real=real)


@dataclass
class Call:
    """What the layers need to know during one forward pass of their stack."""

    policy: AbstractPolicy
    bounds: StackBounds
    """The policy's bounds on visits of each layer."""
    context: Context
    """What the policy may know of the call."""
    keep: bool
    """Whether planes above 1 outlive this call."""
    everywhere: bool
    """Whether no token is out of scope: then a layer skipped by plan is never needed."""
    narrows: bool
    """Whether some of these tokens may be among the policy's `keep_first` tokens."""
    recorder: Recorder | None
    config: Any
    """The stack's configuration."""
    costs: Callable[[], StackCost]
    """What visits of the layers cost."""
    times_applied: list[int | None]
    """How often each layer was applied; written by the layers, None before they are called."""
    cache: Any = None
    """The cache that the layers were handed; written by them."""
    entered: bool = False
    """Whether some layer has seen this call; written by the layers."""
    absent: frozenset[int] = frozenset()
    """Layers that every token of the batch skips: they have no keys and values."""
    asks_last_only: Callable[[], bool] | None = None
    """Whether only the last token's output of the last layer is read; None while it is traced."""
    free: bool = False
    """Whether this runs without gradients, a compiler and dropout."""
    executor: Executor = "dense"
    """How visits are computed that only some tokens make."""
    parts: bool = False
    """Whether the layers' token-wise parts can compute some tokens alone."""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """Keyword arguments of the stack."""

    def begin(self, state: States) -> None:
        """Takes what enters layer 0: where the policy's `keep_first` tokens are. [B, T, D]."""
        context = self.context
        if self.policy.reads_input:
            context.notes[INPUT] = state
        if self.narrows:
            later = context.past_first(self.policy.keep_first, state)
            in_scope = later if context.in_scope is True else context.in_scope & later
            self.context = replace(context, in_scope=in_scope)

    @property
    def looks(self) -> bool:
        """Whether the policy's answers may be read from the device, to leave tokens out.

        Not with gradients or a compiler, and not where an output shows every token.
        """
        return self.free and self._looks  # compiled code cannot read a cached property

    @cached_property
    def _looks(self) -> bool:
        # Hidden states are shown between layers, where both executors give all tokens.
        arguments = {**self.arguments, "output_hidden_states": False}
        return self.executor != "dense" and not shows_all(self.config, arguments)

    def runs_once(self, layer: int, cache: Any) -> bool:
        """Whether this layer runs as in the plain model, and is not traced."""
        if self.recorder is not None or self.bounds.layers[layer] != PLAIN:
            return False
        planes = cache.planes if isinstance(cache, PlanedCache) else ()
        return not any((layer, plane) in planes for plane in (2, HOLES, TOKEN_STATE))

    def only_last_of(self, layer: int) -> bool:
        """Whether only the last token's output of this layer is read."""
        asks_last_only = self.asks_last_only if layer == len(self.times_applied) - 1 else None
        return asks_last_only is not None and self.parts and self.looks and asks_last_only()

    def rows_going(self, visit: Visit) -> tuple[bool, ...] | None:
        """Which rows make the next visit, where a plan settles it for whole sequences."""
        if not self.everywhere:
            return None
        return self.policy.rows_going(visit.layer, visit.number, visit.state.shape[0])

    def scratch(self) -> Any:
        """A cache for one layer and one pass, for keys and values that are merged but not kept."""
        return new_cache(self.config)


class CallReference:
    """A call among the arguments of a layer.

    FSDP2 looks for tensors in dataclasses among them, and where it finds one, it hands on a copy:
    what the layers write into a call that is no longer the stack's would be lost.
    """

    __slots__ = ("call",)

    def __init__(self, call: Call) -> None:
        self.call = call


Decoding = Callable[[Any, dict[str, Any]], dict[str, Any]]
"""(host, keyword arguments of `generate`) -> the same with a decoding loop of its own in them."""


@dataclass(frozen=True)
class Overrides:
    """What blocks such as `trol.depth` put in force on one stack, in one thread, for a while."""

    policy: AbstractPolicy | None = None
    recorder: Recorder | None = None
    executor: Executor = "auto"
    kernel: Kernel = "auto"
    decoding: Decoding | None = None

    @property
    def fuses(self) -> bool:
        """Whether fused kernels may run; the dense reference is made of torch operators."""
        return self.kernel == "triton" or (self.kernel == "auto" and self.executor != "dense")


NO_OVERRIDES = Overrides()
"""In force where no such block is open."""

# Compileable: a set and its get that lie in one compiled graph see each other, also in dynamo.
CALL = CompileableContextVar("trol_call")
PASS_INFO = CompileableContextVar("trol_pass_info")

_PROMPTS: ContextVar[tuple[tuple[int, Prompt], ...]] = ContextVar("trol_prompts", default=())
_OVERRIDES: ContextVar[dict[int, Overrides]] = ContextVar("trol_overrides")


def prompt_of(host: object) -> Prompt | None:
    """The prompt that `host` is generating from, in this thread, or None."""
    innermost = _PROMPTS.get()[-1:]
    return innermost[0][1] if innermost and innermost[0][0] == id(host) else None


def prompts() -> list[Prompt]:
    """The prompts of all open `generate` calls of this thread; an assistant's is the inner one."""
    return [prompt for _, prompt in _PROMPTS.get()]


@contextmanager
def generating(host: object, prompt: Prompt) -> Generator[None]:
    """Marks that `host` generates from `prompt`."""
    token = _PROMPTS.set((*_PROMPTS.get(), (id(host), prompt)))
    try:
        yield
    finally:
        _PROMPTS.reset(token)


def overrides_of(stack: object) -> Overrides:
    """What is in force on `stack` in this thread."""
    return _OVERRIDES.get({}).get(id(stack), NO_OVERRIDES)


_THREADS: dict[int, list[set[Thread]]] = {}
"""Stack -> for each block open on it, the threads that were running when it was opened."""
_COUNTING = Lock()
"""Held while blocks are counted: several threads open them."""


def started_inside(stack: object) -> bool:
    """Whether this thread was started while a block was open on `stack`."""
    return any(current_thread() not in threads for threads in _THREADS.get(id(stack), ()))


@contextmanager
def open_on(stack: Any, overrides: Overrides) -> Generator[None]:
    """Opens a block: it is counted on `stack`, and in force in this thread."""
    threads = set(enumerate_threads())
    with _COUNTING:
        stack.depth_blocks += 1
        _THREADS.setdefault(id(stack), []).append(threads)
    try:
        with in_force(stack, overrides):
            yield
    finally:
        with _COUNTING:
            stack.depth_blocks -= 1
            blocks = _THREADS[id(stack)]
            del blocks[next(i for i, one in enumerate(blocks) if one is threads)]


@contextmanager
def in_force(stack: object, overrides: Overrides) -> Generator[None]:
    """Puts `overrides` in force on `stack`."""
    token = _OVERRIDES.set({**_OVERRIDES.get({}), id(stack): overrides})
    try:
        yield
    finally:
        _OVERRIDES.reset(token)
