"""Policies by name: the one list that attach, adapters, recipes and commands read.

The table holds addresses, not classes: a policy's file is imported when it is first asked for, so
this room knows every policy without importing any.
"""

from __future__ import annotations

import inspect
import json
from importlib import import_module
from typing import Any, TypeVar

from trol.depth.plan import Plan
from trol.depth.policy import AbstractPolicy
from trol.errors import UsageError, unknown

POLICIES = {
    "plain": "trol.depth.policy:Plain",
    "plan": "trol.policies.planned:Planned",
    "trol_mixer": "trol.policies.mixer:TrolMixer",
    "early_exit": "trol.policies.exits:EarlyExit",
    "layer_dropout": "trol.policies.chance:LayerDropout",
    "replay": "trol.policies.planned:Replay",
    "controller": "trol.policies.controller:Controller",
    "router": "trol.policies.router:Router",
    "random_tokens": "trol.policies.chance:RandomTokens",
}
"""Registered name -> module:class."""

_REGISTERED: dict[str, type[AbstractPolicy]] = {}
"""Policies of other packages and scripts, which registered them."""

Policy = TypeVar("Policy", bound=type[AbstractPolicy])

PolicyLike = AbstractPolicy | Plan | str
"""A policy, a registered name, a plan or plan text."""


def names() -> list[str]:
    """All registered names."""
    return sorted({*POLICIES, *_REGISTERED})


def register(policy: Policy) -> Policy:
    """Makes a policy of your own known by its `name`, so that what is saved with it can be loaded.

    A class decorator; whoever loads imports the module that has the class first.

    Raises:
        UsageError: it is no policy, has no name, or another policy has that name.
    """
    made: Any = policy
    if not (isinstance(made, type) and issubclass(made, AbstractPolicy)):
        raise UsageError(f"got {made!r:.60}; register a subclass of trol.AbstractPolicy.")
    name: Any = getattr(made, "name", None)
    if not isinstance(name, str):
        raise UsageError(f"{made.__name__} has no name; write name = 'my_policy' in the class.")
    before: Any = _REGISTERED.get(name, made)
    same = (before.__module__, before.__qualname__) == (made.__module__, made.__qualname__)
    if name in POLICIES or not same:
        raise UsageError(f"another policy is called {name!r}; give {made.__name__} another name.")
    _REGISTERED[name] = policy
    return policy


def policy_class(name: str) -> type[AbstractPolicy]:
    """The class registered under `name`; raises `UsageError` with "did you mean"."""
    if name in _REGISTERED:
        return _REGISTERED[name]
    if name not in POLICIES:
        raise UsageError(
            f"{unknown('policy', name, names())} One of your own is known once its class was given "
            "to trol.register: import the module that does so first."
        )
    module, _, attribute = POLICIES[name].partition(":")
    return getattr(import_module(module), attribute)


def from_settings(settings: dict[str, Any]) -> AbstractPolicy:
    """The policy of `{"policy": name, **settings}`.

    Raises:
        UsageError: the name or a setting is unknown.
    """
    rest = dict(settings)
    cls = policy_class(str(rest.pop("policy", None)))
    known = list(inspect.signature(cls).parameters)
    for key in rest:
        if key not in known:
            raise unknown(f"setting of policy {cls.name}", key, known)
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
        raise UsageError(
            f"got {type(spec).__name__} {spec!r:.60}; give a policy, the name of one, a plan or "
            "plan text."
        )
    if spec in names():
        return from_settings({"policy": spec})
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
