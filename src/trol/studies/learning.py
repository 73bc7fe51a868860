"""Models that arms train, kept beside the studies' folders so that these share them."""

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

from trol.checkpoints.adapter import text_digest, weights_digest
from trol.files import folder
from trol.studies.subject import Subject
from trol.training import Recipe, run

MODELS = "models"
"""The folder of what was trained, beside the folders of the studies."""


def learnt(subject: Subject, label: str, recipe: Recipe, start: Path | None = None) -> Path:
    """The folder of a model after a recipe's stages, which are run where nobody has.

    It lies under a digest of the recipe and of what it begins with: other amounts make another.
    """
    begun = "" if start is None else start.name
    text = recipe.yaml().replace(str(subject.folder.parent), "")  # found again if the folder moves
    name = f"{label}-{recipe.seed}-{text_digest(text + begun)[:12]}"

    def train(into: Path) -> None:
        run(recipe, into, start=start, label=f"{label}, seed {recipe.seed}, ")

    return kept(subject, name, train)


def host_of(subject: Subject) -> Path:
    """The folder of the subject's model without the policy that it may have come with."""

    def save(into: Path) -> None:
        subject.model.save_pretrained(into)
        subject.processor.save_pretrained(into)

    return kept(subject, f"host-{weights_digest(subject.model)[:12]}", save)


def kept(subject: Subject, name: str, fill: Callable[[Path], None]) -> Path:
    """The folder of that name, filled elsewhere first, so that half of it is never taken for all.

    Several processes may fill it at once; the first one's stays.
    """
    place = folder(subject.folder.parent / MODELS) / name
    if not place.exists():
        with TemporaryDirectory(dir=place.parent, prefix=".") as draft:
            whole = Path(draft) / place.name
            fill(whole)
            try:
                whole.rename(place)
            except OSError:
                if not place.exists():
                    raise
    return place
