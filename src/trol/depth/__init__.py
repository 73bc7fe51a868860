"""Depth as a choice: plans, policies, the visit loop, planes, hosts, traces and cost.

Imports `execution`, `host`, `axes` and `errors`; the letters of shapes are those of `trol.axes`.
This package is also what `with trol.depth(model, policy):` calls.
"""

import sys
from contextlib import AbstractContextManager
from types import ModuleType

from torch import nn

from trol.depth.attachment import (
    attach,
    attached,
    cost_of,
    depth,
    detach,
    executor,
    is_attached,
    prepare_cache,
    trace,
)
from trol.depth.plan import Plan
from trol.depth.policy import AbstractPolicy, Answer, Bounds, PolicyLike, Visit, register
from trol.depth.roles import Roles, Scope
from trol.depth.trace import Cost, StackCost, Trace

__all__ = [
    "AbstractPolicy",
    "Answer",
    "Bounds",
    "Cost",
    "Plan",
    "PolicyLike",
    "Roles",
    "Scope",
    "StackCost",
    "Trace",
    "Visit",
    "attach",
    "attached",
    "cost_of",
    "depth",
    "detach",
    "executor",
    "is_attached",
    "prepare_cache",
    "register",
    "trace",
]


class _CallablePackage(ModuleType):
    """The room `trol.depth` and the verb `trol.depth(model, policy)` share one name."""

    def __call__(self, model: nn.Module, policy: PolicyLike) -> AbstractContextManager[None]:
        """Puts another policy in force on `model` for a while; see `attachment.depth`."""
        return depth(model, policy)


sys.modules[__name__].__class__ = _CallablePackage
