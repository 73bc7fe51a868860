"""`trol plan`: which layers a model keeps at a share of its depth, as a plan file."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

from trol.cli import models, terminal
from trol.cli.terminal import option, run_record
from trol.errors import UsageError, unknown

if TYPE_CHECKING:
    from trol.depth import Plan
    from trol.evaluation.items import Item
    from trol.evaluation.store import Measurements

EXAMPLES = (
    "trol plan --method uniform --keep 0.5",
    "trol plan --method greedy --keep 0.5 --task boards --questions 36 --out runs/greedy.json",
    "trol plan --method influence --keep 0.75 --scope all --task boards --questions 36 --json",
)
METHOD_HELP = "uniform, random, exit, middle; by measure: influence, greedy, draft."
KEEP_HELP = "Share of the layers that stay; draft needs none."
SCOPE_HELP = "Tokens that skip: answer, question, all (as `trol export` bakes it)."

SCOPES = {
    "answer": "the tokens of answers; prompts visit every layer",
    "question": "the tokens of questions; answers visit every layer",
    "all": "every token",
}
"""Scope -> who skips, in words."""

TIMED = 8
"""Questions that a draft is timed on."""
TIMED_TOKENS = 32
"""Longest answer to them. Unit: tokens."""


def plan(
    model: terminal.Model = terminal.DEFAULT_MODEL,
    *,
    method: Annotated[str, option("--method", "NAME", METHOD_HELP)] = "uniform",
    keep: Annotated[float | None, option("--keep", "SHARE", KEEP_HELP)] = None,
    task: terminal.Task = None,
    questions: terminal.Questions = 64,
    scope: Annotated[str, option("--scope", "ROLES", SCOPE_HELP)] = "answer",
    seed: terminal.Seed = 0,
    out: Annotated[Path, option("--out", "FILE", "The plan file.")] = Path("runs/plan.json"),
    as_json: terminal.AsJson = False,
) -> None:
    """Choose the layers that MODEL keeps at a share of its depth.

    What is measured for greedy and draft is kept beside FILE until the plan is there: the same
    command goes on where it was stopped.
    """
    models.check_plan_file(out)
    _check(method, keep, scope, task)
    from trol.evaluation.plan_search import chosen_plan
    from trol.evaluation.tasks import default_task, questions_of
    from trol.host.layers import find_decoder, layer_list
    from trol.policies.planned import STATIC, static_plan

    about: dict[str, Any] = {"model": model, "method": method, "keep": keep}
    measurements = None
    with terminal.quiet_libraries():
        opened, processor = models.open_model(model)
        layers = len(layer_list(find_decoder(opened)) or ())
        if method in STATIC:
            chosen = static_plan(method, layers, cast(float, keep), seed)
        else:
            task = task or default_task(processor)
            # Of the validation split, so that a test sees none of them.
            items = questions_of(opened, processor, task, questions, seed=seed, split="validation")
            about |= {"task": task, "questions": len(items), "scope": scope}
            measurements = _measurements(opened, items, out, about, seed)
            subject = (opened, processor, items)
            with _measuring(method, len(items), measurements) as progress:
                search = {"progress": progress, "measured": measurements}
                if method == "draft":
                    chosen, about["draft"] = _draft(*subject, keep, **search)
                else:
                    share = cast(float, keep)
                    chosen = chosen_plan(method, *subject, share, scope=cast(Any, scope), **search)
    content = models.write_plan(out, chosen, layers, {**about, "run": run_record(seed)})
    if measurements is not None:
        measurements.finish()
    terminal.report(
        {**content, "file": str(out)}, as_json=as_json, text=lambda: _text(content, layers, out)
    )


def _check(method: str, keep: float | None, scope: str, task: str | None) -> None:
    """Raises `UsageError` before a model is opened for what no model can do."""
    from trol.depth.roles import check_scope
    from trol.evaluation.plan_search import CHOSEN
    from trol.evaluation.tasks import task_of
    from trol.policies.planned import STATIC, kept_count

    if method not in STATIC and method not in CHOSEN:
        raise unknown("method", method, [*STATIC, *CHOSEN])
    if keep is not None:
        kept_count(1, keep)
    elif method != "draft":
        raise UsageError(
            f"no share of layers given; add one, such as --method {method} --keep 0.5."
        )
    check_scope(scope)
    if method == "draft" and scope != "answer":
        raise UsageError(f"--scope is {scope}, but drafts are answers; leave --scope out.")
    if task is not None:
        task_of(task)


def _draft(
    model: Any, processor: Any, items: Sequence[Item], keep: float | None, **search: Any
) -> tuple[Plan, dict[str, Any]]:
    """The plan that drafts fastest, and its figures: predicted, and measured here."""
    from trol.evaluation.plan_search import draft_plan
    from trol.evaluation.timing import measured_speed

    draft = draft_plan(model, processor, items, keep, **search)
    terminal.note(f"trol plan: '{draft.plan}' promises most, and is timed.")
    speed = measured_speed(
        model, processor, items[:TIMED], draft.plan, draft.tokens, new_tokens=TIMED_TOKENS
    )
    return draft.plan, {**asdict(draft), "plan": str(draft.plan), "measured": speed}


def _measurements(
    model: Any, items: Sequence[Item], out: Path, about: dict[str, Any], seed: int
) -> Measurements:
    """What was measured before for this plan file, and where more of it goes."""
    from trol.checkpoints.adapter import weights_digest
    from trol.depth import attached, is_attached
    from trol.depth.policy import to_settings
    from trol.evaluation.store import Measurements, items_digest
    from trol.files import folder

    policy = to_settings(attached(model)[1].depth_policy) if is_attached(model) else None
    request = {key: about[key] for key in ("method", "task", "questions", "scope")}
    header = {**request, "seed": seed, "set": items_digest(items), "policy": policy}
    path = folder(out.parent) / f"{out.stem}.measured.jsonl"
    return Measurements(path, {**header, "weights": weights_digest(model)})


@contextmanager
def _measuring(
    method: str, questions: int, measurements: Measurements
) -> Generator[Callable[[int, int], None]]:
    """Says how much is to be measured, shows how far it is, and says what Ctrl-C leaves."""
    announced = False

    def show(done: int, of: int) -> None:
        nonlocal announced
        if not announced:
            announced = True
            there = f"; {done} of them are in {measurements.path}" if done else ""
            terminal.note(
                f"trol plan: {method} makes {of} measurements at most, on {questions} "
                f"questions{there}."
            )
        bar(done, of)

    def hint() -> str:
        return (
            f"Stopped. {measurements.path} keeps {len(measurements.values)} measurements; the same "
            "command goes on from there."
        )

    with terminal.on_interrupt(hint), terminal.progress(method, "measurement") as bar:
        yield show


def _text(content: dict[str, Any], layers: int, out: Path) -> str:
    lines = [content["plan"], f"{sum(content['visits'])} of {layers} layers, written to {out}"]
    if scope := content.get("scope"):
        lines.append(f"chosen for scope={scope}: {SCOPES[scope]}")
    if draft := content.get("draft"):
        speed = draft["measured"]
        lines.append(
            f"drafting {draft['tokens']} tokens a round, it says {draft['agreement']:.0%} of the "
            f"model's own tokens: {speed['ratio']:.2f} ± {speed['spread']:.2f} times as fast as "
            f"without, one question at a time (predicted {draft['predicted_speedup']:.2f})"
        )
        if speed["ratio"] <= 1:
            lines.append("No draft of this model saves time here; decode without.")
    return "\n".join(lines)
