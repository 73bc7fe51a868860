"""trol makes depth a choice: each token visits each layer zero, one or several times.

    import trol
    trol.attach(model, "trol_mixer")    # or trol.TrolMixer(passes=2), or a plan: "0-7:2 8-23"
    model.generate(**inputs)

Importing trol is cheap; torch and transformers are imported when a name is first used.
`trol.load_model` opens all that trol saves; `import trol.family` lets transformers' own Auto
classes open it as well.
"""

from __future__ import annotations

import sys
import warnings
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
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

POLICIES = {
    "plain": "Plain",
    "plan": "Planned",
    "trol_mixer": "TrolMixer",
    "early_exit": "EarlyExit",
    "layer_dropout": "LayerDropout",
    "replay": "Replay",
    "controller": "Controller",
    "router": "Router",
    "random_tokens": "RandomTokens",
}
"""The name of each policy, as `trol.attach(model, name)` takes it -> its class, a public name."""

__all__ = sorted(_HOMES)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"trol has no {name!r}; its public names: {', '.join(__all__)}.")
    home = import_module(f"trol.{_HOMES[name]}")
    return home if name == "depth" else getattr(home, name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]


_MOVED = {
    "depth.cost": "depth.trace",
    "depth.host": "depth.attachment",
    "depth.registry": "depth.policy",
    "policies.adapter": "checkpoints.adapter",
    "policies.export": "checkpoints.export",
    "policies.layer_dropout": "policies.exits",
    "policies.plain": "depth.policy",
    "policies.replay": "policies.planned",
    "policies.speculation": "speculation",
}
"""Public modules: the old name -> the new one. The old ones work, with a warning."""


class _Moved(MetaPathFinder, Loader):
    """Imports a module by its old name."""

    def find_spec(self, fullname: str, *_: Any) -> ModuleSpec | None:
        return ModuleSpec(fullname, self) if fullname.removeprefix("trol.") in _MOVED else None

    def exec_module(self, module: ModuleType) -> None:
        new = f"trol.{_MOVED[module.__name__.removeprefix('trol.')]}"
        warnings.warn(f"{module.__name__} is now {new}", DeprecationWarning, stacklevel=2)
        public = vars(import_module(new)).items()
        vars(module).update({name: value for name, value in public if not name.startswith("__")})


sys.meta_path.append(_Moved())
