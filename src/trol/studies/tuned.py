"""Arms that train first: a short run of trol's own training on docstrings, then held-out losses."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from trol.evaluation.answers import losses
from trol.evaluation.tasks import questions_of
from trol.files import folder
from trol.studies.subject import Subject, rounded
from trol.training import Recipe, Stage, reopened, run

DATA = "docstrings"
"""Questions about Python's library: `train` is learnt from, `test` judges."""


def held_out(subject: Subject, model: Any, processor: Any) -> list[float]:
    """Nats per token of each held-out answer, under the policy in force."""
    count = subject.amounts["questions"]
    items = questions_of(model, processor, DATA, count, seed=0, split="test")
    return rounded(losses(model, processor, items))


def tuned(
    subject: Subject, name: str, policy: dict[str, Any], *, seed: int, **stage: Any
) -> list[float]:
    """Held-out losses after a short training under a policy.

    Args:
        subject: whose model is trained, a fresh one each time.
        name: what progress calls the run.
        policy: the policy's settings, under which it learns and is measured.
        seed: of what is drawn.
        stage: what learns, and how fast.
    """
    how = {name: subject.amounts[name] for name in ("steps", "batch")}
    recipe = Recipe(
        host=subject.name,
        policy=policy,
        seed=seed,
        stages={"tune": Stage(data=DATA, schedule="cosine", merge=False, **{**how, **stage})},
    )
    with TemporaryDirectory(dir=folder(subject.folder)) as place:
        run(recipe, Path(place) / "run", label=f"{name}, ")
        model, processor = reopened(Path(place) / "run")
        return held_out(subject, model.eval(), processor)
