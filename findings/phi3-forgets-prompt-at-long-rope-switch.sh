#!/usr/bin/env bash
# Phi-3 models with the "longrope" scaling use one set of rotary factors for
# short texts and another for texts longer than
# original_max_position_embeddings. The cached keys of the short set are of no
# use after the switch, so the model throws its cache away at that point.
#
# A good guess: the whole text is then read once more with the long factors,
# and greedy generation gives the same tokens with and without a cache.
#
# What happens in transformers 5.16.1: the cache is thrown away, but only the
# newest token is fed to the model. The new cache is then so short that it is
# thrown away again at the next step, and so on: from the switch to the end each
# token is made from the single token before it. There is no error and no
# warning; the final cache holds one token, and the text differs from that of
# use_cache=False. In 5.23.0 and 5.24.0 the text is read again in full and both
# ways agree; this script runs 5.16.1 and 5.24.0.
#
# Why it matters: a Phi-3 answer that starts below the switch (4096 tokens in
# the published 128k models) and ends above it loses its prompt half way. It is
# also a trap for anyone who compares another decoding method against cached
# greedy generation: on the old version it is the reference that is wrong.
set -euo pipefail

work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1

cat > "$work/check.py" <<'PY'
import sys

import torch
import transformers
from transformers import Phi3Config, Phi3ForCausalLM

transformers.logging.set_verbosity_error()
expect_wrong = sys.argv[1] == "wrong"
SWITCH, PROMPT, NEW = 16, 10, 20

torch.manual_seed(0)
model = Phi3ForCausalLM(
    Phi3Config(
        vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, initializer_range=0.2,
        max_position_embeddings=256, original_max_position_embeddings=SWITCH,
        pad_token_id=0, bos_token_id=1, eos_token_id=None,
        rope_parameters={
            "rope_type": "longrope", "rope_theta": 10000.0,
            "short_factor": [1.0] * 8, "long_factor": [4.0] * 8,
            "original_max_position_embeddings": SWITCH,
        },
    )
).eval()

lengths = []
model.model.embed_tokens.register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))

differ, first, held = 0, set(), set()
for prompt in torch.randint(2, 97, (8, PROMPT)):
    ids = prompt[None]
    ask = dict(attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False)
    plain = model.generate(ids, use_cache=False, **ask)
    lengths.clear()
    cached = model.generate(ids, return_dict_in_generate=True, **ask)
    kept = cached["cache"] if "cache" in cached.keys() else cached["past_key_values"]
    held.add(kept.get_seq_length())
    places = (plain != cached.sequences)[0].nonzero().flatten().tolist()
    differ += bool(places)
    first.update(places[:1])

total = PROMPT + NEW - 1
print(f"torch {torch.__version__}, transformers {transformers.__version__}")
print("  good guess: 0 of 8 prompts differ between cached and uncached greedy generation")
print(f"  observed:   {differ} of 8 differ, first at position {sorted(first)}; the switch is at {SWITCH}")
print(f"  tokens fed per step with a cache: {lengths}")
print(f"  tokens in the final cache: {sorted(held)} of {total}")
if expect_wrong:
    ok = differ > 0 and min(first) > SWITCH and held == {1} and set(lengths[1:]) == {1}
else:
    ok = differ == 0 and held == {total} and lengths.count(SWITCH + 1) == 1
print("  as stated" if ok else "  NOT as stated any more")
sys.exit(0 if ok else 1)
PY

python3 -m venv "$work/venv"
pip="$work/venv/bin/pip -qq --disable-pip-version-check"
$pip install torch==2.13.0 transformers==5.16.1 || exit 2
"$work/venv/bin/python" "$work/check.py" wrong
$pip install transformers==5.24.0 || exit 2
"$work/venv/bin/python" "$work/check.py" right
