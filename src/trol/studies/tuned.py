"""Arms that train first: a short run of trol's own training on docstrings, then held-out losses.

The model's weights are rounded to bfloat16 and training computes in it, which halves its time. All
losses are measured in float32, those before training too, so that the rounding is in every arm.
"""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from trol.depth import detach
from trol.evaluation.answers import losses
from trol.evaluation.tasks import questions_of
from trol.files import folder
from trol.studies.subject import Subject, rounded
from trol.training import Recipe, Stage, reopened, run
from trol.training.opening import opened

DATA = "docstrings"
"""Questions about Python's library: `train` is learnt from, `test` judges."""

PLAIN = {"policy": "plain"}
"""The policy of an arm whose layers are all visited once."""


def held_out(subject: Subject, model: Any, processor: Any) -> list[float]:
    """Nats per token of each held-out answer, under the policy in force."""
    count = subject.amounts["questions"]
    items = questions_of(model, processor, DATA, count, seed=0, split="test")
    return rounded(losses(model, processor, items))


def untuned(subject: Subject) -> Any:
    """The model that every arm starts from, without a policy."""
    stage = Stage(train=("decoder",), data=DATA, steps=1)
    model, _ = opened(_recipe(subject, PLAIN, 0, stage), None)
    detach(model)
    return model.float().eval()


def tuned(
    subject: Subject, name: str, policy: dict[str, Any], *, seed: int, **stage: Any
) -> list[float]:
    """Held-out losses after a short training under a policy.

    Args:
        subject: whose model is trained, a fresh one each time.
        name: what progress calls the run.
        policy: the policy's settings, under which it learns and is measured.
        seed: of what is drawn.
        stage: what learns, how fast, and how long if not `amounts["steps"]`.
    """
    how = {name: subject.amounts[name] for name in ("steps", "batch")}
    how |= {"data": DATA, "schedule": "cosine", "merge": False, **stage}
    recipe = _recipe(subject, policy, seed, Stage(**how))
    with TemporaryDirectory(dir=folder(subject.folder)) as place:
        run(recipe, Path(place) / "run", label=f"{name}, ")
        model, processor = reopened(Path(place) / "run")
        return held_out(subject, model.float().eval(), processor)


def _recipe(subject: Subject, policy: dict[str, Any], seed: int, stage: Stage) -> Recipe:
    stages = {"tune": stage}
    return Recipe(host=subject.name, policy=policy, seed=seed, precision="bf16", stages=stages)
