#!/usr/bin/env bash
# transformers 5.24.0 calls the cache of a model output "cache" and still
# answers to the older name "past_key_values".
#
# A good guess: that old name is translated for the library's own output
# classes. A class of one's own, a dataclass on top of ModelOutput that declares
# a field called past_key_values, keeps working, because its field really has
# that name.
#
# What happens in 5.24.0: the translation sits in the base class and does not
# look at which fields exist. Such a class
#   1. cannot be built with past_key_values=... at all (a TypeError about an
#      argument "cache" that the caller never wrote);
#   2. built by position, it drops the value silently: reading
#      past_key_values gives None, the key is missing, the tuple is one shorter;
#   3. if it extends one of the library's outputs and declares the field again,
#      it takes the keyword without complaint and then reads as None.
# In 5.23.0 all three hold the value.
#
# Why it matters: custom models and wrappers often have an output class like
# this, and type 3 does not fail. A decoding loop that reads
# outputs.past_key_values gets None, starts each step with no cache, and feeds
# the model one token without its past.
set -euo pipefail

work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1

cat > "$work/check.py" <<'PY'
import sys
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from transformers import DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import ModelOutput

transformers.logging.set_verbosity_error()
expect_lost = sys.argv[1] == "lost"


@dataclass
class Own(ModelOutput):
    logits: torch.Tensor | None = None
    past_key_values: Any = None
    scores: torch.Tensor | None = None


@dataclass
class Extended(CausalLMOutputWithPast):
    past_key_values: Any = None


one, cache = torch.ones(1), DynamicCache()
try:
    Own(logits=one, past_key_values=cache)
    by_keyword = "works"
except TypeError as error:
    by_keyword = f"TypeError: {error}"
own = Own(one, cache, one)
extended = Extended(logits=one, past_key_values=cache)

print(f"torch {torch.__version__}, transformers {transformers.__version__}")
print("  good guess: the declared field past_key_values holds what was put there")
print(f"  own class, by keyword:   {by_keyword}")
print(f"  own class, by position:  past_key_values = {own.past_key_values}, keys {list(own.keys())}")
print(f"  extended class, keyword: past_key_values = {extended.past_key_values}, keys {list(extended.keys())}")
if expect_lost:
    ok = by_keyword.startswith("TypeError") and "'cache'" in by_keyword
    ok &= own.past_key_values is None and "past_key_values" not in own.keys() and len(own.to_tuple()) == 2
    ok &= extended.past_key_values is None
else:
    ok = by_keyword == "works" and own.past_key_values is cache and len(own.to_tuple()) == 3
    ok &= extended.past_key_values is cache
print("  as stated" if ok else "  NOT as stated any more")
sys.exit(0 if ok else 1)
PY

python3 -m venv "$work/venv"
pip="$work/venv/bin/pip -qq --disable-pip-version-check"
$pip install torch==2.13.0 transformers==5.23.0 || exit 2
"$work/venv/bin/python" "$work/check.py" kept
$pip install transformers==5.24.0 || exit 2
"$work/venv/bin/python" "$work/check.py" lost
