#!/usr/bin/env bash
# A logits processor that follows a grammar keeps a state and moves it on by the
# tokens that are new since its last call.
#
# A good guess: transformers' assisted decoding gives the tokens of plain greedy
# decoding, whatever the draft says, since drafts are verified; so a processor is
# shown each accepted token once, and a draft that falls leaves no trace.
#
# What happens (transformers 5.23.0 and 5.24.0): the processor is called on drafted
# tokens before it is known whether they stand. One that keeps a state is led
# astray: other tokens than plain decoding, no error and no warning. The same
# processor without a memory, whose answer hangs on the ids alone, is right.
#
# Exit 0: as stated; 1: no longer.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat >"$folder/look.py" <<'PY'
import sys

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM, LogitsProcessor


class Rule(LogitsProcessor):
    """Which fifth of the words is barred hangs on all new tokens."""

    def __init__(self, remembers):
        self.remembers, self.seen, self.state = remembers, 9, 0

    def __call__(self, input_ids, scores):
        width = input_ids.shape[1]
        if not self.remembers:
            self.seen, self.state = 9, 0
        for token in input_ids[0, self.seen :].tolist():
            self.state = (3 * self.state + 1 + token // 5) % 5
        self.seen = max(self.seen, width)
        barred = torch.arange(scores.shape[-1]) % 5 == self.state
        return scores.masked_fill(barred, float("-inf"))


def model(seed):
    torch.manual_seed(seed)
    made = LlamaForCausalLM(LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, eos_token_id=None, pad_token_id=0)).eval()
    for weight in made.parameters():
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=1.2 / weight.shape[1] ** 0.5)
    return made


with torch.no_grad():
    target, draft = model(0), model(1)
    ids = torch.randint(3, 97, (1, 9), generator=torch.Generator().manual_seed(2))
    same = {}
    for remembers in (False, True):
        said = []
        for helper in (None, draft):
            rule = Rule(remembers)
            said.append(target.generate(ids, assistant_model=helper, logits_processor=[rule],
                                        max_new_tokens=12, do_sample=False)[0, 9:].tolist())
        same[remembers] = said[0] == said[1]
        print(f"transformers {transformers.__version__}, {'with' if remembers else 'without'} a state: "
              f"plain {said[0]}, assisted {said[1]}")
sys.exit(0 if same == {False: True, True: False} else 1)
PY
for release in 5.23.0 5.24.0; do
  env="$folder/$release"
  python3 -m venv "$env"
  "$env/bin/python" -m pip install -qq "torch==2.13.0" "transformers==$release" || exit 2
  "$env/bin/python" -W ignore "$folder/look.py"
done
