#!/usr/bin/env bash
# A 4-bit layer of bitsandbytes stores small codes and one scale per block of
# 64 weights.
#
# A good guess: a checkpoint taken after the model was evaluated equals the one
# taken before, since evaluation changes no parameter. Taking a checkpoint does
# not change the layer either.
#
# What happens in bitsandbytes 0.50.2 on a CPU with the AVX512-BF16
# instructions, for a layer with compress_statistics=False (no double
# quantisation): the first evaluation repacks the weight and transposes the
# table of scales. state_dict() puts the codes back in order but leaves the
# table transposed, so blocks are read with the scales of other blocks. Both
# the checkpoint and the live layer are wrong from then on, without an error.
# With compress_statistics=True the scales are put back and only rounded.
#
# Why it matters: evaluate, then save, is what most training scripts do. The
# damage grows with how much the scales differ inside a layer: nearly invisible
# for a fresh random layer, total for one whose rows differ in size, as here.
# On a CPU without these instructions nothing is repacked; the script then
# checks that the checkpoint is sound.
set -euo pipefail

work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
export OMP_NUM_THREADS=1

python3 -m venv "$work/venv"
"$work/venv/bin/pip" -qq --disable-pip-version-check install torch==2.13.0 bitsandbytes==0.50.2 || exit 2

cat > "$work/check.py" <<'PY'
import logging
import sys

logging.disable(logging.WARNING)  # a note on an optional package at import
import bitsandbytes as bnb
import torch
from bitsandbytes.functional import has_avx512bf16

ROWS, COLUMNS = 64, 128
torch.manual_seed(0)
weight = torch.randn(ROWS, COLUMNS) * torch.logspace(-2, 1, ROWS)[:, None]
x = torch.randn(6, COLUMNS)


def empty(double):
    return bnb.nn.Linear4bit(
        COLUMNS, ROWS, bias=False, quant_type="nf4", compress_statistics=double, compute_dtype=torch.float32
    )


def quantised(double):
    layer = empty(double)
    layer.load_state_dict({"weight": weight})
    return layer.to("cpu")


def reloaded(state, double):
    state = {name: value.clone() for name, value in state.items()}
    codes = state.pop("weight")
    scales = {name.removeprefix("weight."): value for name, value in state.items()}
    layer = empty(double)
    layer.weight = bnb.nn.Params4bit.from_prequantized(codes, scales, device="cpu")
    return layer


def run(layer, training=True):
    layer.train(training)
    with torch.no_grad():
        return layer(x)


def report(double):
    exact = run(quantised(double))

    def error(result):
        return ((result - exact).norm() / exact.norm()).item()

    untouched = error(run(reloaded(quantised(double).state_dict(), double)))
    layer = quantised(double)
    evaluated = error(run(layer, training=False))
    state = layer.state_dict()
    found = dict(untouched=untouched, evaluated=evaluated, live=error(run(layer)), saved=error(run(reloaded(state, double))))
    print(f"compress_statistics={double}: relative error of the layer's answers")
    print(f"  reloaded from a checkpoint without an evaluation: {found['untouched']:.4f}")
    print(f"  during the evaluation:                            {found['evaluated']:.4f}")
    print(f"  the live layer after state_dict():                {found['live']:.4f}")
    print(f"  reloaded from that checkpoint:                    {found['saved']:.4f}")
    return found


fast = bool(has_avx512bf16())
print(f"torch {torch.__version__}, bitsandbytes {bnb.__version__}, CPU with AVX512-BF16: {fast}")
print("good guess: all of these errors are near zero")
single, double = report(False), report(True)
ok = max(single["untouched"], single["evaluated"]) < 0.05 and double["untouched"] < 0.05
if fast:
    ok &= single["live"] > 0.3 and single["saved"] > 0.3
else:
    ok &= single["live"] < 0.05 and single["saved"] < 0.05
ok &= double["live"] < 0.1 and double["saved"] < 0.1
print("as stated" if ok else "NOT as stated any more")
sys.exit(0 if ok else 1)
PY
"$work/venv/bin/python" "$work/check.py"
