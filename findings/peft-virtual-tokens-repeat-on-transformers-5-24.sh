#!/usr/bin/env bash
# Prompt tuning puts a few learnt vectors before a prompt, and then generates.
#
# A good guess: PEFT's newest release on transformers' newest works as on the one
# before, or says that it does not; decoding with a cache and without gives the
# same tokens.
#
# What happens (peft 0.21.2): transformers 5.24 calls the cache `cache`, and PEFT
# looks for `past_key_values` to know whether a prompt was read already. It finds
# none, ever, so it puts its vectors before EVERY new token: no error, no warning
# of it, other tokens. With use_cache=False they are those of 5.23, where both
# agree. transformers' own model.add_adapter on 5.24 wants peft >= 0.22.0, which
# the package index does not have; get_peft_model does not ask.
#
# Exit 0: as stated; 1: no longer.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat >"$folder/look.py" <<'PY'
import sys

import torch
import transformers
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4,
         "num_attention_heads": 4, "num_key_value_heads": 2, "eos_token_id": None, "pad_token_id": 0}
ids = torch.randint(3, 97, (1, 8))
model = LlamaForCausalLM(LlamaConfig(**sizes)).eval()
widths = []
model.model.register_forward_pre_hook(
    lambda _module, _args, kwargs: widths.append(kwargs["inputs_embeds"].shape[1]
                                                 if kwargs.get("inputs_embeds") is not None
                                                 else kwargs["input_ids"].shape[1]),
    with_kwargs=True,
)
tuning = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)
tuned = get_peft_model(model, tuning).eval()
ask = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "max_new_tokens": 4}
said, passes = [], []
for use_cache in (True, False):
    widths.clear()
    said.append(tuned.generate(**ask, do_sample=False, use_cache=use_cache)[0, 8:].tolist())
    passes.append(list(widths))
try:
    LlamaForCausalLM(LlamaConfig(**sizes)).add_adapter(LoraConfig(r=2, target_modules=["q_proj"]))
    adds = "taken"
except ValueError as error:
    adds = "refused" if "0.22" in str(error) else str(error)
print(f"transformers {transformers.__version__}: tokens with a cache {said[0]}, without {said[1]}; "
      f"widths of the passes with a cache {passes[0]}; add_adapter: {adds}")
stated = {"agree": (said[0] == said[1], passes[0] == [13, 1, 1, 1], adds == "taken"),
          "repeat": (said[0] != said[1], passes[0] == [13, 6, 6, 6], adds == "refused")}
sys.exit(0 if all(stated[sys.argv[1]]) else 1)
PY
for release in 5.23.0:agree 5.24.0:repeat; do
  env="$folder/${release%%:*}"
  python3 -m venv "$env"
  "$env/bin/python" -m pip install -qq "torch==2.13.0" "transformers==${release%%:*}" \
    "peft==0.21.2" "accelerate==1.15.0" || exit 2
  "$env/bin/python" -W ignore "$folder/look.py" "${release##*:}"
done
