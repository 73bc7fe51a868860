"""One stage of a recipe: who learns from what, on transformers' Trainer."""

from __future__ import annotations

import gc
import os
import sys
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PrinterCallback, TrainingArguments

from trol.data.pools import TOLD
from trol.depth import depth
from trol.errors import TrainingError, UsageError
from trol.training import processes
from trol.training.losses import teach_exits
from trol.training.optimiser import optimiser, schedule
from trol.training.progress import GATE, GateMeans, Progress, Rhythm
from trol.training.recipe import Recipe, Stage
from trol.training.run_folder import WorkingFolder, data_fingerprint
from trol.training.stage_data import finished, learner_of, material, sized, trainer_settings
from trol.training.trainer import StageTrainer

LOGS = 40
"""Points of a loss curve."""

MEANS_OF_ROWS = ("cells",)
"""Data whose loss is a mean over rows, all of one size; that of the others is over tokens."""


@dataclass(frozen=True)
class Surroundings:
    """What is around a stage, and leaves what it learns as it is."""

    working: WorkingFolder | None
    """Where checkpoints go; None for none."""
    deadline: float | None = None
    """When to stop, on the clock of `time.monotonic`."""
    label: str = ""
    """What stands in front of each line of progress."""
    report_to: Sequence[str] = ()
    """Trainer's integrations that get the logs."""
    logs: Path | None = None
    """Where they write."""


@dataclass(frozen=True)
class Learnt:
    """What a stage gives."""

    model: Any
    """Low-rank updates merged; None where the time was over before the stage."""
    step: int
    """The last step that was made."""
    curve: dict[str, list[Any]]
    """`{"steps", "losses"}`, and `"gates"`: the mean of each layer at each of the steps."""
    seconds: float
    resolved: dict[str, int]
    """`{"steps", "warmup_steps", "left_out"}`: its length, and rows that were left out."""
    left_out: list[str]
    """The first rows that were left out, and why."""


def train_stage(
    model: Any, processor: Any, recipe: Recipe, which: tuple[int, str], around: Surroundings
) -> Learnt:
    """Trains the model in a stage, or goes on with it; `which` is its number, from 1, and name.

    Raises:
        TrainingError: the loss is no number any more, or a checkpoint cannot be written.
        UsageError: the stage's data are not what they were when it was begun, or the processes
            cannot train it together.
    """
    number, name = which
    stage = recipe.stages[name]
    learner = learner_of(model, stage)
    given = material(learner, processor, stage, recipe.seed)
    exits = teach_exits(given.reader, learner, stage)
    asked, stage = stage, sized(stage, given.rows)
    _tell_warmup(f"{around.label}{name}", asked, stage)
    place = checkpoint = None
    if around.working is not None:
        around.working.check_data(name, data_fingerprint(given.rows, given.collate))
        place, checkpoint = around.working.stage(number), around.working.newest(number)
    if around.logs is not None:
        os.environ["TENSORBOARD_LOGGING_DIR"] = str(around.logs / name)
    given.reader.train()
    made = optimiser(given.reader, stage)
    trainer = StageTrainer(
        name=name,
        place=place,
        keep=recipe.keep,
        gates=GateMeans(learner),
        by_tokens=stage.data not in MEANS_OF_ROWS,
        model=given.reader,
        args=_arguments(recipe, stage, name, around),
        train_dataset=given.rows,
        data_collator=given.collate,
        optimizers=(made, schedule(made, stage)),
        callbacks=[Rhythm(0 if place is None else recipe.save_every, around.deadline), *exits],
    )
    trainer.remove_callback(PrinterCallback)  # progress is shown by ours
    with nullcontext() if stage.traverse else depth(learner, "plain"):
        _train(trainer, Progress(f"{around.label}{name}"), checkpoint)
    step, curve, seconds = trainer.state.global_step, _curve(trainer), round(trainer.seconds, 1)
    # A DistributedDataParallel that is still around would go on collecting gradients.
    trainer.accelerator.free_memory()
    del trainer
    gc.collect()
    left = getattr(given.rows, "left_out", {})
    if len(left) > TOLD:
        warnings.warn(f"{name}: {len(left):,} rows were left out as damaged", stacklevel=2)
    resolved = {"steps": stage.steps, "warmup_steps": stage.warmup_steps, "left_out": len(left)}
    done = finished(learner, stage) if step >= stage.steps else None
    return Learnt(done, step, curve, seconds, resolved, list(left.values())[:TOLD])


def _tell_warmup(where: str, asked: Stage, stage: Stage) -> None:
    if stage.warmup_steps < asked.warmup_steps and processes.is_first():
        told = f"{where}: {stage.steps} steps, so the warm-up is {stage.warmup_steps} of them"
        print(f"{told}, not {asked.warmup_steps}", file=sys.stderr, flush=True)


def _train(trainer: StageTrainer, progress: Progress, checkpoint: Path | None) -> None:
    if processes.is_first():
        trainer.add_callback(progress)
    try:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    finally:
        progress.close()


def _arguments(recipe: Recipe, stage: Stage, name: str, around: Surroundings) -> TrainingArguments:
    arguments = TrainingArguments(
        output_dir="runs",
        run_name=f"{around.logs.stem if around.logs else ''} {name}".strip(),
        project="trol",
        trackio_static_space_id=False,  # nothing leaves this machine
        logging_steps=max(1, stage.steps // LOGS),
        logging_nan_inf_filter=False,  # the first NaN is the last step
        use_cpu=processes.on_cpu(),
        save_strategy="no",  # Rhythm asks for checkpoints
        report_to=list(around.report_to),
        disable_tqdm=True,
        remove_unused_columns=False,
        seed=recipe.seed,
        data_seed=recipe.seed,
        dataloader_pin_memory=False,
        label_names=["labels"],
        **trainer_settings(recipe, stage),
    )
    if arguments.world_size != processes.count():
        raise TrainingError(
            f"{processes.count()} processes were started, but each would train alone "
            f"({arguments.parallel_mode}); start them with torchrun or accelerate launch."
        )
    if arguments.deepspeed_plugin is not None and stage.muon:
        raise UsageError(
            f"stages.{name}.muon is {stage.muon}, but DeepSpeed cuts matrices into flat pieces, "
            "which Muon cannot step; set it to 0, or use DDP."
        )
    return arguments


def _curve(trainer: StageTrainer) -> dict[str, list[Any]]:
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    curve: dict[str, list[Any]] = {
        "steps": [entry["step"] for entry in logged],
        "losses": [entry["loss"] for entry in logged],
    }
    gates = [[entry[key] for key in entry if key.startswith(GATE)] for entry in logged]
    return curve | ({"gates": gates} if any(gates) else {})
