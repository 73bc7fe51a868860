"""What each process does in test_processes.py and test_sharding.py; started by torchrun.

torchrun --nproc_per_node 2 tests/training/ranks.py FOLDER train SETTINGS...
torchrun --nproc_per_node 2 tests/training/ranks.py FOLDER shard
accelerate launch --config_file FILE tests/training/ranks.py FOLDER runs
accelerate launch --config_file FILE tests/training/ranks.py FOLDER memory RECIPE
"""

import itertools
import json
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


def runs(folder: Path) -> None:
    """The runs of FOLDER/runs.json, one after another; some are stopped again and again."""
    from trol.host import processes
    from trol.training import resolve, run

    for one in json.loads((folder / "runs.json").read_text(encoding="utf-8")):
        recipe, out = resolve("demo", one["settings"]), folder / one["out"]
        if not one["stopped"]:
            run(recipe, out)
            continue
        steps, joined = itertools.count(1), processes.any_of
        processes.any_of = lambda _, steps=steps: next(steps) % 3 == 0
        while "stopped" in run(recipe, out, resume=True, max_hours=1.0):
            pass
        processes.any_of = joined
    processes.leave()
    os._exit(0)


def memory(folder: Path, recipe: str) -> None:
    """What a run adds to the resident memory of a process that has made a small one before."""
    from trol.host import processes
    from trol.training import resolve, run

    small = ["preset.hidden_size=32", "preset.layers=2", "preset.heads=2"]
    run(resolve(recipe, small), folder / "small")
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # forgets the highest so far
    before = _resident("VmRSS")
    result = run(resolve(recipe), folder / "large")
    peak = {"peak": _resident("VmHWM") - before, "parameters": result["parameters"]}
    (folder / f"memory-{RANK}.json").write_text(json.dumps(peak), encoding="utf-8")
    processes.leave()
    os._exit(0)


def _resident(key: str) -> int:
    """A line of /proc/self/status. Unit: bytes."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(key)).split()[1])


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
    {
        "train": lambda: train(Path(place), rest),
        "shard": lambda: shard(Path(place)),
        "runs": lambda: runs(Path(place)),
        "memory": lambda: memory(Path(place), *rest),
    }[what]()
