"""`trol plan`: which layers a model keeps at a share of its depth, as a plan file."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from trol.cli import terminal
from trol.cli.models import check_file, write_plan
from trol.cli.terminal import run_record
from trol.errors import UsageError, unknown

if TYPE_CHECKING:
    from collections.abc import Callable

    from trol.depth import Plan
    from trol.evaluation.items import Item
    from trol.evaluation.store import Measurements

EXAMPLES = (
    "trol plan --method uniform --keep 0.5",
    "trol plan --method greedy --keep 0.5 --task boards --questions 36 --out runs/greedy.json",
    "trol plan --method influence --keep 0.75 --scope all --task boards --questions 36 --json",
)

TIMED = 8
"""Questions that a draft is timed on."""
TIMED_TOKENS = 32
"""Longest answer to them. Unit: tokens."""


def plan(
    model: terminal.Model = terminal.DEFAULT_MODEL,
    *,
    method: Annotated[
        str,
        typer.Option(
            "--method",
            metavar="NAME",
            help="uniform, random, exit, middle; by measure: influence, greedy, draft.",
        ),
    ] = "uniform",
    keep: Annotated[
        float | None,
        typer.Option(
            "--keep", metavar="SHARE", help="Share of the layers that stay; draft needs none."
        ),
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(
            "--task",
            metavar="NAME",
            help="Questions to measure on: text:FILE, chat:FILE, alpaca:FILE, ... "
            "Default: boards for a model that sees, else docstrings.",
        ),
    ] = None,
    questions: Annotated[
        int, typer.Option("--questions", metavar="N", min=1, help="How many of them.")
    ] = 64,
    scope: Annotated[
        str,
        typer.Option(
            "--scope",
            metavar="ROLES",
            help="Who skips: answer, question, all (as `trol export` bakes it).",
        ),
    ] = "answer",
    seed: terminal.Seed = 0,
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="The plan file.")] = Path(
        "runs/plan.json"
    ),
    as_json: terminal.AsJson = False,
) -> None:
    """Choose the layers that MODEL keeps at a share of its depth.

    What is measured for greedy and draft is kept beside FILE until the plan is there: the same
    command goes on where it was stopped.
    """
    check_file(out)
    _check(method, keep, scope, task)
    measured_on: dict[str, Any] = {"task": task, "questions": questions, "scope": scope}
    terminal.no_library_bars()
    with terminal.noise_to_stderr():
        made, layers, kept = _made(model, method, keep, seed=seed, measured_on=measured_on, out=out)
    about = {"model": model, "method": method, "keep": keep, **measured_on}
    found = write_plan(out, made, layers, {**about, "run": run_record(seed)})
    if kept is not None:
        kept.finish()
    terminal.report(
        {**found, "file": str(out)},
        as_json=as_json,
        text=lambda: _told(found, layers, out),
    )


def _made(
    model: str,
    method: str,
    keep: float | None,
    *,
    seed: int,
    measured_on: dict[str, Any],
    out: Path,
) -> tuple[Plan, int, Measurements | None]:
    """The plan, how many layers the model has, and what was measured, if anything was.

    Leaves in `measured_on` what was used of it.
    """
    from trol.cli.models import open_model
    from trol.evaluation.plan_search import chosen_plan, draft_plan
    from trol.evaluation.tasks import default_task, questions_of
    from trol.evaluation.timing import measured_speed
    from trol.host.layers import find_decoder, layer_list
    from trol.policies.planned import STATIC, static_plan

    opened, processor = open_model(model)
    layers = len(layer_list(find_decoder(opened)) or ())
    if method in STATIC:
        measured_on.clear()
        return static_plan(method, layers, cast(float, keep), seed), layers, None
    scope, task = measured_on["scope"], measured_on["task"] or default_task(processor)
    measured_on["task"] = task
    # Of the validation split, so that a test sees none of them.
    count = measured_on["questions"]
    items = questions_of(opened, processor, task, count, seed=seed, split="validation")
    measured_on["questions"] = len(items)
    kept = _kept(opened, items, out, {"method": method, **measured_on, "seed": seed})
    with _measuring(method, len(items), kept) as progress:
        if method == "draft":
            chosen = draft_plan(opened, processor, items, keep, progress=progress, measured=kept)
            terminal.note(f"trol plan: '{chosen.plan}' promises most, and is timed.")
            speed = measured_speed(
                opened,
                processor,
                items[:TIMED],
                chosen.plan,
                chosen.tokens,
                new_tokens=TIMED_TOKENS,
            )
            measured_on["draft"] = {**asdict(chosen), "plan": str(chosen.plan), "measured": speed}
            return chosen.plan, layers, kept
        made = chosen_plan(
            method,
            opened,
            processor,
            items,
            cast(float, keep),
            scope=scope,
            progress=progress,
            measured=kept,
        )
    return made, layers, kept


def _kept(model: Any, items: Sequence[Item], out: Path, asked: dict[str, Any]) -> Measurements:
    """What was measured before for this plan file, and where more of it goes."""
    from trol.checkpoints.adapter import weights_digest
    from trol.depth import attached, is_attached
    from trol.depth.policy import to_settings
    from trol.evaluation.store import Measurements, items_digest
    from trol.files import folder

    policy = to_settings(attached(model)[1].depth_policy) if is_attached(model) else None
    header = {**asked, "set": items_digest(items), "policy": policy}
    path = folder(out.parent) / f"{out.stem}.measured.jsonl"
    return Measurements(path, {**header, "weights": weights_digest(model)})


@contextmanager
def _measuring(
    method: str, questions: int, kept: Measurements
) -> Generator[Callable[[int, int], None]]:
    """Says how much is to be measured, shows how far it is, and says what Ctrl-C leaves."""
    with terminal.progress(method, "measurement") as shown:

        def told(done: int, of: int) -> None:
            if not said:
                said.append(of)
                there = f"; {done} of them are in {kept.path}" if done else ""
                terminal.note(
                    f"trol plan: {method} makes {of} measurements at most, on {questions} "
                    f"questions{there}."
                )
            shown(done, of)

        said: list[int] = []
        try:
            yield told
        except KeyboardInterrupt:
            terminal.note(
                f"Stopped. {kept.path} keeps {len(kept.values)} measurements; the same command "
                "goes on from there."
            )
            raise


SCOPES = {
    "answer": "the tokens of answers; prompts visit every layer",
    "question": "the tokens of questions; answers visit every layer",
    "all": "every token",
}
"""Scope -> who skips, in words."""


def _told(found: dict[str, Any], layers: int, out: Path) -> str:
    lines = [found["plan"], f"{sum(found['visits'])} of {layers} layers, written to {out}"]
    if scope := found.get("scope"):
        lines.append(f"chosen for scope={scope}: {SCOPES[scope]}")
    if draft := found.get("draft"):
        speed = draft["measured"]
        lines.append(
            f"drafting {draft['tokens']} tokens a round, it says {draft['agreement']:.0%} of the "
            f"model's own tokens: {speed['ratio']:.2f} ± {speed['spread']:.2f} times as fast as "
            f"without, one question at a time (predicted {draft['predicted_speedup']:.2f})"
        )
        if speed["ratio"] <= 1:
            lines.append("No draft of this model saves time here; decode without.")
    return "\n".join(lines)


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
