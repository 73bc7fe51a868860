"""A policy answers whether, after r visits to layer l, a token goes again.

`AbstractPolicy` asks this one question and has a few hooks beside it; `Visit` is what it may look
at, and `Plain` is the policy of the host itself. Below them, policies are looked up by name: the
package root (`trol.POLICIES`) lists them all, and each is imported when it is first used.
"""

import inspect
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any, ClassVar, Literal, NamedTuple, TypeVar

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

import trol
from trol.axes import States
from trol.depth.plan import Plan
from trol.depth.planes import append_token_state
from trol.depth.roles import Context, Scope, check_scope
from trol.errors import UsageError, unknown, warn_untrained
from trol.host.flops import matrix_flops

Answer = float | Float[Tensor, "B T"]
"""a_r: one number for all tokens, known without looking at the device, or FloatTensor [B, T]."""

SKIPPED_KV = ("project", "hole")


class Bounds(NamedTuple):
    """The least and most visits to a layer that a token in scope makes."""

    least: int
    most: int


PLAIN = Bounds(1, 1)
"""The bounds of a layer that every token visits exactly once."""


class Visit(NamedTuple):
    """What a policy may look at when it answers `again`."""

    layer: int
    """l, counted from 0."""
    number: int
    """r: how many visits the tokens have made so far; 0 before the first."""
    state: States
    """x_r. Shape: [B, T, D]."""
    gate: nn.Module | None
    """The parameters that this policy placed on layer l, if any."""
    context: Context
    """The call that this visit belongs to."""
    cache: Any = None
    """The host's cache; None where the model runs without one."""

    @property
    def start(self) -> int:
        """How many tokens of each row came before these, padding included."""
        return self.context.start

    def keep_with_cache(self, values: Shaped[Tensor, "B T *rest"]) -> Shaped[Tensor, "B S *rest"]:
        """Appends `values` of these tokens to what the cache keeps of all tokens so far.

        A cache keeps one such record for each layer, and crops, reorders and repeats it with its
        keys. The policy must set `reads_start`. Shape: [B, T, ...] -> [B, S, ...].

        Raises:
            HostError: the cache holds tokens that this policy never saw.
        """
        return append_token_state(self.cache, self.layer, values, self.start)


WIDE = {torch.float16: torch.float32, torch.bfloat16: torch.float32}
"""The type of states -> the wider type that they are mixed in."""


def mixture(state: States, further: States, again: Answer) -> States:
    """(1 - a) x + a y, made in float32 at least. Shape: [B, T, D] each, a [B, T] or one number."""
    weight = again[..., None] if isinstance(again, Tensor) else again
    wide = WIDE.get(state.dtype, state.dtype)
    if wide is state.dtype is further.dtype is getattr(weight, "dtype", wide):
        return torch.lerp(state, further, weight)
    weight = weight.to(wide) if isinstance(weight, Tensor) else weight
    return torch.lerp(state.to(wide), further.to(wide), weight).to(state.dtype)


class AbstractPolicy(ABC):
    """Answers, for every layer l and visit r, a_r in [0, 1]: 0 = leave, 1 = go again.

        x_0 = what enters layer l      x_r = layer_l(x_{r-1})      out = sum_r w_r x_r
        w_r = (1 - a_r) * prod_{j<r} a_j

    A policy is a value: what it answers follows from its settings and the tokens alone, and
    `settings()` written as JSON makes the same policy again. A new one needs `name`, `bounds`,
    `again` and `settings`. The other hooks have a default, and these policies use them:

    - `gate`, parameters on each layer: trol_mixer, early_exit, controller, router
    - `tied`, one set of them for all layers: trol_mixer
    - `learns`, which of them the model's own loss trains: trol_mixer, early_exit, router
    - `penalty`, a term added to the training loss: controller
    - `check`, refusing a stack that does not fit: trol_mixer, early_exit, controller, router, plan,
      replay
    - `rows_going`, visits that are settled for whole rows beforehand: plan
    - `mix`, mixing in fewer steps than by answering first: trol_mixer
    - `look_flops`, what answering costs: early_exit, controller, router
    - `translates` and `enter`, another input for a layer: early_exit
    - `reads_start`, positions, or a record of all tokens: controller, router, replay, random_tokens
    - `reads_input`, what entered layer 0: controller
    - `reads_predictions`, the logits of states between layers: early_exit
    - `observes`, tokens outside the scope: router
    - `by_name_alone`, a warning where nothing else is said: early_exit
    - `decides`, answers of 0 and 1 alone: all but trol_mixer, replay
    """

    name: ClassVar[str]
    """The registered name."""
    reads_start: bool = False
    """Whether `again` reads `Visit.start`, which costs a look at the cache on each call."""
    reads_input: bool = False
    """Whether `again` reads the note `INPUT`: what entered layer 0."""
    observes: ClassVar[bool] = False
    """Whether `again` is also asked in a pass with no token in scope, to look at its tokens."""
    reads_predictions: ClassVar[bool] = False
    """Whether `again` reads the logits of states between layers."""
    translates: bool = False
    """Whether `enter` changes states."""
    decides: ClassVar[bool] = False
    """Whether every answer is 0 or 1, so that no states are mixed."""

    by_name_alone: ClassVar[str | None] = None
    """Why the policy that its bare name makes is no good, as a warning; None where it is good."""

    scope: Scope
    training_scope: Scope
    skipped_kv: Literal["project", "hole"] = "project"
    """What later tokens see of a token that skipped a layer: keys and values made from the state
    that passed by (`project`), or nothing (`hole`)."""
    keep_first: int = 0
    """The first tokens of each sequence that are out of scope whatever their role: they visit every
    layer once. Pretrained decoders keep an attention sink there. Unit: tokens."""

    def __init__(
        self,
        *,
        scope: Scope = "all",
        training_scope: Scope | None = None,
        skipped_kv: Literal["project", "hole"] = "project",
        keep_first: int = 0,
    ) -> None:
        check_scope(scope)
        check_scope(training_scope or scope)
        if skipped_kv not in SKIPPED_KV:
            raise unknown("skipped_kv", skipped_kv, SKIPPED_KV)
        check_whole("keep_first", keep_first)
        self.scope = scope
        self.training_scope = training_scope or scope
        self.skipped_kv = skipped_kv
        self.keep_first = keep_first

    @abstractmethod
    def bounds(self, layer: int) -> Bounds:
        """The least and most visits of layer `layer` that a token in scope makes."""

    @abstractmethod
    def again(self, visit: Visit) -> Answer:
        """a_r for the tokens of this visit; asked for r = 0 .. bounds.most - 1."""

    def mix(self, visit: Visit, further: States) -> States:
        """(1 - a_r) x_r + a_r `further`, where all tokens went again whatever a_r is.

        For policies that can do so in fewer steps than by answering first. Shape: [B, T, D].
        """
        return mixture(visit.state, further, self.again(visit))

    def rows_going(self, layer: int, number: int, rows: int) -> tuple[bool, ...] | None:
        """Which of so many rows make visit `number + 1`, where that is settled beforehand.

        None where tokens of one row may differ, or all rows go alike.
        """
        del layer, number, rows
        return None

    def enter(self, visit: Visit) -> States:
        """x_0 of a layer, for policies that translate states. Shape: [B, T, D]."""
        return visit.state

    def penalty(self, notes: Mapping[Any, Any]) -> Float[Tensor, ""] | None:
        """What is added to the training loss, from the notes of the call; None for nothing."""
        del notes
        return None

    def look_flops(self, visit: Visit) -> int:
        """FLOPs of answering `again` at this visit, for one token: 2 * number of weights."""
        if visit.gate is None or visit.number == 0:
            return 0
        return matrix_flops(visit.gate)

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """The keyword arguments that make this policy again, as JSON values."""

    def gate(self, layer: int, width: int) -> nn.Module | None:
        """New parameters for layer `layer` of hidden size `width`, or None."""
        del layer, width
        return None

    def learns(self, layer: int) -> bool:
        """Whether the model's own loss reaches the parameters of this layer's gate.

        Others are attached frozen; a training loop that has a loss for them lets them learn.
        """
        del layer
        return True

    @property
    def tied(self) -> bool:
        """Whether all layers share the parameters of layer 0."""
        return False

    def check(self, layers: int) -> None:
        """Raises `UsageError` when the policy does not fit a stack of `layers` layers."""
        del layers

    def scope_in(self, *, training: bool) -> Scope:
        """The scope in force."""
        return self.training_scope if training else self.scope

    def applies_to_all(self, *, training: bool) -> bool:
        """Whether no token is out of scope, whatever its role and its place."""
        return self.scope_in(training=training) == "all" and not self.keep_first

    def skips(self, layer: int) -> bool:
        """Whether no token in scope visits this layer."""
        return self.bounds(layer).most == 0

    def __repr__(self) -> str:
        inside = ", ".join(f"{key}={value!r}" for key, value in self.settings().items())
        return f"{type(self).__name__}({inside})"

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and other.settings() == self.settings()

    __hash__ = None  # type: ignore[assignment]  # settings are JSON values, lists among them


def check_number(name: str, value: Any) -> None:
    """Raises `UsageError` unless `value` is a number (no bool)."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise UsageError(f"{name} is {value!r}; give a number.")


def check_share(name: str, value: float, *, below: float = 1.0) -> None:
    """Raises `UsageError` unless 0 <= value < below."""
    check_number(name, value)
    if not 0 <= value < below:
        raise UsageError(f"{name} is {value}, but must lie in [0, {below:g}).")


def check_whole(name: str, value: Any, least: int = 0) -> None:
    """Raises `UsageError` unless `value` is a whole number (no bool) from `least` on."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise UsageError(f"{name} is {value!r}; give a whole number, {least} or more.")


@dataclass(frozen=True)
class StackBounds:
    """What a policy says of all layers of a stack before any token comes."""

    layers: tuple[Bounds, ...]
    never: frozenset[int]
    """Layers that no token in scope visits."""
    plain: bool
    """Whether every token visits every layer exactly once."""

    @classmethod
    def of(cls, policy: AbstractPolicy, layers: int) -> "StackBounds":
        """The bounds of `policy` on a stack of `layers` layers."""
        bounds = tuple(policy.bounds(layer) for layer in range(layers))
        for layer, one in enumerate(bounds):
            if not 0 <= one.least <= one.most:
                raise UsageError(
                    f"{policy.name} gives {one} for layer {layer}; bounds are the least and the "
                    "most visits, such as Bounds(1, 2): 0 <= least <= most."
                )
        never = frozenset(layer for layer, one in enumerate(bounds) if one.most == 0)
        return cls(bounds, never, all(one == PLAIN for one in bounds))


class Plain(AbstractPolicy):
    """a_0 = 1, a_1 = 0: what the host does without trol."""

    name = "plain"
    decides = True

    def __init__(self) -> None:
        super().__init__()

    def bounds(self, layer: int) -> Bounds:
        return Bounds(1, 1)

    def again(self, visit: Visit) -> Answer:
        return 1.0

    def settings(self) -> dict[str, Any]:
        return {}


_REGISTERED: dict[str, type[AbstractPolicy]] = {}
"""Policies of other packages and scripts, which registered them."""

Policy = TypeVar("Policy", bound=type[AbstractPolicy])

PolicyLike = AbstractPolicy | Plan | str
"""A policy, a registered name, a plan or plan text."""


def names() -> list[str]:
    """All registered names."""
    return sorted({*trol.POLICIES, *_REGISTERED})


def register(policy: Policy) -> Policy:
    """Makes a policy of your own known by its `name`, so that what is saved with it can be loaded.

    A class decorator; a script that loads the policy imports the module of its class first.

    Raises:
        UsageError: it is no policy, has no name, or another policy has that name.
    """
    cls: Any = policy
    if not (isinstance(cls, type) and issubclass(cls, AbstractPolicy)):
        raise UsageError(f"got {cls!r:.60}; register a subclass of trol.AbstractPolicy.")
    name: Any = getattr(cls, "name", None)
    if not isinstance(name, str):
        raise UsageError(f"{cls.__name__} has no name; write name = 'my_policy' in the class.")
    before: Any = _REGISTERED.get(name, cls)
    same = (before.__module__, before.__qualname__) == (cls.__module__, cls.__qualname__)
    if name in trol.POLICIES or not same:
        raise UsageError(f"another policy is called {name!r}; give {cls.__name__} another name.")
    _REGISTERED[name] = policy
    return policy


def policy_class(name: str) -> type[AbstractPolicy]:
    """The class registered under `name`; raises `UsageError` with "did you mean"."""
    if name in _REGISTERED:
        return _REGISTERED[name]
    if name not in trol.POLICIES:
        raise UsageError(
            f"{unknown('policy', name, names())} One of your own is known once its class was given "
            "to trol.register: import the module that does so first."
        )
    return getattr(trol, trol.POLICIES[name])


def from_settings(settings: dict[str, Any]) -> AbstractPolicy:
    """The policy of `{"policy": name, **settings}`.

    Raises:
        UsageError: the name or a setting is unknown, or a setting is missing.
    """
    rest = dict(settings)
    cls = policy_class(str(rest.pop("policy", None)))
    known = inspect.signature(cls).parameters
    for key in rest:
        if key not in known:
            raise unknown(f"setting of policy {cls.name}", key, list(known))
    missing = [key for key, one in known.items() if one.default is one.empty and key not in rest]
    if missing:
        raise UsageError(
            f"policy {cls.name} needs {' and '.join(missing)}, which a name alone does not give; "
            f"make it in Python: {cls.__name__}({', '.join(f'{key}=...' for key in missing)})."
        )
    return cls(**rest)


def to_settings(policy: AbstractPolicy) -> dict[str, Any]:
    """`{"policy": name, **settings}`, JSON values only; inverse of `from_settings`."""
    return {"policy": policy.name, **policy.settings()}


def resolve(spec: PolicyLike | object) -> AbstractPolicy:
    """A policy from itself, a registered name, a plan, or plan text.

    Raises:
        UsageError: it is none of these.
    """
    if isinstance(spec, AbstractPolicy):
        return spec
    if isinstance(spec, Plan):
        return from_settings({"policy": "plan", "plan": spec})
    if not isinstance(spec, str):
        what = f"the class {spec.__name__}" if isinstance(spec, type) else f"{spec!r:.60}"
        raise UsageError(
            f"got {what}; give a policy (an instance: TrolMixer()), the name of one, a plan or "
            "plan text."
        )
    if spec in names():
        named = from_settings({"policy": spec})
        if named.by_name_alone is not None:
            warn_untrained(named.by_name_alone)
        return named
    if not spec.strip() or spec.lstrip()[:1].isdigit() or spec.startswith(("all", "exit@")):
        return from_settings({"policy": "plan", "plan": spec})
    raise UsageError(
        f"{unknown('policy', spec, names())} A plan starts with a layer number, 'all' or 'exit@'."
    )


def settings_to_save(policy: AbstractPolicy) -> dict[str, Any]:
    """The settings of a policy, of which the same one can be made again.

    Raises:
        UsageError: it cannot: its class is not registered, or its settings are not its own.
    """
    settings = to_settings(policy)
    try:
        written = json.dumps(settings)
        again = json.dumps(to_settings(from_settings(json.loads(written))))
    except (UsageError, TypeError) as error:
        raise UsageError(
            f"nothing was saved, because {policy.name} could not be opened again: {error} Register "
            "its class (trol.register), and have settings() give what it is made of, as JSON."
        ) from error
    if again != written:
        raise UsageError(
            f"nothing was saved, because {policy.name} opened again would be another: settings() "
            f"gives {written}, what they make {again}."
        )
    return settings
