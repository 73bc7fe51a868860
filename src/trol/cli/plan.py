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
    "trol plan --keep 0.5 --questions 36",
    "trol plan --method middle --keep 0.5 --out runs/middle.json",
    "trol plan --method influence --keep 0.75 --scope all --task boards --questions 36 --json",
)
METHOD_HELP = "By measure: greedy, influence, draft; unseen: middle, uniform, random, exit."
KEEP_HELP = "Share of the layers that stay; draft needs none."
SCOPE_HELP = "Tokens that skip: answer, question, all (as `trol export` bakes it)."
QUESTIONS_HELP = (
    "Questions that choose the plan. Default: 64; of text:FILE, 2 windows of 1024 tokens."
)

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
    method: Annotated[str, option("--method", "NAME", METHOD_HELP)] = "greedy",
    keep: Annotated[float | None, option("--keep", "SHARE", KEEP_HELP)] = None,
    task: terminal.Task = None,
    questions: Annotated[int | None, option("--questions", "N", QUESTIONS_HELP, min=1)] = None,
    scope: Annotated[str, option("--scope", "ROLES", SCOPE_HELP)] = "answer",
    seed: terminal.Seed = 0,
    chat_template: terminal.ChatTemplate = None,
    out: Annotated[Path, option("--out", "FILE", "The plan file.")] = Path("runs/plan.json"),
    as_json: terminal.AsJson = False,
) -> None:
    """Choose the layers that MODEL keeps at a share of its depth.

    What is measured for it is kept beside FILE until the plan is there: the same command goes on
    where it was stopped.
    """
    models.check_plan_file(out)
    _check(method, keep, scope, task)
    from trol.evaluation.hidden_states import layers_of
    from trol.evaluation.plan_search import ChosenPlan, chosen_plan, items_to_choose_by
    from trol.evaluation.tasks import default_task
    from trol.policies.planned import STATIC

    about: dict[str, Any] = {"model": model, "method": method, "keep": keep, "scope": scope}
    measurements, items = None, []
    with terminal.quiet_libraries():
        opened, processor = models.open_model(model, chat_template=chat_template)
        if method not in STATIC or scope != "answer":
            task = task or default_task(processor)
            # Of the validation split, so that a test sees none of them.
            items = items_to_choose_by(opened, processor, task, questions, seed=seed)
            about |= {"task": task, "questions": len(items)}
            measurements = _measurements(opened, items, out, about, seed)
        subject = (opened, processor, items)
        unit = "windows" if items and items[0].ids else "questions"
        with _measuring(method, measurements, f"{len(items)} {unit}") as progress:
            search = {"progress": progress, "measured": measurements}
            if method == "draft":
                plan, about["draft"] = _draft(*subject, keep, **search)
                chosen = ChosenPlan(plan)
            else:
                about_tokens: dict[str, Any] = {"scope": scope, "seed": seed}
                share = cast(float, keep)
                chosen = chosen_plan(method, *subject, share, **about_tokens, **search)
    about |= {"keep_first": chosen.keep_first, "losses": chosen.losses}
    layers = layers_of(opened)
    content = models.write_plan(out, chosen.plan, layers, {**about, "run": run_record(seed)})
    if measurements is not None:
        measurements.finish()
    terminal.report(
        {**content, "file": str(out)},
        as_json=as_json,
        text=lambda: _text(content, layers, out, unit),
    )


def _check(method: str, keep: float | None, scope: str, task: str | None) -> None:
    """Raises `UsageError` before a model is opened for what no model can do."""
    from trol.depth.roles import check_scope
    from trol.evaluation.plan_search import METHODS
    from trol.evaluation.tasks import task_of
    from trol.policies.planned import kept_count

    if method not in METHODS:
        raise unknown("method", method, METHODS)
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
    from trol.evaluation.draft_search import draft_plan
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
    method: str, measurements: Measurements | None, items: str
) -> Generator[Callable[[int, int], None]]:
    """Says how much is to be measured, shows how far it is, and says what Ctrl-C leaves."""
    if measurements is None:
        yield lambda done, of: None
        return
    announced = False

    def show(done: int, of: int) -> None:
        nonlocal announced
        if not announced:
            announced = True
            there = f"; {done} of them are in {measurements.path}" if done else ""
            terminal.note(
                f"trol plan: {method} makes {of} measurements at most, on {items}{there}."
            )
        bar(done, of)

    def hint() -> str:
        return (
            f"Stopped. {measurements.path} keeps {len(measurements.values)} measurements; the same "
            "command goes on from there."
        )

    with terminal.on_interrupt(hint), terminal.progress(method, "measurement") as bar:
        yield show


def _text(content: dict[str, Any], layers: int, out: Path, unit: str) -> str:
    lines = [content["plan"], f"{sum(content['visits'])} of {layers} layers, written to {out}"]
    lines.append(f"chosen for scope={content['scope']}: {SCOPES[content['scope']]}")
    if losses := content["losses"]:
        lines.append(
            f"loss of {content['questions']} {unit} of {content['task']}, nats per token: "
            f"{_losses_text(losses, content['keep_first'])}"
        )
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


def _losses_text(losses: dict[str, float], keep_first: int) -> str:
    """The full model's loss, the plan's, and the plan's with another `keep_first`."""
    from trol.evaluation.plan_search import KEEP_FIRST, keep_first_text

    names = {0: "every token in scope skips", KEEP_FIRST: "the first token visits every layer"}
    values = {first: losses.get(keep_first_text(first)) for first in names}
    known = {first: value for first, value in values.items() if value is not None}
    parts = [f"{losses['full']:.3f} the full model"]
    if len(known) == 1:
        return f"{parts[0]}, {known[keep_first]:.3f} this plan"
    for first in (keep_first, *(known.keys() - {keep_first})):
        taken = "this plan, where" if first == keep_first else "if"
        parts.append(f"{known[first]:.3f} {taken} {names[first]} (keep_first={first})")
    return ", ".join(parts)
