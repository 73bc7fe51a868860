"""transformers' Trainer, with the moments at which trol steps in under names of our own.

What is put around a transformers model: PEFT, torch.compile, a head of somebody's own.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import MethodType
from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.nn.parallel import DataParallel, DistributedDataParallel
from transformers import PreTrainedModel, Trainer, TrainerCallback
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.integrations.integration_utils import TensorBoardCallback
from transformers.trainer_utils import get_last_checkpoint, rotate_checkpoints

from trol.errors import HostError

COUNTERS = {
    "loss": "_tr_loss",
    "total": "_total_loss_scalar",
    "logged": "_globalstep_last_logged",
}
"""What Trainer keeps of the losses since it last logged, and forgets in its checkpoints."""

OVERRIDDEN = ("_get_output_dir", "_save_checkpoint", "_save", "_load_from_checkpoint")
"""Methods of Trainer that `StepwiseTrainer` takes the place of."""

SWITCHES = ("model_accepts_loss_kwargs", "is_fsdp_enabled")
"""Attributes of a Trainer that say how it trains."""


class StepwiseTrainer(Trainer):
    """Trainer that writes its checkpoints, and reads them, by the methods below.

    Raises:
        HostError: this transformers' Trainer does not have what is used of it.
    """

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
        """The folder in which Trainer lays its next checkpoint down."""
        raise NotImplementedError

    def write_checkpoint(self, write: Callable[[], None]) -> None:
        """Calls `write`, which fills the next checkpoint with what Trainer keeps of a run."""
        raise NotImplementedError

    def write_weights(self, folder: Path) -> None:
        """Writes the model's part of a checkpoint."""
        raise NotImplementedError

    def read_weights(self, folder: Path) -> None:
        """Puts that part back."""
        raise NotImplementedError

    @property
    def divides_by_tokens(self) -> bool:
        """Whether the model is told how many answer tokens the whole batch has, to divide by."""
        return self.model_accepts_loss_kwargs

    @divides_by_tokens.setter
    def divides_by_tokens(self, value: bool) -> None:
        self.model_accepts_loss_kwargs = value

    @property
    def shards_parameters(self) -> bool:
        """Whether no process holds all parameters."""
        return self.is_fsdp_enabled or is_deepspeed_zero3_enabled()

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

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self.read_weights(Path(resume_from_checkpoint))


def checkpoint_activations(model: Any, **settings: Any) -> None:
    """Has a model's layers computed again in the backward pass, instead of kept: less memory.

    `settings` go to `torch.utils.checkpoint.checkpoint`; `use_reentrant` is False if not given.
    """
    names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")
    enable = next(getattr(model, name) for name in names if hasattr(model, name))
    enable({"use_reentrant": False} | settings)


def newest_checkpoint_in(folder: Path) -> str | None:
    """The newest checkpoint that lies in a folder."""
    return get_last_checkpoint(str(folder))


def keep_newest(folder: Path, count: int) -> None:
    """Deletes all checkpoints in a folder but the newest `count`."""
    rotate_checkpoints(str(folder), count)


SPREADING = (DataParallel, DistributedDataParallel, FullyShardedDataParallel, FSDPModule)
"""What looks for parameters once, when it takes a model on: later ones it does not know."""

ENGINES = ("deepspeed",)
"""Packages whose wrappers do so as well."""


PREPARES = "prepare_inputs_for_generation"
KEPT = f"base_model_{PREPARES}"
"""Where PEFT's prompt learning keeps the model's own method, while it puts one in its place."""


def model_inside(model: nn.Module) -> nn.Module:
    """The outermost transformers model in a wrapper, whose `generate` is the one that runs.

    A module without any is given back as it is.

    Raises:
        HostError: the wrapper would not know the parameters that a policy brings.
    """
    package = type(model).__module__.partition(".")[0]
    if isinstance(model, SPREADING) or package in ENGINES:
        raise HostError(
            f"{type(model).__name__} has taken on its parameters already and would leave those of "
            "a policy out; attach the policy first, then wrap the model."
        )
    return next((m for m in model.modules() if isinstance(m, PreTrainedModel)), model)


def rebind(wrapper: nn.Module, model: nn.Module) -> None:
    """Gives a wrapper that kept a method of the model inside the one that its class has now."""
    left = vars(model).get(PREPARES)  # PEFT leaves it on the model after its first generate
    if getattr(left, "__self__", None) is model:
        delattr(model, PREPARES)
    for around in wrapper.modules():
        if getattr(vars(around).get(KEPT), "__self__", None) is model:
            setattr(around, KEPT, MethodType(getattr(type(model), PREPARES), model))


def tensorboard(folder: Path) -> TrainerCallback:
    """The callback that writes Trainer's logs into `folder`, for TensorBoard."""
    from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415 - tensorboard is optional

    return TensorBoardCallback(SummaryWriter(log_dir=str(folder)))
