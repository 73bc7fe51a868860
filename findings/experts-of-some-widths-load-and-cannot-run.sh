#!/usr/bin/env bash
# Somebody makes or opens a small mixture of experts whose experts are not as wide as
# a multiple of eight.
#
# A good guess: a width that the configuration takes, that the model is made with, saved
# and opened with, is one it can run with; a matrix product takes any width.
#
# What happens (transformers 5.24.0, torch 2.13.0, CPU): MixtralForCausalLM chooses
# torch's grouped products by itself, and these want rows of whole 16 bytes: widths that 4
# divides in float32, 8 in bfloat16. Of another width the first forward pass ends in
# "strides should be multiple of 16 bytes", which names neither the experts nor the
# width. The same width that runs in float32 (172) does not in bfloat16. With
# experts_implementation="eager" every width runs.
#
# Exit 0: as stated; 1: no longer.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install -qq "torch==2.13.0" "transformers==5.24.0" || exit 2

FOLDER="$folder/model" "$folder/env/bin/python" -W ignore - 2>/dev/null <<'PY'
import os
import sys

import torch
import transformers
from transformers import MixtralConfig, MixtralForCausalLM

IDS = torch.tensor([[1, 2, 3]])
found = {}
for width in (168, 170, 172):
    config = MixtralConfig(
        vocab_size=32,
        hidden_size=64,
        intermediate_size=width,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_local_experts=4,
    )
    MixtralForCausalLM(config).save_pretrained(os.environ["FOLDER"])
    for dtype in (torch.float32, torch.bfloat16):
        for how in (None, "eager"):
            chosen = {} if how is None else {"experts_implementation": how}
            model = MixtralForCausalLM.from_pretrained(
                os.environ["FOLDER"], dtype=dtype, **chosen
            )
            name = f"{width} wide, {str(dtype)[6:]}, {how or 'as it comes'}"
            try:
                with torch.no_grad():
                    model(IDS)
                found[name] = "runs"
            except RuntimeError as error:
                found[name] = str(error).splitlines()[0]
            print(f"transformers {transformers.__version__}: {name}: {found[name]}")
fails = [name for name, seen in found.items() if "multiple of 16 bytes" in seen]
wanted = [
    "170 wide, float32, as it comes",
    "170 wide, bfloat16, as it comes",
    "172 wide, bfloat16, as it comes",
]
runs = all(seen == "runs" for name, seen in found.items() if name not in fails)
sys.exit(0 if fails == wanted and runs else 1)
PY
