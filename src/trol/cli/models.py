"""What a command line names, opened: a model with its processor, and a plan with its file."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trol.errors import UsageError

if TYPE_CHECKING:
    from trol.depth import Plan, PolicyLike

WRITE_AGAIN = "write it again with `trol plan MODEL --out FILE`."


def open_model(
    name: str | Path, *, bits: int | None = None, chat_template: str | None = None
) -> tuple[Any, Any]:
    """A model and its processor: as `trol.load_model`, or of a folder of adapters.

    What trains models is imported for such a folder alone.
    """
    import trol
    from trol.checkpoints.adapter import is_trained

    settings = {"bits": bits, "chat_template": chat_template}
    given: dict[str, Any] = {key: value for key, value in settings.items() if value is not None}
    if is_trained(Path(name)):
        from trol.training.opening import open_trained

        return open_trained(name, **given)
    return trol.load_model(name, **given)


@dataclass(frozen=True)
class GivenPlan:
    """A plan that a command line gives, and for which tokens it is."""

    plan: Plan
    scope: str | None = None
    """The scope that its file says it was chosen for; None of plan text, and of old files."""
    keep_first: int = 0
    """The first tokens that visit every layer, as its file says; 0 where none is named."""


def read_plan(text_or_path: str) -> Plan:
    """The plan of plan text (`0-7:2 8-23`), or of a plan file.

    Raises:
        UsageError: it is neither, or the file is damaged.
    """
    return given_plan(text_or_path).plan


def given_plan(text_or_path: str) -> GivenPlan:
    """The plan of plan text or a plan file, with what the file says beside it."""
    from trol.depth import Plan
    from trol.depth.policy import check_whole

    if _names_file(text_or_path):
        content = _read(text_or_path)
        plan = _checked(content, text_or_path)
        first = content.get("keep_first", 0)  # 0 in files of before there were any
        check_whole(f"keep_first of {text_or_path}", first)
        return GivenPlan(plan, content.get("scope"), first)
    try:
        return GivenPlan(Plan(text_or_path))
    except UsageError as error:
        if os.path.isdir(text_or_path):
            raise UsageError(
                f"{text_or_path} is a folder, and a folder is no plan; give plan text such as "
                "'0-7 12-23', or a file that `trol plan` wrote."
            ) from error
        raise


def policy_of(text_or_path: str) -> PolicyLike:
    """What `trol.depth` takes for `--depth`.

    Of a plan file it is the plan, for the tokens that the file says; of a folder that `trol
    calibrate` wrote for an exit, that exit.
    """
    from trol.checkpoints.adapter import CONFIG_NAME, policy_in
    from trol.policies.planned import Planned

    if os.path.isfile(os.path.join(text_or_path, CONFIG_NAME)):
        return policy_in(Path(text_or_path))
    if not _names_file(text_or_path):
        return text_or_path
    given = given_plan(text_or_path)
    scope: Any = given.scope or "all"
    return Planned(given.plan, scope=scope, keep_first=given.keep_first)


def policy_text(text_or_path: str) -> str:
    """`--depth` as it is reported: of a plan file, the plan and the tokens it is for."""
    if not _names_file(text_or_path):
        return text_or_path
    given = given_plan(text_or_path)
    parts = [str(given.plan)]
    parts += [f"scope={given.scope}"] if given.scope not in (None, "all") else []
    parts += [f"keep_first={given.keep_first}"] if given.keep_first else []
    return ", ".join(parts)


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
