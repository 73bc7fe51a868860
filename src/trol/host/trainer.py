"""transformers' Trainer: the moments at which trol takes part, under names of our own."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from torch import nn
from transformers import Trainer, TrainerCallback
from transformers.integrations.integration_utils import TensorBoardCallback
from transformers.trainer_utils import get_last_checkpoint, rotate_checkpoints

from trol.errors import HostError
from trol.host import sharding

COUNTERS = {
    "loss": "_tr_loss",
    "total": "_total_loss_scalar",
    "logged": "_globalstep_last_logged",
}
"""What Trainer keeps of the losses since it last logged, and leaves out of its checkpoints."""

OVERRIDDEN = (
    "_get_output_dir",
    "_save_checkpoint",
    "_save",
    "_load_from_checkpoint",
    "_save_optimizer_and_scheduler",
    "_load_optimizer_and_scheduler",
    "create_accelerator_and_postprocess",
    "compute_loss_context_manager",
)
"""Methods of Trainer that `StepwiseTrainer` overrides."""

SWITCHES = ("model_accepts_loss_kwargs", "is_fsdp_enabled", "is_deepspeed_enabled")
"""Attributes of a Trainer that say how it trains."""


class StepwiseTrainer(Trainer):
    """A Trainer that writes and reads its checkpoints by the first six methods below.

    A subclass that sets `units`, before its own `__init__` calls this one, trains under FSDP2.

    Raises:
        HostError: this transformers' Trainer lacks a method or attribute that they need.
    """

    units: Sequence[nn.Module] | None = None
    """The layers that are gathered one at a time; None where parameters are not sharded."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        missing = [n for n in (*OVERRIDDEN, *SWITCHES) if not hasattr(Trainer, n)]
        missing = [name for name in missing if name not in vars(self)]
        if missing:
            raise HostError(
                f"this transformers' Trainer has no {', '.join(missing)}, so its checkpoints would "
                "not be what trol promises; run `trol info`, which says what else differs."
            )

    def checkpoint_folder(self) -> Path:
        """The folder of Trainer's next checkpoint."""
        raise NotImplementedError

    def write_checkpoint(self, write: Callable[[], None]) -> None:
        """Calls `write`, which writes Trainer's own part of the next checkpoint."""
        raise NotImplementedError

    def write_weights(self, folder: Path) -> None:
        """Writes the model's part of a checkpoint."""
        raise NotImplementedError

    def read_weights(self, folder: Path) -> None:
        """Reads the model's part of a checkpoint."""
        raise NotImplementedError

    def write_share(self, folder: Path) -> None:
        """Writes this process's part of a sharded checkpoint: weights, optimiser and schedule."""
        raise NotImplementedError

    def read_share(self, folder: Path) -> None:
        """Reads this process's optimiser and schedule; its weights come by `read_weights`."""
        raise NotImplementedError

    @property
    def divides_by_tokens(self) -> bool:
        """Whether the model's loss is divided by the number of answer tokens in the whole batch."""
        return self.model_accepts_loss_kwargs

    @divides_by_tokens.setter
    def divides_by_tokens(self, value: bool) -> None:
        self.model_accepts_loss_kwargs = value

    @property
    def since_last_log(self) -> dict[str, float]:
        """The losses since Trainer last logged, as JSON values."""
        return {name: float(getattr(self, own)) for name, own in COUNTERS.items()}

    @since_last_log.setter
    def since_last_log(self, values: dict[str, float]) -> None:
        self._tr_loss += values["loss"]
        self._total_loss_scalar = values["total"]
        self._globalstep_last_logged = int(values["logged"])

    def _get_output_dir(self, trial: Any) -> str:
        return str(self.checkpoint_folder())

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self.write_checkpoint(lambda: Trainer._save_checkpoint(self, model, trial))

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if self.args.should_save:
            assert output_dir is not None
            self.write_weights(Path(output_dir))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.units is None:
            super()._save_optimizer_and_scheduler(output_dir)
        else:
            self.write_share(Path(output_dir))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if self.units is None or checkpoint is None:
            super()._load_optimizer_and_scheduler(checkpoint)
        else:
            self.read_share(Path(checkpoint))

    def create_accelerator_and_postprocess(self) -> None:
        """The accelerator of Trainer, which shards the model where there are units."""
        super().create_accelerator_and_postprocess()
        if self.units is not None:
            assert isinstance(self.model, nn.Module)
            sharding.take_up(self.accelerator, self.model, self.units)
            self.is_fsdp_enabled = True
        if sharding.is_asked_for(sharding.DEEPSPEED) and not self.is_deepspeed_enabled:
            raise HostError(
                "DeepSpeed was asked for, but accelerate has left it out; start the processes with "
                "accelerate launch, or train with DDP."
            )

    def compute_loss_context_manager(self) -> ExitStack:
        """What surrounds a forward pass; accelerate puts autocast around all models but FSDP2's."""
        around = super().compute_loss_context_manager()
        if self.units is not None:
            around.enter_context(self.accelerator.autocast())
        return around

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self.read_weights(Path(resume_from_checkpoint))


def checkpoint_activations(model: Any, **settings: Any) -> None:
    """Computes a model's layers again in the backward pass, instead of keeping them: less memory.

    `settings` go to `torch.utils.checkpoint.checkpoint`; `use_reentrant` is False by default.
    """
    names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")
    enable = next(getattr(model, name) for name in names if hasattr(model, name))
    enable({"use_reentrant": False} | settings)


def newest_checkpoint_in(folder: Path) -> str | None:
    """The newest checkpoint in a folder."""
    return get_last_checkpoint(str(folder))


def keep_newest(folder: Path, count: int) -> None:
    """Deletes all checkpoints in a folder but the newest `count`."""
    rotate_checkpoints(str(folder), count)


def tensorboard(folder: Path) -> TrainerCallback:
    """The callback that writes Trainer's logs into `folder`, for TensorBoard."""
    from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415 - tensorboard is optional

    return TensorBoardCallback(SummaryWriter(log_dir=str(folder)))
