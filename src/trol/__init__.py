"""trol makes depth a choice: each token visits each layer zero, one or several times.

    import trol
    trol.attach(model, "trol_mixer")    # or trol.TrolMixer(passes=2), or a plan: "0-7:2 8-23"
    model.generate(**inputs)

Importing trol is cheap; torch and transformers are imported when a name is first used.
`trol.load_model` opens all that trol saves; `import trol.family` lets transformers' own Auto
classes open it as well.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trol import depth
    from trol.checkpoints.adapter import load, save
    from trol.depth import (
        AbstractPolicy,
        Plan,
        Trace,
        attach,
        detach,
        prepare_cache,
        register,
        trace,
    )
    from trol.depth.policy import Plain
    from trol.errors import UntrainedWarning
    from trol.family.loading import load_model
    from trol.policies.controller import Controller
    from trol.policies.exits import EarlyExit, LayerDropout
    from trol.policies.mixer import TrolMixer
    from trol.policies.planned import Planned, Replay
    from trol.policies.random_tokens import RandomTokens
    from trol.policies.router import Router
    from trol.speculation import speculate

_HOMES = {
    "attach": "depth",
    "detach": "depth",
    "trace": "depth",
    "prepare_cache": "depth",
    "register": "depth",
    "save": "checkpoints.adapter",
    "load": "checkpoints.adapter",
    "AbstractPolicy": "depth",
    "Plan": "depth",
    "Trace": "depth",
    "EarlyExit": "policies.exits",
    "LayerDropout": "policies.exits",
    "Controller": "policies.controller",
    "Plain": "depth.policy",
    "Planned": "policies.planned",
    "RandomTokens": "policies.random_tokens",
    "Replay": "policies.planned",
    "Router": "policies.router",
    "TrolMixer": "policies.mixer",
    "UntrainedWarning": "errors",
    "speculate": "speculation",
    "load_model": "family.loading",
    "depth": "depth",
}
"""Public name -> the module that defines it."""

__all__ = sorted(_HOMES)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'trol' has no attribute {name!r}")
    home = import_module(f"trol.{_HOMES[name]}")
    return home if name == "depth" else getattr(home, name)
