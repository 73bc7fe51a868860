"""Telling transformers which of a policy's parameters are one, and taking it back."""

from __future__ import annotations

from typing import Any

TIED = ("_tied_weights_keys", "all_tied_weights_keys")
"""Where transformers keeps which parameters are one: on the class, and on each model."""


def declare_tied(model: Any) -> None:
    """Tells transformers which parameters are one.

    It reads `_tied_weights_keys` when saving and `all_tied_weights_keys` when loading.
    """
    names: dict[int, str] = {}
    tied: dict[str, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        source = names.setdefault(id(parameter), name)
        if source != name and ".depth." in name:
            tied[name] = source
    for attribute in TIED:
        known = getattr(model, attribute, None)
        if known is not None or attribute == "_tied_weights_keys":
            setattr(model, attribute, {**tied, **(known or {})})


def undeclare_tied(model: Any) -> None:
    """Takes it back."""
    for attribute in TIED:
        known: dict[str, str] = vars(model).get(attribute) or {}
        if any(".depth." in name for name in known):
            delattr(model, attribute)  # what the class says shows again, where it says anything
            rest = {name: source for name, source in known.items() if ".depth." not in name}
            if rest != (getattr(model, attribute, None) or {}) or attribute != "_tied_weights_keys":
                setattr(model, attribute, rest)
