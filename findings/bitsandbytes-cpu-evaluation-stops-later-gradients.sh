#!/usr/bin/env bash
# A 4-bit linear layer of bitsandbytes is frozen, but gradients pass through it
# to what lies below it. That is how adapters on a quantised model are trained.
#
# A good guess: evaluating the model between two training steps (eval, forward
# without gradients, train) changes nothing about the next training step.
#
# What happens in bitsandbytes 0.50.2 on a CPU with the AVX512-BF16
# instructions: the first evaluation repacks the weight for a faster kernel.
# The layer keeps that form after train(), and the kernel has no
# backward. Everything below the layer gets no gradient at all from then on,
# while what lies above still trains. PyTorch gives one general warning about an
# operator without autograd; nothing raises.
# Calling state_dict() unpacks the weight as a side effect and brings the
# gradient back, so saving a checkpoint hides the fault until the next
# evaluation.
#
# Why it matters: in a run that evaluates now and then, the lower adapters
# silently stop learning after the first evaluation. On a CPU without these
# instructions nothing is repacked and the good guess holds; the script checks
# that instead there.
set -euo pipefail

work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
export OMP_NUM_THREADS=1

python3 -m venv "$work/venv"
"$work/venv/bin/pip" -qq --disable-pip-version-check install torch==2.13.0 bitsandbytes==0.50.2 || exit 2

cat > "$work/check.py" <<'PY'
import logging
import sys
import warnings

logging.disable(logging.WARNING)  # a note on an optional package at import
import bitsandbytes as bnb
import torch
from bitsandbytes.functional import has_avx512bf16

warnings.filterwarnings("ignore")
torch.manual_seed(0)
below, above = torch.nn.Linear(128, 128), torch.nn.Linear(64, 4)
middle = bnb.nn.Linear4bit(128, 64, bias=False, quant_type="nf4", compute_dtype=torch.float32).to("cpu")
net = torch.nn.Sequential(below, middle, above)
x = torch.randn(5, 128)


def gradients():
    net.train()
    net.zero_grad(set_to_none=True)
    net(x).square().mean().backward()
    return tuple("none" if part.weight.grad is None else "yes" for part in (below, above))


before = gradients()
net.eval()
with torch.no_grad():
    net(x)
after = gradients()
net.state_dict()
saved = gradients()

fast = bool(has_avx512bf16())
print(f"torch {torch.__version__}, bitsandbytes {bnb.__version__}, CPU with AVX512-BF16: {fast}")
print("good guess: the layer below has a gradient in every training step")
print(f"gradient (below, above) at first:             {before}")
print(f"gradient (below, above) after one evaluation: {after}")
print(f"gradient (below, above) after state_dict():   {saved}")
both = ("yes", "yes")
ok = before == both and after == (("none", "yes") if fast else both) and saved == both
print("as stated" if ok else "NOT as stated any more")
sys.exit(0 if ok else 1)
PY
"$work/venv/bin/python" "$work/check.py"
