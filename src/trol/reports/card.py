"""The model card of a training run, made of the files that the run left."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCardData

from trol.checkpoints.adapter import is_trained
from trol.files import write_whole
from trol.reports import pages
from trol.reports.training_page import FILE, read_findings

OPEN = """```python
import trol

model, processor = trol.load_model({name!r})
```"""

OPEN_ADAPTERS = """```python
from trol.training import reopened

model, processor = reopened({name!r})  # the host, with these adapters on it
```"""


def write(folder: str | Path) -> Path:
    """Writes the model card, `README.md`, into the folder of a run; returns its path.

    Where the card fails, that is a warning, and the path is that of `training.json`.

    Raises:
        DataError: there is no `training.json`, or it is no training run's.
    """
    folder = Path(folder)
    recipe = (folder / "recipe.yaml").read_text(encoding="utf-8")
    opens = OPEN_ADAPTERS if is_trained(folder) else OPEN
    found, kept = read_findings(folder), folder / FILE
    with pages.beside(kept):
        card = render(found, yaml.safe_load(recipe), folder.name, opens)
        return write_whole(folder / "README.md", card)
    return kept


def render(
    found: Mapping[str, Any], recipe: Mapping[str, Any], name: str, opens: str = OPEN
) -> str:
    """The card: what the model is, how to open it, how it was trained, what it answers."""
    host = recipe.get("host") or None
    data = ModelCardData(
        library_name="transformers",
        base_model=host,
        tags=["trol", str(recipe["policy"].get("policy", "trol_mixer"))],
    )
    parts = [
        f"---\n{data.to_yaml()}\n---",
        f"# {name}",
        f"{host or 'A TroL model'} with the depth policy `{recipe['policy']}`, trained by "
        f"[trol](https://pypi.org/project/trol-vlm/): {found['parameters']:,} parameters, "
        f"{found['steps']:,} steps, seed {found['seed']}.",
        opens.format(name=name),
        "## Training",
        _stages(found, recipe),
        "The whole recipe is in `recipe.yaml`, the curves are in `report.html`.",
        *_answers(found.get("validation")),
        *_origin(found.get("run", {})),
    ]
    return "\n\n".join(parts) + "\n"


def _stages(found: Mapping[str, Any], recipe: Mapping[str, Any]) -> str:
    lines = ["| stage | learns | from | loss at the end | seconds |", "|---|---|---|---|---|"]
    for name, curve in found["losses"].items():
        stage = recipe["stages"][name]
        parts = ", ".join(stage["train"])
        loss, seconds = curve["losses"][-1], found["seconds"][name]
        lines.append(f"| {name} | {parts} | {stage['data']} | {loss:.3f} | {seconds} |")
    return "\n".join(lines)


def _answers(validation: Mapping[str, Any] | None) -> list[str]:
    if not validation:
        return []
    metric = validation.get("metric", "accuracy")
    lines = [f"| question type | {metric} | chance |", "|---|---|---|"]
    for kind, share in validation["by_type"].items():
        chance = validation["chance_by_type"].get(kind)
        lines.append(f"| {kind} | {share:.1%} | {'–' if chance is None else f'{chance:.1%}'} |")
    told = f"On {validation['n']} questions of the validation split, one run, no spread:"
    means = [f"{name} {value:.4f}" for name, value in validation.get("metrics", {}).items()]
    in_all = [f"In all: {', '.join(means)}."] if means else []
    return ["## Validation", told, "\n".join(lines), *in_all]


def _origin(run: Mapping[str, Any]) -> list[str]:
    if not run:
        return []
    return ["## Origin", f"`{run['command']}`, commit {run['commit']}, {run['machine']}."]
