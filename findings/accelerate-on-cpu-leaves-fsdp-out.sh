#!/usr/bin/env bash
# A training under FSDP2 is tested on two processes without GPUs, over gloo.
#
# A good guess: accelerate, asked for FSDP2 by its launcher's variables and by a
# plugin, shards there too, because fully_shard itself runs on CPUs; or else it
# says that it cannot.
#
# What happens (accelerate 1.15.0): on CPUs it drops the plugin without a word and
# wraps the model in DistributedDataParallel. Losses are right, every process
# holds all weights, and such a test says nothing about FSDP.
#
# Exit code: 0 if that is as stated, 1 if not, 2 if nothing could be installed.
set -u
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work" || exit 2
python3 -m venv env && env/bin/pip install -q "accelerate==1.15.0" "torch==2.13.0" || exit 2
cat > see.py <<'PY'
import os

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from torch import distributed, nn
from torch.distributed.tensor import DTensor

accelerator = Accelerator(cpu=True, fsdp_plugin=FullyShardedDataParallelPlugin(fsdp_version=2))
model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
model, _ = accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
sharded = any(isinstance(one, DTensor) for one in model.parameters())
if accelerator.is_main_process:
    print(f"asked for: FSDP2; got: {accelerator.distributed_type}, {type(model).__name__}, sharded: {sharded}")
distributed.barrier()
os._exit(0 if type(model).__name__ == "DistributedDataParallel" and not sharded else 1)
PY
OMP_NUM_THREADS=1 ACCELERATE_USE_FSDP=true FSDP_VERSION=2 \
  env/bin/python -m torch.distributed.run --standalone --nproc_per_node 2 see.py
