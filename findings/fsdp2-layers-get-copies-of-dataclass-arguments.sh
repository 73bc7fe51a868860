#!/usr/bin/env bash
# A model hands its layers one object for the whole pass, a dataclass, and each
# layer notes in it what it did.
#
# A good guess: under FSDP2 the layers get the very object, as any Python
# function does; fully_shard gathers parameters and leaves arguments alone, or at
# most wraps the tensors that are arguments themselves.
#
# What happens (torch 2.13.0): fully_shard looks for tensors that need a gradient
# inside dataclasses too. Where it finds one in any field, however deep, it hands
# on dataclasses.replace(argument): what a layer writes is lost, without a word.
# Without gradients, as in most tests of a forward pass, it is the very object.
#
# Exit code: 0 if that is as stated, 1 if not, 2 if nothing could be installed.
set -u
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work" || exit 2
python3 -m venv env && env/bin/pip install -q "torch==2.13.0" numpy || exit 2
cat > see.py <<'PY'
import os
from dataclasses import dataclass

import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29533"}
distributed.init_process_group("gloo")


@dataclass
class Notes:
    embeds: torch.Tensor
    visited: bool = False


class Layer(nn.Linear):
    def forward(self, x, notes):
        notes.visited = True
        return super().forward(x)


def visited(shard, grad):
    torch.manual_seed(0)
    layer = Layer(4, 4)
    if shard:
        fully_shard(layer, mesh=init_device_mesh("cpu", (1,)))
    notes = Notes(torch.randn(2, 4, requires_grad=grad))
    layer(torch.randn(2, 4), notes)
    return notes.visited


seen = {(shard, grad): visited(shard, grad) for shard in (False, True) for grad in (False, True)}
for (shard, grad), value in seen.items():
    print(f"sharded={shard}, a field needs a gradient={grad}: the caller sees what the layer wrote: {value}")
os._exit(0 if [*seen.values()] == [True, True, True, False] else 1)
PY
env/bin/python see.py
