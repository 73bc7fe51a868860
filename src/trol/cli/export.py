"""`trol export`: a plan baked into a plain transformers checkpoint of fewer layers."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from trol.cli import terminal
from trol.cli.models import read_plan, scope_of
from trol.cli.terminal import run_record

if TYPE_CHECKING:
    from trol.checkpoints.export import Exported
    from trol.depth import Plan

EXAMPLES = (
    'trol export HuggingFaceTB/SmolLM2-135M-Instruct models/short --plan "0-19 28-29"',
    "trol export models/llama models/llama-half --plan runs/plan.json",
    "trol export models/llama models/llama-short --plan runs/plan.json --task docstrings --json",
)


def export(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A name, a folder or a hub name.")],
    destination: Annotated[str, typer.Argument(metavar="DEST", help="The folder to make.")],
    *,
    plan: Annotated[
        str, typer.Option("--plan", metavar="PLAN", help="Plan text, or a file of `trol plan`.")
    ],
    task: Annotated[
        str | None,
        typer.Option(
            "--task", metavar="NAME", help="Measure what it costs on questions such as docstrings."
        ),
    ] = None,
    questions: Annotated[
        int, typer.Option("--questions", metavar="N", min=1, help="How many of them.")
    ] = 16,
    seed: terminal.Seed = 0,
    as_json: terminal.AsJson = False,
) -> None:
    """Bake a plan into a plain transformers checkpoint.

    Layers that the plan skips are gone, layers of n visits become n copies; the plan then holds for
    every token, prompts too. Low-rank updates of a trained run are merged. What would not compute
    the same is refused, and nothing is written.
    """
    wanted, scope = read_plan(plan), scope_of(plan)
    from trol.checkpoints import export as baking
    from trol.cli.models import open_model
    from trol.evaluation.tasks import task_of

    baking.check_destination(destination)
    if task is not None:
        task_of(task)
    _tell_scope(plan, scope, measures=task is not None)
    terminal.no_library_bars()
    with terminal.noise_to_stderr():
        opened, processor = open_model(model)
        host = _host(opened)
        loss = None
        if task is not None:
            loss = _losses(host, processor, wanted, scope, task, questions=questions, seed=seed)
        made = baking.export(host, processor, wanted, destination, seed=seed)
    result = {"model": model, "plan": str(wanted), "scope": scope, **asdict(made)}
    result |= {"loss": loss, "run": run_record(seed)}
    terminal.report(result, as_json=as_json, text=lambda: _text(made, wanted, loss))


def _tell_scope(plan: str, scope: str | None, *, measures: bool) -> None:
    """Warns of a plan that was chosen for other tokens than all."""
    if scope in (None, "all"):
        return
    cost = "" if measures else " --task NAME measures what that costs."
    terminal.note(
        f"trol: {plan} was chosen for scope={scope}, and the checkpoint applies it to every token, "
        f"for which nothing was measured: its answers may be far worse. Choose a plan with `trol "
        f"plan --scope all`.{cost}"
    )


def _host(model: Any) -> Any:
    """The plain model that is baked, low-rank updates merged into its weights."""
    from peft import PeftModel

    from trol.checkpoints.export import check_policy, plain_host
    from trol.training.adapters import merged

    if isinstance(model, PeftModel):
        check_policy(model)
        model = merged(model)
    return plain_host(model)


def _losses(
    model: Any,
    processor: Any,
    plan: Plan,
    scope: str | None,
    task: str,
    *,
    questions: int,
    seed: int,
) -> dict[str, Any]:
    """Loss of references, of the test split: under all layers, and under the plan by scope."""
    from trol.depth import Plan
    from trol.evaluation.plan_search import plan_loss
    from trol.evaluation.tasks import check_reads, task_of

    items = task_of(task).items(questions, seed, "test")
    check_reads(processor, task, items)
    found = {"full": plan_loss(model, processor, items, Plan("all"), "all")}
    scopes: list[Any] = [*dict.fromkeys(filter(None, (scope, "all")))]
    for one in scopes:
        found[one] = plan_loss(model, processor, items, plan, one)
    return {"task": task, "questions": len(items), **found}


def _text(made: Exported, plan: Plan, loss: dict[str, Any] | None) -> str:
    return _written(made, plan) + ("" if loss is None else f"\n{_cost(loss)}")


def _cost(loss: dict[str, Any]) -> str:
    """What the plan costs, in words."""
    told = [f"{loss['full']:.3f} the full model"]
    told += [
        f"{loss[scope]:.3f} the plan for scope={scope}"
        for scope in ("answer", "question")
        if scope in loss
    ]
    told.append(f"{loss['all']:.3f} this checkpoint")
    return (
        f"Loss of {loss['questions']} answers of {loss['task']}, nats per token: {', '.join(told)}."
    )


def _written(made: Exported, plan: Plan) -> str:
    return (
        f"{made.destination}: layers '{plan}' of {made.layers} as {len(made.kept)} layers, "
        f"{made.parameters / 1e6:.1f} M parameters; logits differ from the plan's by "
        f"{made.difference:.1g} at most. transformers opens it without trol."
    )
