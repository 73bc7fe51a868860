"""`trol study`: claims about depth, each tested with controls, an interval and a stated rule."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from trol.cli import terminal
from trol.cli.terminal import argument, option, run_record
from trol.errors import unknown

EXAMPLES = (
    "trol study",
    "trol study single-layers --size tiny",
    "trol study skip-or-exit --model HuggingFaceTB/SmolLM2-135M-Instruct --seeds 3",
)
SIZE_HELP = "tiny: on a random model, or on small ones that it trains; real: takes longer."
MODEL_HELP = (
    "What is studied. Default: smollm2, of size tiny a random decoder; some train their own."
)

REAL_MODEL = "smollm2"
TINY_MODEL = "random-decoder"
"""The folder of --out that the random decoder is in."""


def study(
    name: Annotated[str | None, argument("[NAME]", "A study, or all; none lists them.")] = None,
    *,
    model: Annotated[str | None, option("--model", "MODEL", MODEL_HELP)] = None,
    size: Annotated[str, option("--size", "SIZE", SIZE_HELP)] = "real",
    seeds: Annotated[int, option("--seeds", "N", "Of whatever is drawn.", min=1)] = 3,
    shard: terminal.Shard = None,
    out: terminal.Out = Path("runs/studies"),
    as_json: terminal.AsJson = False,
) -> None:
    """Test what is said about depth on a model.

    What is measured is kept in DIR/NAME: the same command goes on where it was stopped.
    """
    from trol.checkpoints.adapter import check_writable
    from trol.evaluation.shards import shard_of
    from trol.studies import STUDIES, study_of

    if name is None:
        described = [
            {"study": one.name, "trains": not one.pretrained, "hypothesis": one.hypothesis}
            for one in map(study_of, STUDIES)
        ]
        lines = [
            f"{one['study']}{' (trains small models)' * one['trains']}\n    {one['hypothesis']}"
            for one in described
        ]
        lines.append("Each line is a hypothesis; docs/studies.md has what was found.")
        terminal.report({"studies": described}, as_json=as_json, text=lambda: "\n".join(lines))
        return
    chosen = [study_of(one) for one in (STUDIES if name == "all" else [name])]
    if size not in chosen[0].amounts:
        raise unknown("size", size, chosen[0].amounts)
    part = shard_of(shard)
    check_writable(out)
    with terminal.quiet_libraries():
        results = []
        for one in chosen:
            named = model if one.pretrained or len(chosen) == 1 else None
            results.append(_run(one, named, size, seeds=seeds, part=part, out=out))
    texts = map(_text, results)
    terminal.report({"results": results}, as_json=as_json, text=lambda: "\n\n".join(texts))


def _run(
    study: Any, model: str | None, size: Any, *, seeds: int, part: tuple[int, int], out: Path
) -> dict[str, Any]:
    from trol.family.pretrained import origin
    from trol.reports.study import write
    from trol.studies.running import run
    from trol.studies.subject import Subject, make_tiny

    place = out / study.name
    is_random = model is None and study.pretrained and size == "tiny"
    if is_random:
        random = out / TINY_MODEL
        model = str(random if random.exists() else make_tiny(random))
    elif model is None:
        model = REAL_MODEL if study.pretrained else ""
    subject = Subject(model, study.amounts[size], seeds, place)
    hint = f"Stopped. {place} keeps every arm that was finished; the same command does the others."
    with terminal.on_interrupt(lambda: hint), terminal.progress(study.name, "arm") as bar:
        result = run(study, subject, shard=part, progress=bar)
    weights = origin(model, subject.model) if model and not is_random else None
    about = {"model": model, "weights": weights, "random": is_random, "size": size}
    about["complete"] = result is not None
    if result is None:
        return {"study": study.name, **about}
    result = {**result, **about, "run": run_record()}
    return {**result, "page": str(write(result, place))}


def _text(result: dict[str, Any]) -> str:
    """The claims with their verdicts, what they were found on, and where the page is."""
    from trol.reports.study import RANDOM, figures, measured_on

    if not result["complete"]:
        return f"{result['study']}: this part is finished, others are missing (--shard)."
    lines = [f"{result['study']}, on {measured_on(result)}, size {result['size']}"]
    lines += [f"  Weights: {result['weights']}"] if result["weights"] else []
    lines += [f"  {RANDOM}"] if result["random"] else []
    for claim in result["claims"]:
        value, interval, bound = figures(claim)
        lines.append(f"  {claim['verdict'].upper()}: {claim['claim']} ({claim['source']})")
        lines.append(f"    {claim['statistic']}: {value} ({interval}; {bound})")
    return "\n".join([*lines, f"  {result['page']}"])
