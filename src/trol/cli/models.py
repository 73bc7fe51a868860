"""What a command line names, opened: a model with its processor, and a plan with its file."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trol.errors import UsageError

if TYPE_CHECKING:
    from trol.depth import Plan

WRITE_AGAIN = "write it again with `trol plan MODEL --out FILE`."


def open_model(
    name: str | Path, *, bits: int | None = None, chat_template: str | None = None
) -> tuple[Any, Any]:
    """As `trol.training.open_model`, which is imported when it is called."""
    from trol import training

    return training.open_model(name, bits=bits, chat_template=chat_template)


def read_plan(text_or_path: str) -> Plan:
    """The plan of plan text (`0-7:2 8-23`), or of a plan file.

    Raises:
        UsageError: it is neither, or the file is damaged.
    """
    return plan_and_scope(text_or_path)[0]


def plan_and_scope(text_or_path: str) -> tuple[Plan, str | None]:
    """The plan, and the scope that a plan file says it was chosen for.

    The scope is None for plan text, and for a plan that was chosen without looking at tokens.
    """
    from trol.depth import Plan

    if _names_file(text_or_path):
        content = _read(text_or_path)
        return _checked(content, text_or_path), content.get("scope")
    try:
        return Plan(text_or_path), None
    except UsageError as error:
        if os.path.isdir(text_or_path):
            raise UsageError(
                f"{text_or_path} is a folder, and a folder is no plan; give plan text such as "
                "'0-7 12-23', or a file that `trol plan` wrote."
            ) from error
        raise


def plan_text(text_or_path: str) -> str:
    """A plan file as the text of its plan; anything else, such as a policy's name, as it is."""
    return str(read_plan(text_or_path)) if _names_file(text_or_path) else text_or_path


def _names_file(text: str) -> bool:
    # os.path, as pathlib fails on plan text that is too long to be a file's name.
    return not os.path.isdir(text) and (text.endswith(".json") or os.path.isfile(text))


def _read(path: str) -> Any:
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UsageError(
            f"there is no plan file {path}; give plan text such as '0-7 12-23', or a file that "
            "`trol plan` wrote."
        ) from error
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read as JSON ({error}); {WRITE_AGAIN}") from error


def _checked(content: Any, path: str) -> Plan:
    from trol.depth import Plan

    visits = content.get("visits") if isinstance(content, dict) else None
    if not isinstance(visits, list) or not all(type(count) is int for count in visits):
        raise UsageError(f"{path} has no list of whole numbers 'visits'; {WRITE_AGAIN}")
    plan, text = Plan(visits), content.get("plan")
    if text != str(plan):
        raise UsageError(
            f"{path} says plan {text!r}, but its visits are those of '{plan}'; {WRITE_AGAIN}"
        )
    return plan


def check_plan_file(path: Path) -> None:
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
        layers: how many the model has that the plan was chosen for.
        about: `method`, `keep`, `run` and whatever else says where the plan came from.
    """
    from trol.depth import Plan
    from trol.files import folder, write_json

    visits = plan.for_layers(layers)
    content = {"plan": str(Plan(visits)), "visits": list(visits), **about}
    write_json(folder(path.parent) / path.name, content)
    return content
