"""Running a recipe: its stages one after another, each on transformers' Trainer.

One stage of a recipe: who learns from what, on transformers' Trainer.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import PrinterCallback, TrainingArguments, set_seed

from trol.data.conversations import NAMED
from trol.depth import depth
from trol.errors import TrainingError, UsageError, unknown
from trol.training import processes
from trol.training.losses import teach_exits
from trol.training.opening import opened
from trol.training.optimiser import optimiser, schedule
from trol.training.progress import GATE, GateMeans, Progress, Rhythm
from trol.training.recipe import Recipe, Stage
from trol.training.run_folder import (
    RECIPE,
    WorkingFolder,
    data_fingerprint,
    differences,
    not_written,
    whole_folder,
)
from trol.training.stage_data import (
    check_data,
    finished,
    learner_of,
    material,
    sized,
    trainer_settings,
)
from trol.training.trainable import save_trained
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
    if len(left) > NAMED:
        warnings.warn(f"{name}: {len(left):,} rows were left out as damaged", stacklevel=2)
    resolved = {"steps": stage.steps, "warmup_steps": stage.warmup_steps, "left_out": len(left)}
    done = finished(learner, stage) if step >= stage.steps else None
    return Learnt(done, step, curve, seconds, resolved, list(left.values())[:NAMED])


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


REPORTS = ("tensorboard", "trackio")
"""Trackers that logs can be sent to; each is a package of that name."""

FINDINGS = "training.json"


def run(
    recipe: Recipe,
    out: Path,
    *,
    start: Path | None = None,
    only: Sequence[str] | None = None,
    label: str = "",
    resume: bool = False,
    max_hours: float | None = None,
    report_to: Sequence[str] = (),
) -> dict[str, Any]:
    """Trains the recipe's stages and saves model, processor, recipe and losses in `out`.

    While it trains, `out` is left alone. With `recipe.save_every`, `max_hours` or `resume`, a
    working folder beside it holds all that is needed to go on after the process was killed.

    Args:
        recipe: what to train.
        out: the folder to save in; an earlier run in it is replaced, anything else is refused.
        start: the folder of an earlier run to go on from, in place of a new model.
        only: names of the stages to run; all if None.
        label: goes in front of each line of progress.
        resume: whether to go on where an earlier call with the same arguments was interrupted;
            where there is none, a new run begins.
        max_hours: when to save and stop.
        report_to: trackers, among `REPORTS`; tensorboard's files go into `OUT.logs`.

    Returns:
        `{"model", "seed", "losses": {stage: {"steps", "losses", "gates"}}, "parameters", "steps",
        "seconds": {stage: s}, "stages": {stage: {"steps", "warmup_steps", "left_out"}},
        "left_out": {stage: [the first of such rows, and why]}}`; in place of `"model"`,
        `"stopped": {"stage", "step"}` where the time was over first.

    Raises:
        UsageError: `only` names a stage that the recipe does not have, a tracker is unknown, or
            what is to be resumed is another run.
        DataError: a file that a stage learns from is missing, empty, or has no sound row.
        TrainingError: the loss is no number any more, or the disk takes no more.
    """
    names = _chosen(recipe, only)
    _check(out, max_hours, report_to)
    processes.join()
    deadline = None if max_hours is None else time.monotonic() + 3600 * max_hours
    folder = WorkingFolder(out)
    begun: dict[str, Any] = {"start": None if start is None else str(start)}
    begun |= {"only": names, "processes": processes.count()}
    if not resume:
        folder.refuse_to_forget()
    elif folder.is_begun:
        folder.check(recipe, begun)
    elif (found := _finished_before(recipe, names, out)) is not None:
        return found
    for name in names:
        check_data(name, recipe.stages[name])
    set_seed(recipe.seed)
    model, processor = opened(recipe, start)
    keeps = resume or bool(recipe.save_every) or max_hours is not None
    if keeps:
        folder.begin(recipe, begun, model)
    logs = out.with_name(out.name + ".logs") if report_to else None
    around = Surroundings(folder if keeps else None, deadline, label, report_to, logs)
    model, found = _trained(model, processor, recipe, names, around)
    if "stopped" not in found:
        _save(model, processor, recipe, found, folder)
    return found if "stopped" in found else found | {"model": str(out)}


def _trained(
    model: Any, processor: Any, recipe: Recipe, names: Sequence[str], around: Surroundings
) -> tuple[Any, dict[str, Any]]:
    """The model after the stages that are not over yet, and what there is to say of all."""
    folder = around.working
    found: dict[str, Any] = {"losses": {}, "seconds": {}, "steps": 0}
    found |= {"stages": {}, "left_out": {}}
    over = 0 if folder is None else folder.finished()
    if folder is not None and over:
        for name in names[:over]:  # the form that they left it in
            stage = recipe.stages[name]
            model = finished(learner_of(model, stage), stage)
        found = folder.restore(over, model)
    for number, name in list(enumerate(names, start=1))[over:]:
        learnt = train_stage(model, processor, recipe, (number, name), around)
        found["losses"][name], found["seconds"][name] = learnt.curve, learnt.seconds
        found["stages"][name] = learnt.resolved
        if learnt.left_out:
            found["left_out"][name] = learnt.left_out
        found["steps"] += learnt.step
        if learnt.model is None:
            return None, found | {"stopped": {"stage": name, "step": learnt.step}}
        model = learnt.model
        if folder is not None:
            folder.finish(number, model, found)
    return model, found | {
        "seed": recipe.seed,
        "parameters": sum(p.numel() for p in model.parameters()),
    }


def _chosen(recipe: Recipe, only: Sequence[str] | None) -> list[str]:
    names = list(recipe.stages) if only is None else list(only)
    for name in names:
        if name not in recipe.stages:
            raise UsageError(f"the recipe has no stage {name!r}, but {', '.join(recipe.stages)}.")
    return names


def _check(out: Path, max_hours: float | None, report_to: Sequence[str]) -> None:
    if out.exists() and not out.is_dir():
        raise UsageError(f"{str(out)!r} is a file; name a folder to save the model in.")
    if out.is_dir() and any(out.iterdir()) and not (out / RECIPE).is_file():
        raise UsageError(
            f"{str(out)!r} holds files that are no training run's; name a new folder, so that "
            "nothing in it is lost."
        )
    if max_hours is not None and not max_hours > 0:
        raise UsageError(f"max_hours is {max_hours}; give more than 0.")
    for name in report_to:
        if name not in REPORTS:
            raise unknown("tracker", name, REPORTS)
        if find_spec(name) is None:
            raise UsageError(f"logs cannot go to {name}: it is not installed; pip install {name}.")


def _finished_before(recipe: Recipe, names: list[str], out: Path) -> dict[str, Any] | None:
    """What is known of the run that has filled `out` already, if it was this recipe's."""
    written = out / RECIPE, out / FINDINGS
    if not all(path.is_file() for path in written):
        return None
    before, findings = (path.read_text(encoding="utf-8") for path in written)
    found = json.loads(findings)
    changed = differences(before, recipe)
    if list(found["losses"]) != names:
        changed.append(f"its stages were {', '.join(found['losses'])} and are {', '.join(names)}")
    if changed:
        raise UsageError(
            f"{out} holds a finished run of another kind: {'; '.join(changed)}. Give another "
            "--out, or leave --resume out to train in its place."
        )
    return found | {"model": str(out)}


def _save(
    model: Any, processor: Any, recipe: Recipe, found: dict[str, Any], folder: WorkingFolder
) -> None:
    """Writes everything into a folder beside `out`, then moves it into place."""
    try:
        with whole_folder(folder.path / "result") as draft:
            if processes.is_first():
                save_trained(model, recipe, draft)
                processor.save_pretrained(draft)
                (draft / RECIPE).write_text(recipe.yaml(), encoding="utf-8")
                text = json.dumps(found, indent=2) + "\n"
                (draft / FINDINGS).write_text(text, encoding="utf-8")
        if processes.is_first():
            folder.deliver()
    except (OSError, RuntimeError, SafetensorError) as error:
        raise not_written("the trained model", folder.path, error) from error
    processes.wait()
