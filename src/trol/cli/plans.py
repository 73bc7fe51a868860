"""Plans that a command reads: text on the command line, or the file that `trol plan` wrote."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trol.errors import UsageError

if TYPE_CHECKING:
    from trol.depth import Plan


def read_plan(text_or_path: str) -> Plan:
    """The plan of plan text (`0-7:2 8-23`), or of a plan file.

    Raises:
        UsageError: it is neither, or the file is damaged.
    """
    from trol.depth import Plan

    path = Path(text_or_path)
    if path.suffix != ".json" and not path.is_file():
        return Plan(text_or_path)
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UsageError(
            f"there is no plan file {text_or_path}; give plan text such as '0-7 12-23', or a file "
            "that `trol plan` wrote."
        ) from error
    except (OSError, ValueError) as error:
        raise UsageError(f"{text_or_path} cannot be read as JSON ({error}); {_CURE}") from error
    return _checked(found, text_or_path)


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
    if path.is_dir():
        raise UsageError(f"{path} is a folder; name the file that the plan is to be in.")


def write_plan(path: Path, plan: Plan, layers: int, about: Mapping[str, Any]) -> dict[str, Any]:
    """Writes a plan file for a stack of `layers` layers; returns what is in it.

    Args:
        path: the file; its folder is made if it is missing.
        plan: the plan.
        layers: of the model that it was made for.
        about: `method`, `keep`, `run` and whatever else tells where the plan came from.
    """
    from trol.analysis.files import folder, write_json
    from trol.depth import Plan

    visits = plan.for_layers(layers)
    found = {"plan": str(Plan(visits)), "visits": list(visits), **about}
    write_json(folder(path.parent) / path.name, found)
    return found
