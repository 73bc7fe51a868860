#!/usr/bin/env bash
# Code that mixes precisions asks torch which type two others meet in.
#
# A good guess: torch.promote_types and torch.can_cast take types alone, no
# tensor, so they are Python arithmetic that no device, mode or counter sees;
# if one of the three questions about types reaches the dispatcher, it is
# torch.result_type, which takes tensors.
#
# What happens (torch 2.13.0): it is the other way round. promote_types and
# can_cast go through the dispatcher as aten operators: a TorchDispatchMode sees
# each call, so whoever counts operators of a pass counts them with its kernels.
# result_type of a tensor and a number, torch.finfo and .to() of the same type
# are not seen.
#
# Exit 0: as stated; 1: no longer.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install -qq "torch==2.13.0" || exit 2

"$folder/env/bin/python" -W ignore - <<'PY'
import sys

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Seen(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


state = torch.ones(2)
asked = {
    "promote_types": lambda: torch.promote_types(torch.float16, torch.float32),
    "can_cast": lambda: torch.can_cast(torch.float32, torch.int64),
    "result_type": lambda: torch.result_type(state, 1.0),
    "finfo": lambda: torch.finfo(torch.float16).eps,
    "to the same type": lambda: state.to(torch.float32),
}
found = {}
for name, call in asked.items():
    with Seen() as seen:
        call()
    found[name] = seen.names
    print(f"torch {torch.__version__}, {name}: {seen.names or 'not seen'}")
wanted = {name: [] for name in asked}
wanted["promote_types"] = ["aten.promote_types.default"]
wanted["can_cast"] = ["aten.can_cast.default"]
sys.exit(0 if found == wanted else 1)
PY
