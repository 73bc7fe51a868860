"""`trol export`: a plan baked into a plain transformers checkpoint of fewer layers."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from trol.cli import terminal
from trol.cli.plans import read_plan
from trol.cli.provenance import run_record

if TYPE_CHECKING:
    from trol.depth import Plan
    from trol.policies.export import Exported

EXAMPLES = (
    'trol export HuggingFaceTB/SmolLM2-135M-Instruct models/short --plan "0-19 28-29"',
    "trol export models/llama models/llama-half --plan runs/plan.json",
    "trol export models/llama models/llama-half --plan exit@12 --json > exported.json",
)


def export(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A name, a folder or a hub name.")],
    destination: Annotated[str, typer.Argument(metavar="DEST", help="The folder to make.")],
    *,
    plan: Annotated[
        str, typer.Option("--plan", metavar="PLAN", help="Plan text, or a file of `trol plan`.")
    ],
    seed: terminal.Seed = 0,
    as_json: terminal.AsJson = False,
) -> None:
    """Bake a plan into a plain transformers checkpoint.

    Layers that the plan skips are gone, layers of n visits become n copies; the plan then holds for
    every token, prompts too. What would not compute the same is refused, and nothing is written.
    """
    wanted = read_plan(plan)
    from trol.cli.models import open_model
    from trol.policies import export as baking

    baking.check_destination(destination)
    terminal.no_library_bars()
    with terminal.noise_to_stderr():
        opened, processor = open_model(model)
        made = baking.export(opened, processor, wanted, destination, seed=seed)
    result = {"model": model, "plan": str(wanted), **asdict(made), "run": run_record(seed)}
    terminal.report(result, as_json=as_json, text=lambda: _text(made, wanted))


def _text(made: Exported, plan: Plan) -> str:
    return (
        f"{made.destination}: layers '{plan}' of {made.layers} as {len(made.kept)} layers, "
        f"{made.parameters / 1e6:.1f} M parameters; logits differ from the plan's by "
        f"{made.difference:.1g} at most. transformers opens it without trol."
    )
