"""transformers' Trainer for one stage: its checkpoints, and what it watches.

Checkpoints are whole or absent, and a step whose loss or gradient is no number stops the stage.
"""

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback

from trol.depth import attached
from trol.depth.attachment import gates_of
from trol.errors import TrainingError
from trol.host import processes, sharding
from trol.host.trainer import StepwiseTrainer, keep_newest
from trol.training import run_folder
from trol.training.optimisers import optimiser, schedule, shard_states
from trol.training.progress import GATE
from trol.training.recipe import Stage

BETWEEN_LOGS = "between_logs_{rank}.json"
"""File of a checkpoint with the losses since the last log, which Trainer does not save."""

SHARE = "share-{rank}-of-{count}"
"""Files of a sharded checkpoint: what one process holds of weights (.safetensors), and of
optimiser and schedule (.pt)."""


class GateMeans:
    """The mean of each layer's gate over the tokens of one step, taken from `watch` to `take`.

    Gates that are called with their scope (a controller's) count the tokens in scope.
    """

    def __init__(self, model: nn.Module) -> None:
        stack = attached(model)[1]
        # Exit heads translate states: they have no mean that would say anything.
        self._gates = [] if stack.depth_policy.translates else gates_of(stack)
        self._means: dict[int, list[Tensor]] = {}
        self._handles: dict[int, RemovableHandle] = {}

    def watch(self) -> None:
        """Records all gates until `take`."""
        self._means.clear()
        for layer, gate in enumerate(self._gates):
            if gate is not None and layer not in self._handles:
                self._handles[layer] = gate.register_forward_hook(self._hook(layer))

    def take(self) -> dict[str, float]:
        """`{"gate/0": mean, ...}` since `watch`, of the gates that were called."""
        for handle in self._handles.values():
            handle.remove()
        self._handles.clear()
        if not self._means:
            return {}
        means = torch.stack([torch.stack(parts).mean() for parts in self._means.values()])
        by_layer = zip(sorted(self._means), means.tolist(), strict=True)
        self._means = {}
        return {f"{GATE}{layer}": mean for layer, mean in by_layer}

    def _hook(self, layer: int) -> Any:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            values = output[inputs[1]] if len(inputs) > 1 else output
            if values.numel():
                self._means.setdefault(layer, []).append(values.detach().float().mean())

        return hook


class Speed:
    """Tokens per second, padding included."""

    def __init__(self) -> None:
        self._tokens, self._since = 0, time.perf_counter()

    def count(self, tokens: int) -> None:
        """Notes that a step had so many tokens."""
        self._tokens += tokens

    def since_last(self) -> dict[str, float]:
        """The rate since the last call; nothing where nothing was counted."""
        now = time.perf_counter()
        tokens, seconds = self._tokens, now - self._since
        self._tokens, self._since = 0, now
        return {"tokens_per_second": tokens / seconds} if tokens else {}


class CheckpointSchedule(TrainerCallback):
    """Saves a stage every few steps, and stops it when the time is over.

    Args:
        save_every: steps between checkpoints; 0 for none.
        deadline: when to save and stop, on the clock of `time.monotonic`; None for never.
    """

    def __init__(self, save_every: int, deadline: float | None) -> None:
        self.save_every, self.deadline = save_every, deadline

    def on_step_end(self, _: Any, state: Any, control: Any, **__: Any) -> None:
        """Requests a checkpoint or the end; the last step is saved as the result instead."""
        if state.global_step >= state.max_steps:
            return
        if self.save_every and state.global_step % self.save_every == 0:
            control.should_save = True
        if self.deadline is not None and processes.any_of(time.monotonic() > self.deadline):
            control.should_save = control.should_training_stop = True


class StageTrainer(StepwiseTrainer):
    """One stage of a recipe.

    Args:
        name: the stage's name, for messages.
        stage: the stage, with its length.
        place: the folder for its checkpoints; None for none.
        keep: how many of them are kept.
        gates: the gates whose means are logged.
        units: under FSDP, the layers that are gathered one at a time; else None.
        settings: what Trainer takes.
    """

    def __init__(
        self,
        *,
        name: str,
        stage: Stage,
        place: Path | None,
        keep: int,
        gates: GateMeans,
        units: Sequence[nn.Module] | None,
        **settings: Any,
    ) -> None:
        self.name, self.stage, self.place, self.keep = name, stage, place, keep
        self.gates, self.speed, self.units = gates, Speed(), units
        self.seconds_before = 0.0
        self.began = time.perf_counter()
        super().__init__(**settings)
        # Whether the reader gets the number of tokens in the whole batch, to divide by: the loss
        # of cells is a mean over rows, all of one size.
        self.divides_by_tokens = self.by_tokens = stage.data != "cells"
        self.add_callback(_Guard(self))

    @property
    def reader(self) -> nn.Module:
        """The module that computes the loss; it holds the model."""
        assert isinstance(self.model, nn.Module)
        return self.model

    @property
    def seconds(self) -> float:
        """How long the stage has trained, before it was resumed too."""
        return self.seconds_before + time.perf_counter() - self.began

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """The stage's optimiser."""
        del model
        if self.optimizer is None:
            self.optimizer = optimiser(self.reader, self.stage)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> LambdaLR:
        """The stage's rates."""
        del num_training_steps
        if self.lr_scheduler is None:
            self.lr_scheduler = schedule(optimizer or self.optimizer, self.stage)
        return self.lr_scheduler

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *rest: Any) -> Tensor:  # type: ignore[override]
        """The step of Trainer; counts its tokens and checks its loss."""
        if self.by_tokens:
            self.speed.count(inputs["input_ids"].numel() * processes.count())
        loss = super().training_step(model, inputs, *rest)
        if not torch.isfinite(loss):
            raise self.diverged(f"the loss is {loss.item()}")
        return loss

    def compute_loss(self, *args: Any, **settings: Any) -> Any:
        """The loss of Trainer, which something that learns must have had a part in."""
        loss = super().compute_loss(*args, **settings)
        value = loss[0] if isinstance(loss, tuple) else loss
        if torch.is_grad_enabled() and not value.requires_grad:
            raise TrainingError(
                f"stage {self.name} trains {', '.join(self.stage.train)}, of which its data "
                f"({self.stage.data}) use nothing; name other parts in stages.{self.name}.train."
            )
        return loss

    def diverged(self, what: str) -> TrainingError:
        """The error for a training that has become numerically meaningless."""
        newest = None if self.place is None else run_folder.newest_checkpoint(self.place)
        state = "no checkpoint was written" if newest is None else f"the last good one is {newest}"
        return TrainingError(
            f"stage {self.name}, step {self.state.global_step + 1}: {what}. The step was not "
            f"made; {state}. Lower the learning rate, or look at the data of this step."
        )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """The log of Trainer, with tokens per second and the mean gate of each layer."""
        if "loss" in logs:
            logs |= self.speed.since_last() | self.gates.take()
        super().log(logs, start_time)

    def checkpoint_folder(self) -> Path:
        """Where Trainer writes a checkpoint, before it gets its place."""
        return (
            Path(self.args.output_dir or "")
            if self.place is None
            else self.place / run_folder.DRAFTS
        )

    def write_checkpoint(self, write: Callable[[], None]) -> None:
        """Lets Trainer write it, and puts it in its place once it is whole."""
        assert self.place is not None
        step = self.state.global_step
        what = f"the checkpoint at step {step} of stage {self.name}"
        place = self.place / f"checkpoint-{step}"
        with run_folder.writing(what, self.place), run_folder.whole_folder(place) as draft:
            write()
            between_logs = {**self.since_last_log, "seconds": self.seconds}
            file = draft / BETWEEN_LOGS.format(rank=self.args.process_index)
            file.write_text(json.dumps(between_logs), encoding="utf-8")
        if processes.is_first():
            keep_newest(self.place, self.keep)

    def write_weights(self, folder: Path) -> None:
        """Writes the parameters that learn; the others are as the stage began with them."""
        folder.mkdir(parents=True, exist_ok=True)
        save_file(run_folder.state_of(self.reader, _learns), folder / run_folder.WEIGHTS)

    def read_weights(self, folder: Path) -> None:
        """Reads the parameters that learn, or this process's share of them."""
        file = folder / run_folder.WEIGHTS if self.units is None else self._share(folder, "weights")
        run_folder.put_state(self.reader, _learns, file)

    def write_share(self, folder: Path) -> None:
        """Writes what this process holds: of the weights that learn, optimiser and schedule."""
        assert self.optimizer is not None
        assert self.lr_scheduler is not None
        folder.mkdir(parents=True, exist_ok=True)
        save_file(run_folder.state_of(self.reader, _learns), self._share(folder, "weights"))
        state = sharding.own_share(self.optimizer.state_dict())
        state = {"optimiser": state, "schedule": self.lr_scheduler.state_dict()}
        torch.save(state, self._share(folder, "optimiser"))

    def read_share(self, folder: Path) -> None:
        """Reads this process's optimiser and schedule."""
        assert self.optimizer is not None
        assert self.lr_scheduler is not None
        state = torch.load(self._share(folder, "optimiser"), map_location="cpu", weights_only=True)
        self.optimizer.load_state_dict(state["optimiser"])
        shard_states(self.optimizer)
        self.lr_scheduler.load_state_dict(state["schedule"])

    def _share(self, folder: Path, what: Literal["weights", "optimiser"]) -> Path:
        name = SHARE.format(rank=self.args.process_index, count=self.args.world_size)
        return folder / f"{name}.{'safetensors' if what == 'weights' else 'pt'}"

    def recall_between_logs(self, checkpoint: Path) -> None:
        """Puts back what the checkpoint says of the losses since the last log."""
        path = checkpoint / BETWEEN_LOGS.format(rank=self.args.process_index)
        between_logs = json.loads(path.read_text(encoding="utf-8"))
        self.seconds_before = between_logs.pop("seconds")
        self.since_last_log = between_logs


class _Guard(TrainerCallback):
    """Steps in at Trainer's events: resuming, watching gates, and checking gradients."""

    def __init__(self, trainer: StageTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, _: Any, state: Any, *__: Any, **___: Any) -> None:
        trainer = self.trainer
        trainer.speed.since_last()
        if trainer.units is not None:
            sharding.made_ready(trainer.reader)
        if state.global_step and trainer.place is not None:
            trainer.recall_between_logs(trainer.place / f"checkpoint-{state.global_step}")

    def on_step_begin(self, _: Any, state: Any, *__: Any, **___: Any) -> None:
        if (state.global_step + 1) % state.logging_steps == 0:
            self.trainer.gates.watch()

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        if getattr(self.trainer.accelerator, "scaler", None) is not None:
            return  # it leaves such steps out, and looks for a better scale
        gradients = [p.grad for p in self.trainer.reader.parameters() if p.grad is not None]
        norm = sharding.total_norm(gradients)
        if not torch.isfinite(norm):
            raise self.trainer.diverged(f"the gradient's norm is {norm.item()}")


def _learns(parameter: nn.Parameter) -> bool:
    return parameter.requires_grad
