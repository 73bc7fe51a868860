"""The model in the package: small, offline, and as good on fresh test boards as promised."""

from pathlib import Path
from typing import Any

import pytest

from trol import depth, trace
from trol.evaluation import evaluate
from trol.family.loading import load_model, shipped_folder
from trol.training import resolve

FRESH = 4242
"""An evaluation seed that no development run looked at: other test boards, other questions."""

AT_LEAST = {"digit": 0.95, "colour": 0.95, "exists": 0.90, "count": 0.90}
"""Accuracy that the shipped model must keep."""

ABOVE_CHANCE = {"compare": 0.15, "relation": 0.15, "hop1": 0.15, "hop2": 0.15, "hop3": 0.15}
"""By how much it must beat the better of two blind guesses."""


@pytest.fixture(scope="module")
def shipped() -> tuple[Any, Any]:
    return load_model("trol-tiny")


def test_it_is_a_few_megabytes_of_safetensors_and_no_pickle() -> None:
    files = list(Path(shipped_folder("trol-tiny")).iterdir())
    assert sum(path.stat().st_size for path in files) < 4_000_000
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".jinja", ".yaml"}


def test_it_was_trained_by_the_recipe_that_is_carried() -> None:
    assert resolve(Path(shipped_folder("trol-tiny")) / "recipe.yaml") == resolve("tiny")


def test_it_is_accurate_on_fresh_boards(shipped: tuple[Any, Any]) -> None:
    task = evaluate(*shipped, ["boards"], questions=1800, seed=FRESH)["tasks"]["boards"]
    right, chance = task["by_type"], task["chance_by_type"]
    short = {kind: right[kind] for kind, least in AT_LEAST.items() if right[kind] < least}
    assert not short, f"below the promise: {short}"
    lucky = {k: right[k] for k, more in ABOVE_CHANCE.items() if right[k] < chance[k] + more}
    assert not lucky, f"not well above chance: {lucky}"


def test_it_traverses_the_question_and_not_the_answer(shipped: tuple[Any, Any]) -> None:
    model, processor = shipped
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "text", "text": "is there a 7?"}]}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    asked = inputs["input_ids"].shape[1]
    with trace(model) as seen:
        model.generate(**inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert (seen.visits[..., :asked] == 2).all()
    assert (seen.visits[..., asked:] == 1).all()
    with depth(model, "plain"), trace(model) as off:
        model(**inputs)
    assert (off.visits == 1).all()
