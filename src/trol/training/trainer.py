"""transformers' Trainer with checkpoints that are whole, and that stops at the first NaN."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import TrainerCallback

from trol.errors import TrainingError, UsageError
from trol.host.trainer import StepwiseTrainer, keep_newest
from trol.training import processes
from trol.training.progress import GateMeans, Speed
from trol.training.run_folder import (
    DRAFTS,
    WEIGHTS,
    newest_checkpoint,
    not_written,
    put_state,
    state_of,
    whole_folder,
)

BETWEEN_LOGS = "between_logs_{rank}.json"
"""What Trainer itself forgets: the losses since it last logged."""


class StageTrainer(StepwiseTrainer):
    """One stage of a recipe.

    Args:
        name: the stage's name, for messages.
        place: the folder for its checkpoints; None for none.
        keep: how many of them are kept.
        gates: the gates whose means are logged.
        by_tokens: whether the loss is a mean over tokens (and not over rows of one size).
        settings: what Trainer takes.

    Raises:
        UsageError: parameters would be sharded.
    """

    def __init__(
        self,
        *,
        name: str,
        place: Path | None,
        keep: int,
        gates: GateMeans,
        by_tokens: bool,
        **settings: Any,
    ) -> None:
        self.name, self.place, self.keep = name, place, keep
        self.gates, self.speed = gates, Speed()
        self.seconds_before = 0.0
        self.began = time.perf_counter()
        super().__init__(**settings)
        # Whether the reader is told how many tokens the whole batch has, to divide by.
        self.divides_by_tokens = self.by_tokens = by_tokens
        if self.shards_parameters:
            raise UsageError(
                "trol train keeps all parameters on each device, and FSDP or ZeRO-3 was asked for, "
                "which would save a shard as the model; use DDP or ZeRO-2 (docs/processes.md)."
            )
        self.add_callback(_Guard(self))

    @property
    def reader(self) -> nn.Module:
        """The module that learns, and the loss with it."""
        assert isinstance(self.model, nn.Module)
        return self.model

    @property
    def seconds(self) -> float:
        """How long the stage has trained, before it was resumed too."""
        return self.seconds_before + time.perf_counter() - self.began

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *rest: Any) -> Tensor:  # type: ignore[override]
        """Trainer's, counted and checked."""
        if self.by_tokens:
            self.speed.count(inputs["input_ids"].numel() * processes.count())
        loss = super().training_step(model, inputs, *rest)
        if not torch.isfinite(loss):
            raise self.diverged(f"the loss is {loss.item()}")
        return loss

    def diverged(self, what: str) -> TrainingError:
        """The error for a training that has become numerically meaningless."""
        newest = None if self.place is None else newest_checkpoint(self.place)
        state = "no checkpoint was written" if newest is None else f"the last good one is {newest}"
        return TrainingError(
            f"stage {self.name}, step {self.state.global_step + 1}: {what}. The step was not "
            f"made; {state}. Lower the learning rate, or look at the data of this step."
        )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Trainer's, with tokens per second and the mean gate of each layer."""
        if "loss" in logs:
            logs |= self.speed.since_last() | self.gates.take()
        super().log(logs, start_time)

    # Checkpoints. Trainer writes what belongs into one; here it becomes whole.

    def checkpoint_folder(self) -> Path:
        """Where it is drafted."""
        return Path(self.args.output_dir or "") if self.place is None else self.place / DRAFTS

    def write_checkpoint(self, write: Callable[[], None]) -> None:
        """Drafts it, and puts it in its place once it is whole."""
        assert self.place is not None
        step = self.state.global_step
        place = self.place / f"checkpoint-{step}"
        try:
            with whole_folder(place) as draft:
                write()
                self._note_between_logs(draft)
        except (OSError, RuntimeError, SafetensorError) as error:
            what = f"the checkpoint at step {step} of stage {self.name}"
            raise not_written(what, self.place, error) from error
        if processes.is_first():
            keep_newest(self.place, self.keep)

    def write_weights(self, folder: Path) -> None:
        """Only what learns: the rest is in the state that the stage began with."""
        folder.mkdir(parents=True, exist_ok=True)
        save_file(state_of(self.reader, _learns), folder / WEIGHTS)

    def read_weights(self, folder: Path) -> None:
        """Only what learns."""
        put_state(self.reader, _learns, folder / WEIGHTS)

    def _note_between_logs(self, draft: Path) -> None:
        noted = {**self.since_last_log, "seconds": self.seconds}
        path = draft / BETWEEN_LOGS.format(rank=self.args.process_index)
        path.write_text(json.dumps(noted), encoding="utf-8")

    def recall_between_logs(self, checkpoint: Path) -> None:
        """Puts back what the checkpoint says of the losses since the last log."""
        path = checkpoint / BETWEEN_LOGS.format(rank=self.args.process_index)
        noted = json.loads(path.read_text(encoding="utf-8"))
        self.seconds_before = noted.pop("seconds")
        self.since_last_log = noted


class _Guard(TrainerCallback):
    """Does at Trainer's own moments what it has no method for."""

    def __init__(self, trainer: StageTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, _: Any, state: Any, *__: Any, **___: Any) -> None:
        trainer = self.trainer
        trainer.speed.since_last()
        if state.global_step and trainer.place is not None:
            trainer.recall_between_logs(trainer.place / f"checkpoint-{state.global_step}")

    def on_step_begin(self, _: Any, state: Any, *__: Any, **___: Any) -> None:
        if (state.global_step + 1) % state.logging_steps == 0:
            self.trainer.gates.watch()

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        if getattr(self.trainer.accelerator, "scaler", None) is not None:
            return  # it leaves such steps out, and looks for a better scale
        gradients = [p.grad for p in self.trainer.reader.parameters() if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        if not torch.isfinite(norm):
            raise self.trainer.diverged(f"the gradient's norm is {norm.item()}")


def _learns(parameter: nn.Parameter) -> bool:
    return parameter.requires_grad
