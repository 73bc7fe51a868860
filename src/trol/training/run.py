"""A training run by a recipe: its stages one after another, on transformers' Trainer."""

import gc
import json
import sys
import time
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import PrinterCallback, TrainingArguments, set_seed

from trol.data.conversations import NAMED
from trol.depth import depth
from trol.errors import TrainingError, UsageError, unknown
from trol.host import processes, sharding
from trol.host.trainer import tensorboard
from trol.host.weights import is_quantised
from trol.training import run_folder
from trol.training.adapters import finished, learner_of, save_trained
from trol.training.losses import exit_loss
from trol.training.opening import opened
from trol.training.progress import GATE, Progress
from trol.training.recipe import Recipe, Stage
from trol.training.stage_data import StageData, check_data, sized, stage_data
from trol.training.trainable import units_of
from trol.training.trainer import CheckpointSchedule, GateMeans, StageTrainer

LOGS = 40
"""Points of a loss curve."""

REPORTS = ("tensorboard", "trackio")
"""Trackers that logs can be sent to; each is a package of that name."""

FINDINGS = "training.json"


@dataclass(frozen=True)
class RunContext:
    """What surrounds a stage without changing what it learns."""

    working: run_folder.WorkingFolder | None
    """Where checkpoints go; None for none."""
    deadline: float | None = None
    """When to stop, on the clock of `time.monotonic`."""
    label: str = ""
    """Prefix of each line of progress."""
    report_to: Sequence[str] = ()
    """Trackers that get the logs."""
    logs: Path = Path("runs.logs")
    """The folder that TensorBoard's files go to."""
    shards: bool = False
    """Whether each process keeps a share only while a stage trains: FSDP2, DeepSpeed."""


@dataclass(frozen=True)
class StageResult:
    """The result of a stage."""

    model: Any
    """The model, updates merged where they can be; None where the time was over first."""
    step: int
    """The last step that was made."""
    curve: dict[str, list[Any]]
    """`{"steps", "losses"}`, and `"gates"`: the mean of each layer at each of the steps."""
    seconds: float
    resolved: dict[str, int]
    """`{"steps", "warmup_steps", "left_out"}`: its length, and rows that were left out."""
    left_out: list[str]
    """The first rows that were left out, and why."""


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
    names = list(recipe.stages) if only is None else list(only)
    for name in names:
        if name not in recipe.stages:
            raise UsageError(f"the recipe has no stage {name!r}, but {', '.join(recipe.stages)}.")
    _check(out, max_hours, report_to)
    processes.join()
    shards = processes.shards()
    deadline = None if max_hours is None else time.monotonic() + 3600 * max_hours
    folder = run_folder.WorkingFolder(out)
    begun: dict[str, Any] = {"start": None if start is None else str(start)}
    begun |= {"only": names, "processes": processes.count(), "sharded": shards}
    if not resume:
        folder.refuse_to_forget()
    elif folder.is_begun:
        folder.check(recipe, begun)
    elif (earlier := _finished_before(recipe, names, out)) is not None:
        return earlier
    for name in names:
        check_data(name, recipe.stages[name])
    set_seed(recipe.seed)
    model, processor = opened(recipe, start)
    keeps = resume or bool(recipe.save_every) or max_hours is not None
    if keeps:
        folder.begin(recipe, begun, model)
    logs = out.with_name(out.name + ".logs")
    context = RunContext(folder if keeps else None, deadline, label, report_to, logs, shards)
    model, results = _trained(model, processor, recipe, names, context)
    if "stopped" in results:
        return results
    _save(model, processor, recipe, results, folder)
    return results | {"model": str(out)}


def _check(out: Path, max_hours: float | None, report_to: Sequence[str]) -> None:
    if out.exists() and not out.is_dir():
        raise UsageError(f"{str(out)!r} is a file; name a folder to save the model in.")
    if out.is_dir() and any(out.iterdir()) and not (out / run_folder.RECIPE).is_file():
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
    """The results of the run that has filled `out` already, if it was this recipe's."""
    if not ((out / run_folder.RECIPE).is_file() and (out / FINDINGS).is_file()):
        return None
    results = json.loads((out / FINDINGS).read_text(encoding="utf-8"))
    changed = run_folder.differences((out / run_folder.RECIPE).read_text(encoding="utf-8"), recipe)
    before = list(results["losses"])
    if before != names:
        changed.append(f"its stages were {', '.join(before)} and are {', '.join(names)}")
    if changed:
        raise UsageError(
            f"{out} holds a finished run of another kind: {'; '.join(changed)}. Give another "
            "--out, or leave --resume out to train in its place."
        )
    return results | {"model": str(out)}


def _trained(
    model: Any, processor: Any, recipe: Recipe, names: Sequence[str], context: RunContext
) -> tuple[Any, dict[str, Any]]:
    """The model after the stages that are not over yet, and the results of all."""
    folder = context.working
    results: dict[str, Any] = {"losses": {}, "seconds": {}, "steps": 0}
    results |= {"stages": {}, "left_out": {}}
    over = 0 if folder is None else folder.finished()
    if folder is not None and over:
        for name in names[:over]:  # gives the model the form that these stages left it in
            stage = recipe.stages[name]
            model = finished(learner_of(model, stage), stage)
        results = folder.restore(over, model)
    for number, name in list(enumerate(names, start=1))[over:]:
        stage = train_stage(model, processor, recipe, (number, name), context)
        results["losses"][name], results["seconds"][name] = stage.curve, stage.seconds
        results["stages"][name] = stage.resolved
        if stage.left_out:
            results["left_out"][name] = stage.left_out
        results["steps"] += stage.step
        if stage.model is None:
            return None, results | {"stopped": {"stage": name, "step": stage.step}}
        model = stage.model
        if folder is not None:
            folder.finish(number, model, results)
    parameters = sum(p.numel() for p in model.parameters())
    return model, results | {"seed": recipe.seed, "parameters": parameters}


def _save(
    model: Any,
    processor: Any,
    recipe: Recipe,
    results: dict[str, Any],
    folder: run_folder.WorkingFolder,
) -> None:
    """Writes everything into a folder beside `out`, then moves it into place."""
    with run_folder.writing("the trained model", folder.path):
        with run_folder.whole_folder(folder.path / "result") as draft:
            if processes.is_first():
                save_trained(model, recipe, draft)
                processor.save_pretrained(draft)
                (draft / run_folder.RECIPE).write_text(recipe.yaml(), encoding="utf-8")
                text = json.dumps(results, indent=2) + "\n"
                (draft / FINDINGS).write_text(text, encoding="utf-8")
        if processes.is_first():
            folder.deliver()
    processes.wait()


def train_stage(
    model: Any, processor: Any, recipe: Recipe, which: tuple[int, str], context: RunContext
) -> StageResult:
    """Trains the model in a stage, or goes on with it; `which` is its number, from 1, and name.

    Raises:
        TrainingError: the loss is no number any more, or a checkpoint cannot be written.
        UsageError: the stage's data are not what they were when it was begun, or the processes
            cannot train it together.
    """
    name = which[1]
    learner = learner_of(model, recipe.stages[name])
    if context.shards and is_quantised(learner):
        raise UsageError("quantised weights cannot be sharded; train with bits=0, or use DDP.")
    worker = sharding.lend(learner) if context.shards else learner
    data = stage_data(worker, processor, recipe.stages[name], recipe.seed)
    stage = _sized(recipe.stages[name], data.rows, f"{context.label}{name}")
    trainer = _trainer(worker, data, stage, which, recipe=recipe, context=context)
    checkpoint = None if trainer.place is None else run_folder.newest_checkpoint(trainer.place)
    progress = Progress(f"{context.label}{name}") if processes.is_first() else None
    if progress is not None:
        trainer.add_callback(progress)
    try:
        with nullcontext() if stage.traverse else depth(worker, "plain"):
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    finally:
        if progress is not None:
            progress.close()
    step, curve, seconds = trainer.state.global_step, _curve(trainer), round(trainer.seconds, 1)
    # A DistributedDataParallel that is still around would go on collecting gradients.
    trainer.accelerator.free_memory()
    del trainer
    gc.collect()
    if worker is not learner:
        sharding.give_back(worker, learner)
    left = getattr(data.rows, "left_out", {})
    if len(left) > NAMED:
        warnings.warn(f"{name}: {len(left):,} rows were left out as damaged", stacklevel=2)
    resolved = {"steps": stage.steps, "warmup_steps": stage.warmup_steps, "left_out": len(left)}
    done = finished(learner, stage) if step >= stage.steps else None
    return StageResult(done, step, curve, seconds, resolved, list(left.values())[:NAMED])


def _trainer(
    worker: Any,
    data: StageData,
    stage: Stage,
    which: tuple[int, str],
    *,
    recipe: Recipe,
    context: RunContext,
) -> StageTrainer:
    """The Trainer of a stage whose length is known."""
    number, name = which
    place = None
    if context.working is not None:
        context.working.check_data(name, run_folder.data_fingerprint(data.rows, data.collate))
        place = context.working.stage(number)
    callbacks: list[Any] = [
        CheckpointSchedule(0 if place is None else recipe.save_every, context.deadline)
    ]
    if loss := exit_loss(worker, stage):
        data.reader.loss = loss
        callbacks.append(loss)
    if "tensorboard" in context.report_to and processes.is_first():
        callbacks.append(tensorboard(context.logs / name))
    data.reader.train()
    sharded = context.shards and sharding.is_asked_for(sharding.FSDP)
    trainer = StageTrainer(
        name=name,
        stage=stage,
        place=place,
        keep=recipe.keep,
        gates=GateMeans(worker),
        units=units_of(worker, data.reader) if sharded else None,
        model=data.reader,
        args=_arguments(recipe, stage, name, context),
        train_dataset=data.rows,
        data_collator=data.collate,
        callbacks=callbacks,
    )
    trainer.remove_callback(PrinterCallback)  # progress is shown by ours
    return trainer


def _sized(stage: Stage, rows: Any, label: str) -> Stage:
    """The stage with its length; a warm-up that is cut to fit is said on stderr."""
    resolved = sized(stage, rows)
    if resolved.warmup_steps < stage.warmup_steps and processes.is_first():
        print(
            f"{label}: {resolved.steps} steps, so the warm-up is {resolved.warmup_steps} of them, "
            f"not {stage.warmup_steps}",
            file=sys.stderr,
            flush=True,
        )
    return resolved


def device_batch(stage: Stage) -> int:
    """Rows that each of W processes computes at once: batch / (accumulate · W).

    Raises:
        UsageError: the batch cannot be divided so.
    """
    many = processes.count()
    parts = stage.accumulate * many
    if stage.batch % parts:
        raise UsageError(
            f"a batch of {stage.batch} cannot be divided among {many} processes in "
            f"{stage.accumulate} parts each; give a batch that is a multiple of {parts}."
        )
    return stage.batch // parts


def _arguments(recipe: Recipe, stage: Stage, name: str, context: RunContext) -> TrainingArguments:
    """The arguments of Trainer; `opened` turns checkpointing of activations on, in the model.

    Raises:
        UsageError: the batch cannot be divided, or DeepSpeed and Muon are to work together.
        TrainingError: the processes would not train together.
    """
    device = sharding.device_settings()
    arguments = TrainingArguments(
        output_dir="runs",
        run_name=f"{context.logs.stem} {name}",
        project="trol",
        trackio_static_space_id=False,  # nothing leaves this machine
        max_steps=stage.steps,
        per_device_train_batch_size=device_batch(stage),
        gradient_accumulation_steps=stage.accumulate,
        bf16=recipe.precision == "bf16",
        logging_steps=max(1, stage.steps // LOGS),
        logging_nan_inf_filter=False,  # the first NaN is the last step
        use_cpu=device["cpu"],
        ddp_backend=device["backend"],
        save_strategy="no",  # CheckpointSchedule asks for checkpoints
        report_to=[tracker for tracker in context.report_to if tracker != "tensorboard"],
        disable_tqdm=True,
        remove_unused_columns=False,
        seed=recipe.seed,
        data_seed=recipe.seed,
        dataloader_pin_memory=False,
        # Else all gradients would be kept whole until the last part of a batch.
        accelerator_config={"gradient_accumulation_kwargs": {"sync_each_batch": context.shards}},
        label_names=["labels"],
    )
    if arguments.mixed_precision != ("bf16" if arguments.bf16 else "no"):
        raise UsageError(
            f"the launcher's mixed_precision is {arguments.mixed_precision}, the recipe's "
            f"precision {recipe.precision}; set mixed_precision to 'no', the recipe decides."
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
