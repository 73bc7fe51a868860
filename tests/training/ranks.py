"""What each of two processes does in tests/training/test_processes.py; started by torchrun.

torchrun --nproc_per_node 2 tests/training/ranks.py FOLDER train SETTINGS...
torchrun --nproc_per_node 2 tests/training/ranks.py FOLDER shard
"""

import os
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from transformers import LlamaConfig, LlamaForCausalLM

import trol

RANK = int(os.environ.get("RANK", "0"))
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
}


def train(folder: Path, words: list[str]) -> None:
    """`trol train`; each rank also writes the weights that it ended with."""
    from trol.cli import main
    from trol.training import run as training

    module = sys.modules[training.__module__]
    save = module._save  # type: ignore[attr-defined]

    def save_on_each_rank(model: nn.Module, *rest: object) -> None:
        weights = {name: p.detach().contiguous() for name, p in model.named_parameters()}
        save_file(weights, folder / f"rank-{RANK}.safetensors")
        save(model, *rest)

    module._save = save_on_each_rank  # type: ignore[attr-defined]
    main(["train", *words])


def shard(folder: Path) -> None:
    """Loss, gradients and new tokens of an attached model under FSDP2."""
    distributed.init_process_group("gloo")
    model, ids = attached_model()
    mesh = init_device_mesh("cpu", (2,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    register_fsdp_forward_method(model, "generate")
    tensors = measured(model, ids)
    if RANK == 0:
        save_file(tensors, folder / "sharded.safetensors")
    distributed.barrier()
    distributed.destroy_process_group()
    os._exit(0)  # gloo's threads can outlive the group, and then abort a process that ends as usual


def attached_model() -> tuple[LlamaForCausalLM, Tensor]:
    """A small Llama with TroL's mixer, and some tokens. Shape: [2, 12]."""
    torch.manual_seed(0)
    ends = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, **ends))
    return trol.attach(model, trol.TrolMixer(passes=2)), torch.randint(1, 64, (2, 12))


def measured(model: LlamaForCausalLM, ids: Tensor) -> dict[str, Tensor]:
    """The loss, every parameter's gradient, and what `generate` adds to the tokens."""
    loss = model.train()(input_ids=ids, labels=ids).loss
    loss.backward()
    tensors = {"loss": loss.detach()}
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        assert gradient is not None, name
        whole = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
        tensors[name] = whole.detach().contiguous()
    with torch.no_grad():
        tensors["new"] = model.eval().generate(input_ids=ids, max_new_tokens=5, do_sample=False)
    return tensors


if __name__ == "__main__":
    torch.set_num_threads(1)
    place, what, *rest = sys.argv[1:]
    if what == "train":
        train(Path(place), rest)
    else:
        shard(Path(place))
