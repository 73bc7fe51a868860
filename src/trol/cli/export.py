"""`trol export`: a plan baked into a plain transformers checkpoint of fewer layers."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any, cast

from trol.cli import models, terminal
from trol.cli.terminal import argument, flag, option, run_record
from trol.errors import UsageError

if TYPE_CHECKING:
    from trol.checkpoints.export import Exported
    from trol.cli.models import GivenPlan

EXAMPLES = (
    'trol export smollm2 models/short --plan "0-13 16-29"',
    "trol export models/llama models/llama-half --plan runs/plan.json",
    "trol export models/llama models/llama-short --plan runs/plan.json --task docstrings --json",
)

MUCH = 0.1
"""A rise of the loss from which answers may be far worse. Unit: nats per token."""


def export(
    model: terminal.Model,
    destination: Annotated[str, argument("DEST", "The folder to make.")],
    *,
    plan: Annotated[str, option("--plan", "PLAN", "Plan text, or a file of `trol plan`.")],
    task: terminal.Task = None,
    questions: terminal.Questions = 16,
    unmeasured: Annotated[
        bool, flag("--unmeasured", "Do not measure what it costs in loss.")
    ] = False,
    seed: terminal.Seed = 0,
    chat_template: terminal.ChatTemplate = None,
    as_json: terminal.AsJson = False,
) -> None:
    """Bake a plan into a plain transformers checkpoint.

    Layers that the plan skips are gone, layers of n visits become n copies; the plan then holds for
    every token, prompts too. Low-rank updates of a trained run are merged. What would not compute
    the same is refused, and nothing is written.
    """
    from trol.checkpoints import export as baking
    from trol.evaluation.tasks import default_task, task_of

    given = models.given_plan(plan)
    baking.check_destination(destination)
    if unmeasured and task is not None:
        raise UsageError("--unmeasured measures nothing, so there is no --task; leave one out.")
    if task is not None:
        task_of(task)
    loss = None
    with terminal.quiet_libraries():
        opened, processor = models.open_model(model, chat_template=chat_template)
        host = _host(opened)
        if not unmeasured:
            task = task or default_task(processor)
            loss = _losses(host, processor, given, task, questions=questions, seed=seed)
        if not holds_for_all(given):
            terminal.note(f"trol: {plan} was chosen for {_tokens(given)}, {_harm(given, loss)}")
        exported = baking.export(host, processor, given.plan, destination, seed=seed)
    result = {"model": model, "plan": str(given.plan), "scope": given.scope}
    result |= {"keep_first": given.keep_first, **asdict(exported)}
    result |= {"loss": loss, "run": run_record(seed)}
    terminal.report(result, as_json=as_json, text=lambda: _text(exported, given, loss))


def holds_for_all(given: GivenPlan) -> bool:
    """Whether the plan is for every token, as a plain checkpoint has it."""
    return given.scope in (None, "all") and not given.keep_first


def _tokens(given: GivenPlan) -> str:
    """For which tokens a plan is, in words."""
    parts = [f"scope={given.scope}"] if given.scope not in (None, "all") else []
    if given.keep_first:
        parts.append(f"keep_first={given.keep_first} (the first tokens visit every layer)")
    return " and ".join(parts)


def _harm(given: GivenPlan, loss: dict[str, Any] | None) -> str:
    """What a plan does that every token follows, but that was not chosen for every token."""
    text = "and the checkpoint applies it to every token"
    if loss is None:
        return f"{text}: its answers may be far worse. Leave --unmeasured out to see what it costs."
    chosen, here = loss["chosen"], loss["all"]
    if here - chosen < MUCH:
        return f"{text}: its loss changes by {here - chosen:+.3f} nats per token."
    worse = (
        f"{text}: its loss goes from {chosen:.3f} to {here:.3f}, and its answers may be far worse."
    )
    cure = " Choose a plan with `trol plan --scope all`."
    return worse if given.scope in (None, "all") else worse + cure


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
    model: Any, processor: Any, given: GivenPlan, task: str, *, questions: int, seed: int
) -> dict[str, Any]:
    """Loss of references of the test split, nats per token.

    Of the `full` model, of the plan as it was `chosen` (null where it is for every token), and for
    `all` tokens, as the checkpoint has it.
    """
    from trol.depth import Plan
    from trol.evaluation.plan_search import plan_loss
    from trol.evaluation.tasks import questions_of

    items = questions_of(model, processor, task, questions, seed=seed)
    subject, scope = (model, processor, items), cast(Any, given.scope or "all")
    chosen = None
    if not holds_for_all(given):
        chosen = plan_loss(*subject, given.plan, scope, keep_first=given.keep_first)
    return {
        "task": task,
        "questions": len(items),
        "full": plan_loss(*subject, Plan("all"), "all"),
        "chosen": chosen,
        "all": plan_loss(*subject, given.plan, "all"),
    }


def _text(exported: Exported, given: GivenPlan, loss: dict[str, Any] | None) -> str:
    text = (
        f"{exported.destination}: layers '{given.plan}' of {exported.layers} as "
        f"{len(exported.kept)} layers, {exported.parameters / 1e6:.1f} M parameters; logits differ "
        f"from the plan's by {exported.difference:.1g} at most. transformers opens it without trol."
    )
    if loss is None:
        return text
    from trol.evaluation.tasks import task_of

    costs = [f"{loss['full']:.3f} the full model"]
    if loss["chosen"] is not None:
        costs.append(f"{loss['chosen']:.3f} the plan for {_tokens(given)}")
    costs.append(f"{loss['all']:.3f} this checkpoint")
    unit = "windows" if task_of(loss["task"]).windows else "answers"
    return (
        f"{text}\nLoss of {loss['questions']} {unit} of {loss['task']}, nats per token: "
        f"{', '.join(costs)}."
    )
