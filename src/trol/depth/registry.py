"""Policies by name: the one list that attach, adapters, recipes and commands read.

The table holds addresses, not classes: a policy's file is imported when it is first asked for, so
this room knows every policy without importing any.
"""

from __future__ import annotations

import inspect
from importlib import import_module
from typing import Any

from trol.depth.plan import Plan
from trol.depth.policy import AbstractPolicy
from trol.errors import UsageError, unknown

POLICIES = {
    "plain": "trol.policies.plain:Plain",
    "plan": "trol.policies.planned:Planned",
    "trol_mixer": "trol.policies.mixer:TrolMixer",
    "early_exit": "trol.policies.exits:EarlyExit",
    "layer_dropout": "trol.policies.layer_dropout:LayerDropout",
    "replay": "trol.policies.replay:Replay",
    "controller": "trol.policies.controller:Controller",
    "router": "trol.policies.router:Router",
    "random_tokens": "trol.policies.random_tokens:RandomTokens",
}
"""Registered name -> module:class."""

PolicyLike = AbstractPolicy | Plan | str
"""A policy, a registered name, a plan or plan text."""


def names() -> list[str]:
    """All registered names."""
    return sorted(POLICIES)


def policy_class(name: str) -> type[AbstractPolicy]:
    """The class registered under `name`; raises `UsageError` with "did you mean"."""
    if name not in POLICIES:
        raise unknown("policy", name, POLICIES)
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
    if spec in POLICIES:
        return from_settings({"policy": spec})
    if not spec.strip() or spec.lstrip()[:1].isdigit() or spec.startswith(("all", "exit@")):
        return from_settings({"policy": "plan", "plan": spec})
    raise UsageError(
        f"{unknown('policy', spec, POLICIES)} A plan starts with a layer number, 'all' or 'exit@'."
    )
