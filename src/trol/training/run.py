"""Running a recipe: its stages one after another, each on transformers' Trainer."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Sequence
from contextlib import nullcontext
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub.errors import StrictDataclassError
from transformers import PrinterCallback, Trainer, TrainingArguments, set_seed

from trol.data.boards import make_board
from trol.data.pools import BoardPool, board_pool
from trol.data.questions import questions
from trol.depth import depth
from trol.errors import UsageError
from trol.family import TrolForConditionalGeneration, TrolProcessor, tiny, tiny_processor
from trol.training.low_rank import low_rank
from trol.training.optimiser import optimiser, schedule
from trol.training.parts import let_learn
from trol.training.progress import Progress
from trol.training.recipe import Recipe, Stage
from trol.training.stages import LESSONS, NOTHING, Lesson

BOARD_SEEDS = 1_000_000
"""Board seeds that belong to one recipe seed."""


class Asks(NamedTuple):
    """Which boards and questions a stage learns from; the arguments of `board_pool`."""

    boards: int
    turns_each: int
    packed: float
    easy: bool
    fewest: int
    drawn: bool


def _asks(stage: Stage, lesson: Lesson) -> Asks:
    boards = min(stage.boards, stage.steps * stage.batch)
    asks = (boards, stage.questions, stage.packed, stage.easy)
    return Asks(*asks, fewest=lesson.fewest, drawn=lesson.drawn)


def run(
    recipe: Recipe,
    out: Path,
    *,
    start: Path | None = None,
    only: Sequence[str] | None = None,
    label: str = "",
) -> dict[str, Any]:
    """Trains the recipe's stages and saves model, processor, recipe and losses in `out`.

    Args:
        recipe: what to train.
        out: the folder to save in; nothing is written before training is over.
        start: the folder of an earlier run to go on from, in place of a new model.
        only: names of the stages to run; all if None.
        label: goes in front of each line of progress.

    Returns:
        `{"model", "seed", "losses": {stage: {"steps", "losses"}}, "parameters", "steps",
        "seconds": {stage: s}}`.

    Raises:
        UsageError: `only` names a stage that the recipe does not have.
    """
    stages = _chosen(recipe, only)
    if out.exists() and not out.is_dir():
        raise UsageError(f"{str(out)!r} is a file; name a folder to save the model in.")
    set_seed(recipe.seed)
    model, processor = _opened(recipe, start)
    found: dict[str, Any] = {"losses": {}, "seconds": {}}
    for name, stage in stages.items():
        began = time.perf_counter()
        model, found["losses"][name] = _train(
            model, processor, stage, recipe.seed, Progress(f"{label}{name}", stage.steps)
        )
        found["seconds"][name] = round(time.perf_counter() - began, 1)
    found |= {
        "model": str(out),
        "seed": recipe.seed,
        "parameters": sum(p.numel() for p in model.parameters()),
        "steps": sum(stage.steps for stage in stages.values()),
    }
    _save(model, processor, recipe, found, out)
    return found


def _chosen(recipe: Recipe, only: Sequence[str] | None) -> dict[str, Stage]:
    names = list(recipe.stages) if only is None else list(only)
    for name in names:
        if name not in recipe.stages:
            raise UsageError(f"the recipe has no stage {name!r}, but {', '.join(recipe.stages)}.")
    return {name: recipe.stages[name] for name in names}


def _opened(recipe: Recipe, start: Path | None) -> tuple[Any, TrolProcessor]:
    if start is None:
        processor = tiny_processor(_texts())
        try:
            config = tiny(len(processor.tokenizer), **recipe.preset, depth=recipe.policy)
            return TrolForConditionalGeneration(config), processor
        except (StrictDataclassError, TypeError, ValueError, ZeroDivisionError) as error:
            raise UsageError(
                f"no model can be made from preset {recipe.preset}: {error}"
            ) from error
    processor = TrolProcessor.from_pretrained(start)
    model = TrolForConditionalGeneration.from_pretrained(start, depth=recipe.policy)
    return model, processor


def _texts() -> list[str]:
    """All words that the boards' questions and answers use."""
    asked = [q for seed in range(400) for q in questions(make_board("train", seed), 9)]
    return [NOTHING, *(q.text for q in asked), *(q.answer for q in asked)]


def _train(
    model: Any, processor: Any, stage: Stage, seed: int, progress: Progress
) -> tuple[Any, dict[str, list[float]]]:
    """One stage; returns the model, low-rank updates merged, and its loss curve."""
    learner = low_rank(model, stage.lora) if stage.lora else model
    let_learn(learner, stage.train, low_rank=bool(stage.lora))
    lesson = LESSONS[stage.data]
    reader = lesson.reader(learner, processor)
    pool = _pool(processor, _asks(stage, lesson), seed)
    reader.train()
    made = optimiser(reader, stage)
    trainer = Trainer(
        model=reader,
        args=_arguments(stage, seed),
        train_dataset=pool,
        data_collator=pool.batch,
        optimizers=(made, schedule(made, stage)),
        callbacks=[progress],
    )
    trainer.remove_callback(PrinterCallback)  # progress is shown by ours
    with nullcontext() if stage.traverse else depth(learner, "plain"):
        trainer.train()
    if stage.lora:
        learner = learner.merge_and_unload()
    learner.requires_grad_(True)
    logged = [
        (entry["step"], entry["loss"]) for entry in trainer.state.log_history if "loss" in entry
    ]
    steps, losses = zip(*logged, strict=True)
    return learner.eval(), {"steps": list(steps), "losses": list(losses)}


@lru_cache(maxsize=4)
def _pool(processor: TrolProcessor, asks: Asks, seed: int) -> BoardPool:
    # Cached, because both arms of a comparison learn from the same boards.
    return board_pool(processor, "train", first=seed * BOARD_SEEDS, **asks._asdict())


def _arguments(stage: Stage, seed: int) -> TrainingArguments:
    return TrainingArguments(
        output_dir="runs",
        max_steps=stage.steps,
        per_device_train_batch_size=stage.batch,
        logging_steps=max(1, stage.steps // 40),
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        seed=seed,
        data_seed=seed,
        dataloader_pin_memory=False,
        label_names=["labels"],
    )


def _save(model: Any, processor: Any, recipe: Recipe, found: dict[str, Any], out: Path) -> None:
    """Writes everything into a folder beside `out`, then moves it into place."""
    partial = out.with_name(out.name + ".partial")
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    model.save_pretrained(partial)
    processor.save_pretrained(partial)
    (partial / "recipe.yaml").write_text(recipe.yaml(), encoding="utf-8")
    told = {key: value for key, value in found.items() if key != "model"}  # folders move
    (partial / "training.json").write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
    if out.exists():
        shutil.rmtree(out)
    partial.replace(out)
