#!/usr/bin/env bash
# get_decoder() is the way to reach the stack of layers below a language
# model's output head without knowing how a family names it.
#
# A good guess: for every text model with a head it returns the part without
# the head, so get_decoder().layers exists and get_decoder()(ids) answers with
# a last_hidden_state.
#
# What happens: Llama4ForCausalLM and MllamaForCausalLM return themselves.
# Their base_model_prefix is "language_model", but they keep their
# layers in an attribute called "model", so the look-up finds nothing and falls
# back to the object it started from. base_model is the whole model as well.
# There is no error at that point: code fails later, at .layers or at
# .last_hidden_state, or runs the head where it meant to avoid it. The same in
# transformers 5.16.1, 5.23.0 and 5.24.0; this script runs 5.24.0. Of 176
# causal model classes there that could be built from their default config,
# these two were the only ones to return themselves (some 20 more could not be
# built that way and were not looked at).
#
# Why it matters: chunked losses, early exits, layer surgery and anything else
# that wants hidden states for all families has to special-case these two. A
# safe test is `model.get_decoder() is model`.
set -euo pipefail

work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1

python3 -m venv "$work/venv"
"$work/venv/bin/pip" -qq --disable-pip-version-check install torch==2.13.0 transformers==5.24.0 || exit 2

cat > "$work/check.py" <<'PY'
import sys

import torch
import transformers
from transformers import (
    Llama4ForCausalLM,
    Llama4TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MllamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.models.mllama.configuration_mllama import MllamaTextConfig

transformers.logging.set_verbosity_error()
small = dict(
    vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)
cases = (
    (LlamaForCausalLM, LlamaConfig(**small), False),
    (Qwen3ForCausalLM, Qwen3Config(**small, head_dim=16), False),
    (Llama4ForCausalLM, Llama4TextConfig(**small, head_dim=16, intermediate_size_mlp=32, num_local_experts=2), True),
    (MllamaForCausalLM, MllamaTextConfig(**small, cross_attention_layers=[]), True),
)
ids = torch.tensor([[3, 4, 5]])

print(f"torch {torch.__version__}, transformers {transformers.__version__}")
print("good guess: get_decoder() is the part below the head, has .layers and gives last_hidden_state")
ok = True
for model_class, config, itself in cases:
    model = model_class(config).eval()
    decoder = model.get_decoder()
    with torch.no_grad():
        keys = list(decoder(input_ids=ids).keys())
    print(
        f"  {model_class.__name__:18} get_decoder() is a {type(decoder).__name__}, the model itself: {decoder is model}, "
        f"has layers: {hasattr(decoder, 'layers')}, answers with: {keys}"
    )
    ok &= (decoder is model) == itself == (model.base_model is model)
    ok &= hasattr(decoder, "layers") != itself and ("last_hidden_state" in keys) != itself
    ok &= hasattr(model.model, "layers") and hasattr(model, model.base_model_prefix) != itself
print("as stated" if ok else "NOT as stated any more")
sys.exit(0 if ok else 1)
PY
"$work/venv/bin/python" "$work/check.py"
