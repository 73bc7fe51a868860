"""Opening what a command names: a model, or what a training run added to one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trol.errors import UsageError


def open_model(
    name: str | Path, *, bits: int | None = None, chat_template: str | None = None
) -> tuple[Any, Any]:
    """The model and its processor, in evaluation mode.

    Args:
        name: a shipped model, a folder, a hub name, or the folder of adapters that a run left,
            whose recipe names the host that they belong to.
        bits: what its weights are quantised to, if given.
        chat_template: the text of a template that takes the place of its own.
    """
    model, processor = _opened(name, bits)
    if chat_template is not None:
        processor.chat_template = chat_template
    return model, processor


def _opened(name: str | Path, bits: int | None) -> tuple[Any, Any]:
    import trol
    from trol.policies.adapter import is_trained

    if not is_trained(Path(name)):
        return trol.load_model(name, **({} if bits is None else {"bits": bits}))
    if bits is not None:
        raise UsageError(
            f"{name} holds adapters, which were trained on weights of the bits that its "
            "recipe.yaml says; leave --bits out."
        )
    from trol.training import reopened

    model, processor = reopened(name)
    return model.eval(), processor
