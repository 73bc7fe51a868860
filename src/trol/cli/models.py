"""Opening what a command names: a model, or what a training run added to one.

Plans that a command reads: text on the command line, or the file that `trol plan` wrote.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trol.errors import UsageError

if TYPE_CHECKING:
    from trol.depth import Plan


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
    from trol.checkpoints.adapter import is_trained

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


def read_plan(text_or_path: str) -> Plan:
    """The plan of plan text (`0-7:2 8-23`), or of a plan file.

    Raises:
        UsageError: it is neither, or the file is damaged.
    """
    if not _names_file(text_or_path):
        return _of_text(text_or_path)
    return _checked(_read(text_or_path), text_or_path)


def scope_of(text_or_path: str) -> str | None:
    """Whose tokens a plan file was chosen to skip; None for plan text, or a plan for any scope."""
    return _read(text_or_path).get("scope") if _names_file(text_or_path) else None


def _read(text_or_path: str) -> Any:
    path = Path(text_or_path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UsageError(
            f"there is no plan file {text_or_path}; give plan text such as '0-7 12-23', or a file "
            "that `trol plan` wrote."
        ) from error
    except (OSError, ValueError) as error:
        raise UsageError(f"{text_or_path} cannot be read as JSON ({error}); {_CURE}") from error


def plan_text(text_or_path: str) -> str:
    """A plan file as the text of its plan; anything else, a policy's name say, as it is.

    Raises:
        UsageError: the file is missing or damaged.
    """
    return str(read_plan(text_or_path)) if _names_file(text_or_path) else text_or_path


def _names_file(text: str) -> bool:
    # os.path, as pathlib fails on plan text that is too long to be a file's name.
    return not os.path.isdir(text) and (text.endswith(".json") or os.path.isfile(text))


def _of_text(text: str) -> Plan:
    from trol.depth import Plan

    try:
        return Plan(text)
    except UsageError as error:
        if os.path.isdir(text):
            raise UsageError(
                f"{text} is a folder, and a folder is no plan; give plan text such as '0-7 12-23', "
                "or a file that `trol plan` wrote."
            ) from error
        raise


_CURE = "write it again with `trol plan MODEL --out FILE`."


def _checked(found: Any, path: str) -> Plan:
    from trol.depth import Plan

    visits = found.get("visits") if isinstance(found, dict) else None
    if not isinstance(visits, list) or not all(type(count) is int for count in visits):
        raise UsageError(f"{path} has no list of whole numbers 'visits'; {_CURE}")
    plan = Plan(visits)
    if found.get("plan") != str(plan):
        raise UsageError(
            f"{path} says plan {found.get('plan')!r}, but its visits are those of '{plan}'; {_CURE}"
        )
    return plan


def check_file(path: Path) -> None:
    """Raises `UsageError` where no plan file can be written."""
    from trol.checkpoints.adapter import check_writable

    if path.is_dir():
        raise UsageError(f"{path} is a folder; name the file that the plan is to be in.")
    check_writable(path.parent)


def write_plan(path: Path, plan: Plan, layers: int, about: Mapping[str, Any]) -> dict[str, Any]:
    """Writes a plan file for a stack of `layers` layers; returns what is in it.

    Args:
        path: the file; its folder is made if it is missing.
        plan: the plan.
        layers: of the model that it was made for.
        about: `method`, `keep`, `run` and whatever else tells where the plan came from.
    """
    from trol.depth import Plan
    from trol.files import folder, write_json

    visits = plan.for_layers(layers)
    found = {"plan": str(Plan(visits)), "visits": list(visits), **about}
    write_json(folder(path.parent) / path.name, found)
    return found
