"""Depth as a choice: plans, policies, the visit loop, planes, hosts, traces and cost.

Letters: B rows of a batch, T tokens of a call, S positions so far, D hidden size, L layers,
R most visits, H heads, d head size.
"""

from trol.depth.cost import Cost, StackCost
from trol.depth.host import attach, attached, cost_of, depth, detach, is_attached, trace
from trol.depth.plan import Plan
from trol.depth.policy import AbstractPolicy, Answer, Bounds, Visit
from trol.depth.roles import Roles, Scope
from trol.depth.trace import Trace

__all__ = [
    "AbstractPolicy",
    "Answer",
    "Bounds",
    "Cost",
    "Plan",
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
    "is_attached",
    "trace",
]
