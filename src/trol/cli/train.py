"""`trol train`: run a recipe."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from trol.cli import terminal
from trol.cli.provenance import run_record

EXAMPLES = (
    "trol train recipes/tiny.yaml",
    "trol train tiny seed=1 --out runs/tiny-1",
    "trol train tiny --show",
)


def train(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A YAML file or its name.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Settings that replace the recipe's."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Default: runs/RECIPE.")
    ] = None,
    show: Annotated[bool, typer.Option("--show", help="Print the whole recipe and leave.")] = False,
    as_json: terminal.AsJson = False,
) -> None:
    """Train a model as RECIPE says, stage by stage."""
    from trol import training

    resolved = training.resolve(recipe, overrides or [])
    if show:
        recipe_json = dataclasses.asdict(resolved)
        terminal.report(recipe_json, as_json=as_json, text=lambda: resolved.yaml().rstrip())
        return
    terminal.no_library_bars()
    with terminal.noise_to_stderr():
        found = training.run(resolved, out=out or Path("runs") / Path(recipe).stem)
    result = {**found, "run": run_record(found.get("seed"))}
    terminal.report(result, as_json=as_json, text=lambda: str(found["model"]))
