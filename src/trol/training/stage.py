"""One stage of a recipe: who learns from what, on transformers' Trainer."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

from transformers import PrinterCallback, Trainer, TrainingArguments

from trol.depth import depth
from trol.training.learning import finished, learner_of, material
from trol.training.optimiser import optimiser, schedule
from trol.training.progress import Progress
from trol.training.recipe import Stage


def train_stage(
    model: Any, processor: Any, stage: Stage, seed: int, progress: Progress
) -> tuple[Any, dict[str, list[float]]]:
    """One stage; returns the model, low-rank updates merged, and its loss curve."""
    learner = learner_of(model, stage)
    reader, rows, collate = material(learner, processor, stage, seed)
    reader.train()
    made = optimiser(reader, stage)
    trainer = Trainer(
        model=reader,
        args=_arguments(stage, seed),
        train_dataset=rows,
        data_collator=collate,
        optimizers=(made, schedule(made, stage)),
        callbacks=[progress],
    )
    trainer.remove_callback(PrinterCallback)  # progress is shown by ours
    with nullcontext() if stage.traverse else depth(learner, "plain"):
        trainer.train()
    logged = [
        (entry["step"], entry["loss"]) for entry in trainer.state.log_history if "loss" in entry
    ]
    steps, losses = zip(*logged, strict=True)
    return finished(learner, stage), {"steps": list(steps), "losses": list(losses)}


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
