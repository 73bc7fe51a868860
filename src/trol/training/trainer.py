"""transformers' Trainer for one stage: its optimiser and rates, its checkpoints, what it watches.

Checkpoints are whole or absent, and a step whose loss or gradient is no number stops the stage.
"""

import json
import math
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback

from trol.depth import attached
from trol.depth.attachment import gates_of
from trol.errors import TrainingError, UsageError
from trol.host.trainer import StepwiseTrainer, keep_newest
from trol.training import run_folder
from trol.training.progress import GATE
from trol.training.recipe import Stage

MUON_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""a, b, c of the iteration X <- a X + (b X X^T + c (X X^T)^2) X (Jordan et al., 2024)."""

MUON_ITERATIONS = 5

BETWEEN_LOGS = "between_logs_{rank}.json"
"""File of a checkpoint with the losses since the last log, which Trainer does not save."""


class BatchedMuon(torch.optim.Optimizer):
    """Momentum, then the nearest semi-orthogonal matrix as the step (Jordan et al., 2024).

        m <- beta m + (1 - beta) g      W <- W - lr sqrt(max(1, rows / columns)) NS(nesterov(m))

    torch.optim.Muon takes one matrix after another, in bfloat16; here those of one shape are
    orthogonalised together: on a CPU with 28 matrices of a 64-wide decoder, 7 ms a step in place
    of 95 (LAB.md).

    Args:
        params: matrices [rows, columns]; all of one parameter group share `lr`.
        lr: the learning rate.
        momentum: beta.
    """

    def __init__(self, params: Iterable[Tensor], lr: float, *, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One step."""
        assert closure is None
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape.setdefault(parameter.shape, []).append(parameter)
            for (rows, columns), matrices in by_shape.items():
                directions = _orthogonal(self._momentum(matrices, group["momentum"]))
                rate = group["lr"] * math.sqrt(max(1.0, rows / columns))
                for matrix, direction in zip(matrices, directions, strict=True):
                    matrix.add_(direction, alpha=-rate)

    def _momentum(self, matrices: list[Tensor], beta: float) -> Tensor:
        """Nesterov's look ahead. Shape: [matrices, rows, columns]."""
        ahead = []
        for matrix in matrices:
            gradient = matrix.grad
            assert gradient is not None
            momentum = self.state[matrix].setdefault("momentum", torch.zeros_like(gradient))
            momentum.lerp_(gradient, 1 - beta)
            ahead.append(gradient.lerp(momentum, beta))
        return torch.stack(ahead)


def _orthogonal(matrices: Tensor) -> Tensor:
    """Newton-Schulz iteration towards U V^T of each matrix. Shape: [N, rows, columns]."""
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    a, b, c = MUON_COEFFICIENTS
    for _ in range(MUON_ITERATIONS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class ChainedOptimizer(torch.optim.Optimizer):
    """Several optimisers that step as one; their parameter groups are the sum of theirs."""

    def __init__(self, parts: Iterable[torch.optim.Optimizer]) -> None:
        self.parts = list(parts)
        groups = [group for part in self.parts for group in part.param_groups]
        super().__init__(groups, {})
        # The very dicts of the parts, so that a schedule which sets a group's rate reaches them.
        self.param_groups = groups

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One step of each part."""
        assert closure is None
        for part in self.parts:
            part.step()

    def state_dict(self) -> dict[str, Any]:
        """The state of each part."""
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the state of each part."""
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self.param_groups = [group for part in self.parts for group in part.param_groups]


def optimiser(model: nn.Module, stage: Stage) -> torch.optim.Optimizer:
    """AdamW for all that learns, or Muon for decoder matrices and AdamW for the rest."""
    matrices, mixers, rest = [], [], []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        inner = ".layers." in name or ".linear_" in name  # of the projector
        if ".depth." in name:
            mixers.append(parameter)
        elif stage.muon and inner and parameter.ndim == 2:
            matrices.append(parameter)
        else:
            rest.append(parameter)
    groups: list[dict[str, Any]] = [{"params": rest, "lr": stage.learning_rate}]
    if mixers:
        groups.append({"params": mixers, "lr": stage.mixer_learning_rate})
    adamw = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.0)
    return ChainedOptimizer([BatchedMuon(matrices, stage.muon), adamw]) if matrices else adamw


def schedule(optimiser: torch.optim.Optimizer, stage: Stage) -> LambdaLR:
    """Linear warm-up over `warmup_steps`, then as `stage.schedule` says, in N = `stage.steps`.

    linear:  flat, then linear to the final rate over the last `decay` of the steps
    cosine:  final + (highest - final) (1 + cos(pi t)) / 2,   t from 0 to 1 after the warm-up

    The rate of step 0 is that of warm-up step 1, where transformers' schedules begin with 0.
    """
    least = stage.final_rate / stage.learning_rate if stage.learning_rate else 0.0

    def share(step: int) -> float:
        if stage.schedule == "cosine":
            done = (step - stage.warmup_steps) / max(1, stage.steps - stage.warmup_steps)
            falling = (1 + math.cos(math.pi * min(1.0, max(0.0, done)))) / 2
        else:
            falling = (stage.steps - step) / max(1.0, stage.decay * stage.steps)
            falling = max(0.0, min(1.0, falling))
        rising = (step + 1) / max(1, stage.warmup_steps)
        return min(1.0, rising, least + (1 - least) * falling)

    return LambdaLR(optimiser, share)


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
        if self.deadline is not None and run_folder.any_process(time.monotonic() > self.deadline):
            control.should_save = control.should_training_stop = True


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
        # Whether the reader gets the number of tokens in the whole batch, to divide by.
        self.divides_by_tokens = self.by_tokens = by_tokens
        if self.shards_parameters:
            raise UsageError(
                "trol train keeps all parameters on each device, and FSDP or ZeRO-3 was asked for, "
                "which would save a shard as the model; use DDP or ZeRO-2 (docs/processes.md)."
            )
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

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *rest: Any) -> Tensor:  # type: ignore[override]
        """The step of Trainer; counts its tokens and checks its loss."""
        if self.by_tokens:
            self.speed.count(inputs["input_ids"].numel() * run_folder.process_count())
        loss = super().training_step(model, inputs, *rest)
        if not torch.isfinite(loss):
            raise self.diverged(f"the loss is {loss.item()}")
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
        if run_folder.is_first_process():
            keep_newest(self.place, self.keep)

    def write_weights(self, folder: Path) -> None:
        """Writes the parameters that learn; the others are as the stage began with them."""
        folder.mkdir(parents=True, exist_ok=True)
        save_file(run_folder.state_of(self.reader, _learns), folder / run_folder.WEIGHTS)

    def read_weights(self, folder: Path) -> None:
        """Reads the parameters that learn."""
        run_folder.put_state(self.reader, _learns, folder / run_folder.WEIGHTS)

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
