"""`trol export`: a plan baked into a plain transformers checkpoint of fewer layers."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

from trol.cli import models, terminal
from trol.cli.terminal import argument, option, run_record

if TYPE_CHECKING:
    from trol.checkpoints.export import Exported
    from trol.depth import Plan

EXAMPLES = (
    'trol export smollm2 models/short --plan "0-13 16-29"',
    "trol export models/llama models/llama-half --plan runs/plan.json",
    "trol export models/llama models/llama-short --plan runs/plan.json --task docstrings --json",
)


def export(
    model: terminal.Model,
    destination: Annotated[str, argument("DEST", "The folder to make.")],
    *,
    plan: Annotated[str, option("--plan", "PLAN", "Plan text, or a file of `trol plan`.")],
    task: Annotated[
        str | None,
        option("--task", "NAME", "Measure what it costs on questions such as docstrings."),
    ] = None,
    questions: terminal.Questions = 16,
    seed: terminal.Seed = 0,
    as_json: terminal.AsJson = False,
) -> None:
    """Bake a plan into a plain transformers checkpoint.

    Layers that the plan skips are gone, layers of n visits become n copies; the plan then holds for
    every token, prompts too. Low-rank updates of a trained run are merged. What would not compute
    the same is refused, and nothing is written.
    """
    from trol.checkpoints import export as baking
    from trol.evaluation.tasks import task_of

    wanted, scope = models.plan_and_scope(plan)
    baking.check_destination(destination)
    if task is not None:
        task_of(task)
    _note_scope(plan, scope, measures=task is not None)
    loss = None
    with terminal.quiet_libraries():
        opened, processor = models.open_model(model)
        host = _host(opened)
        if task is not None:
            loss = _losses(host, processor, wanted, scope, task, questions=questions, seed=seed)
        exported = baking.export(host, processor, wanted, destination, seed=seed)
    result = {"model": model, "plan": str(wanted), "scope": scope, **asdict(exported)}
    result |= {"loss": loss, "run": run_record(seed)}
    terminal.report(result, as_json=as_json, text=lambda: _text(exported, wanted, loss))


def _note_scope(plan: str, scope: str | None, *, measures: bool) -> None:
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
    """Loss of references of the test split, under all layers, and under the plan by scope."""
    from trol.depth import Plan
    from trol.evaluation.plan_search import plan_loss
    from trol.evaluation.tasks import check_reads, task_of

    items = task_of(task).items(questions, seed, "test")
    check_reads(processor, task, items)
    scopes: list[Any] = [*dict.fromkeys(filter(None, (scope, "all")))]
    return {
        "task": task,
        "questions": len(items),
        "full": plan_loss(model, processor, items, Plan("all"), "all"),
        **{one: plan_loss(model, processor, items, plan, one) for one in scopes},
    }


def _text(exported: Exported, plan: Plan, loss: dict[str, Any] | None) -> str:
    text = (
        f"{exported.destination}: layers '{plan}' of {exported.layers} as {len(exported.kept)} "
        f"layers, {exported.parameters / 1e6:.1f} M parameters; logits differ from the plan's by "
        f"{exported.difference:.1g} at most. transformers opens it without trol."
    )
    if loss is None:
        return text
    costs = [f"{loss['full']:.3f} the full model"]
    for scope in ("answer", "question"):
        if scope in loss:
            costs.append(f"{loss[scope]:.3f} the plan for scope={scope}")
    costs.append(f"{loss['all']:.3f} this checkpoint")
    return (
        f"{text}\nLoss of {loss['questions']} answers of {loss['task']}, nats per token: "
        f"{', '.join(costs)}."
    )
