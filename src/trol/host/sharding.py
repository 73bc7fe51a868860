"""FSDP2 and DeepSpeed: each process keeps a share of parameters, gradients and states.

Neither can be undone, so a model lends its parameters to a copy (`lend`), which is sharded, and
takes them back (`give_back`). FSDP2's units are the decoder's layers: whatever visits a layer
makes, its parameters are gathered once in a call and once for the gradient. All else is one unit,
whole from the first use to the gradient.
"""

import copy
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, cast

import torch
from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from torch.distributed.tensor import DTensor, Replicate
from torch.utils._pytree import tree_map_only
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from trol.errors import HostError, UsageError

FSDP, DEEPSPEED = "ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"
"""The variables by which `accelerate launch` asks for them."""

PIECE = "ds_id"
"""The attribute of a parameter that ZeRO-3 has cut up."""

OTHER_VERSION = (
    "FSDP 1 was asked for, which flattens parameters, so that trol cannot find a policy's; set "
    "fsdp_version to 2 (carried: src/trol/recipes/fsdp/fsdp2.yaml)."
)


def is_asked_for(which: str) -> bool:
    """Whether the processes were started to train under `FSDP`, or `DEEPSPEED`."""
    return os.environ.get(which, "false").lower() in ("true", "1")


def device_settings() -> dict[str, Any]:
    """What accelerate is told of the device: `{"cpu", "backend"}`.

    Where there is no accelerator, it must know, or each process trains alone. Yet where it is told
    of a CPU, it leaves DeepSpeed out, without a word; told of gloo alone, it takes it.
    """
    on_cpu = not torch.accelerator.is_available()
    if on_cpu and is_asked_for(DEEPSPEED):
        return {"cpu": False, "backend": "gloo"}
    return {"cpu": on_cpu, "backend": None}


def check() -> None:
    """Raises `UsageError` for settings of FSDP under which a policy would be wrong or lost."""
    if not is_asked_for(FSDP):
        return
    plugin = FullyShardedDataParallelPlugin()
    if plugin.fsdp_version != 2:
        raise UsageError(OTHER_VERSION)
    if plugin.activation_checkpointing:
        raise UsageError(
            "fsdp_activation_checkpointing wraps layers, and runs them again where it is not known "
            "how often they were visited; set it to false, and give the recipe checkpointing=true."
        )
    if plugin.cpu_ram_efficient_loading:
        raise UsageError(
            "fsdp_cpu_ram_efficient_loading opens the model empty in all processes but the first, "
            "so that a policy cannot be tried on it; set it to false."
        )


def take_up(accelerator: Accelerator, reader: nn.Module, layers: Sequence[nn.Module]) -> None:
    """Has `accelerator` shard `reader`, with these layers inside it as units.

    accelerate takes FSDP up on GPUs and the like alone; on CPUs it would train with DDP, without a
    word. Its mixed precision would round losses and gates to bfloat16; autocast is kept instead.
    """
    state: Any = accelerator.state
    plugin = getattr(state, "fsdp_plugin", None) or FullyShardedDataParallelPlugin()
    state.distributed_type, state.fsdp_plugin = DistributedType.FSDP, plugin
    plugin.mixed_precision_policy = None
    plugin.set_state_dict_type("SHARDED_STATE_DICT")  # else the whole is gathered in each save
    chosen = plugin.transformer_cls_names_to_wrap
    if plugin.auto_wrap_policy is transformer_auto_wrap_policy and not chosen:
        plugin.transformer_cls_names_to_wrap = sorted({type(layer).__name__ for layer in layers})
    plugin.ignored_modules = _replicated(reader, layers, accelerator.device)


def made_ready(model: nn.Module) -> None:
    """Lets the processes of a sharded model have batches in which other parts take part.

    Where pictures are in one process's share alone, the others reduce zeros with it.

    Raises:
        HostError: the model is not sharded.
    """
    if not isinstance(model, FSDPModule):
        raise HostError(
            f"accelerate was asked for FSDP2 and made a {type(model).__name__}; run `trol info`, "
            "which says what is assumed of it, or train with DDP."
        )
    model.set_reduce_scatter_unused_params(True)


def lend(model: nn.Module) -> nn.Module:
    """A copy of `model` that has its parameters; `model` has empty ones until `give_back`."""
    parameters = {id(parameter): parameter for parameter in model.parameters()}
    borrower = copy.deepcopy(model, dict[int, Any](parameters))
    empty = {
        key: nn.Parameter(torch.empty_like(one, device="meta"), requires_grad=one.requires_grad)
        for key, one in parameters.items()
    }
    _replace(model, empty)
    return borrower


@torch.no_grad()
def give_back(borrower: nn.Module, model: nn.Module) -> None:
    """Puts parameters and buffers of a copy made by `lend`, now whole, back into `model`."""
    learnt = dict(borrower.named_parameters())
    full = {}
    for name, empty in model.named_parameters():
        tensor = whole(learnt[name]).detach().cpu()
        full[id(empty)] = nn.Parameter(tensor, requires_grad=empty.requires_grad)
    _replace(model, full)
    buffers = dict(borrower.named_buffers())
    for name, buffer in model.named_buffers():
        buffer.copy_(buffers[name])
    if is_asked_for(DEEPSPEED):
        # As long as transformers knows of ZeRO-3, each model that is opened is cut up at once.
        unset_hf_deepspeed_config()


def whole(tensor: Tensor) -> Tensor:
    """The tensor that all processes have together; all of them must ask."""
    if hasattr(tensor, PIECE):
        deepspeed: Any = sys.modules["deepspeed"]  # imported: it has cut the tensor up
        with deepspeed.zero.GatheredParameters([tensor]):
            return tensor.data.clone()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def own_share(tree: Any) -> Any:
    """A tensor, or a tree of them, in which sharded ones are this process's shares."""

    def local(tensor: DTensor) -> Tensor:
        return cast(DTensor, tensor.detach()).to_local()

    return tree_map_only(DTensor, local, tree)


def shared_as(share: Tensor, like: Tensor) -> Tensor:
    """A share of this process as a sharded tensor like `like`; where that is none, the share."""
    if not isinstance(like, DTensor):
        return share
    mesh, places = like.device_mesh, like.placements
    sizes = {"shape": like.shape, "stride": like.stride()}
    return DTensor.from_local(share, mesh, places, run_check=False, **sizes)


def cut_as(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, the same in all processes, sharded like `like`."""
    if not isinstance(like, DTensor):
        return tensor
    mesh = like.device_mesh
    everywhere = DTensor.from_local(tensor, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return everywhere.redistribute(mesh, like.placements)


def total_norm(gradients: Iterable[Tensor]) -> Tensor:
    """The norm of all gradients, sharded or not, as one vector. Shape: []."""
    kinds: dict[bool, list[Tensor]] = {}
    for gradient in gradients:
        kinds.setdefault(isinstance(gradient, DTensor), []).append(gradient)
    norms = [whole(nn.utils.get_total_norm(one)) for one in kinds.values()]
    return torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros(())


def _slots(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
    """Each place where a module has a parameter of its own; of tied ones, all places."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                yield module, name, parameter


def _replace(model: nn.Module, by_id: dict[int, nn.Parameter]) -> None:
    """Puts other parameters in the place of some; tied ones stay tied."""
    for module, name, parameter in list(_slots(model)):
        module._parameters[name] = by_id[id(parameter)]


def _replicated(
    reader: nn.Module, layers: Sequence[nn.Module], device: torch.device
) -> list[nn.Module]:
    """The modules whose parameters belong to several units, and so to none: tied gates.

    Each process keeps them whole, and their gradients are averaged here, as DDP does.
    """
    units: dict[int, set[int]] = {}
    unit_of = {id(part): n for n, layer in enumerate(layers) for part in layer.modules()}
    for module, _, parameter in _slots(reader):
        units.setdefault(id(parameter), set()).add(unit_of.get(id(module), -1))
    modules = [m for m, _, p in _slots(reader) if len(units[id(p)]) > 1]
    parameters = {p for module in modules for p in module.to(device).parameters()}
    for parameter in parameters:
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(_average)
    return modules


def _average(parameter: Tensor) -> None:
    assert parameter.grad is not None
    distributed.all_reduce(parameter.grad)
    parameter.grad /= distributed.get_world_size()
