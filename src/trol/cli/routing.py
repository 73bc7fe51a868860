"""`trol oracle --router`: a router trained on what the oracle saw, saved as an adapter."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from trol.cli import terminal
from trol.errors import UsageError

if TYPE_CHECKING:
    from trol.evaluation.oracle import Menu

REPORT = "router.json"

FEW = 30
"""Held-out questions below which a router's figures say little."""


def check(folder: Path, scope: str, rows: Path) -> None:
    """Raises `UsageError` where no router can be trained on `rows`, or saved."""
    from trol.policies.adapter import check_adapter_folder

    if scope != "answer":
        raise UsageError(
            f"--scope is {scope}, but a router chooses the layers of answers; leave --scope out."
        )
    if folder.resolve() == rows.resolve():
        raise UsageError(f"--router and --out are both {folder}; give the router its own folder.")
    check_adapter_folder(folder, beside=(REPORT,))


def check_menu(menu: Menu, after: int) -> None:
    """Raises `UsageError` where a router that chooses after `after` layers has no such menu."""
    from trol.policies.router import Router

    Router([level.plan for level in menu.levels], after=after).check(menu.layers)


def train(
    model: Any, processor: Any, rows: Path, folder: Path, *, metric: str, after: int, seed: int
) -> dict[str, Any]:
    """Trains a router on the rows of a finished oracle, and saves it with its report.

    Returns:
        `{"folder", "metric", "task", "split", ...}` and what `trol.training.routing_table.report`
        says of the questions that were held out.
    """
    import trol
    from trol.analysis.files import write_json
    from trol.data.oracle_rows import read_header, read_rows
    from trol.evaluation.tasks import Item, fitted, prompts
    from trol.policies.export import plain_host
    from trol.training.routing import Lessons, train_router

    def inputs(some: Any) -> Any:
        items = [Item(None, row.question, row.reference, row.type) for row in some]
        return prompts(processor, [fitted(model, processor, item, 1) for item in items])

    trained = train_router(
        plain_host(model),
        processor,
        read_rows(rows),
        metric=metric,
        after=after,
        lessons=Lessons(seed=seed),
        prompts=inputs,
    )
    trol.save(model, folder)
    about = {name: read_header(rows)[name] for name in ("task", "split")}
    found = {"folder": str(folder), "metric": metric, **about, **trained.report}
    write_json(folder / REPORT, found)
    return found


def told(found: dict[str, Any], metric: str) -> str:
    """What the router does on questions that it did not learn from."""
    rows = [["dial", "layers", f"mean {metric}", "at random"]]
    for at in found["dials"]:
        scores = at["score"], at["random"]["score"]
        rows.append([f"{at['dial']:.1f}", f"{at['cost']:.2f}", *(f"{one:.4f}" for one in scores)])
    few = f"Fewer than {FEW} questions: these figures say little; ask more with --questions."
    return "\n".join(
        [
            f"The router, on {found['questions']} questions that it did not learn from:",
            terminal.table(rows),
            *([few] if found["questions"] < FEW else []),
            f"Learnt from the {found['split']} split of {found['task']}: measure it on another.",
            f"{found['folder']}: trol.load(model, {found['folder']!r})",
        ]
    )
