#!/usr/bin/env bash
# Somebody opens a GGUF file with transformers: configuration, tokenizer, model.
#
# A good guess: the file is mapped into memory and its header is short, so opening takes
# as long as its weights do; a small file opens at once.
#
# What happens (transformers 5.24.0, gguf 0.19.0): each of the three calls parses all
# metadata again, and the model does it twice. A parse makes Python objects of every
# word and every merge, three or four for each, before anything is asked for. A file of
# 6 MB, one layer of width 32 with 20,000 words, took 11 to 20 s of a CPU core to open,
# half of it these parses: time grows with the vocabulary, not with the weights. Who
# opens a file more than once saves it as a folder with save_pretrained.
#
# Exit 0: as stated; 1: no longer.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install -qq "torch==2.13.0" "transformers==5.24.0" \
  "gguf==0.19.0" "accelerate==1.15.0" || exit 2

FOLDER="$folder" "$folder/env/bin/python" -W ignore - 2>/dev/null <<'PY'
import itertools
import os
import sys
import time

import gguf
import numpy as np
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

WORDS, WIDTH, NAME = 20_000, 32, "model.gguf"
FILE = os.path.join(os.environ["FOLDER"], NAME)
rng = np.random.default_rng(0)
letters = [chr(code) for code in (*range(33, 127), *range(161, 173), *range(174, 324))]
pairs = list(itertools.product(letters, letters))[: WORDS - len(letters)]

writer = gguf.GGUFWriter(FILE, "llama")
writer.add_block_count(1)
writer.add_context_length(64)
writer.add_embedding_length(WIDTH)
writer.add_feed_forward_length(WIDTH)
writer.add_head_count(2)
writer.add_head_count_kv(2)
writer.add_layer_norm_rms_eps(1e-5)
writer.add_vocab_size(WORDS)
writer.add_tokenizer_model("gpt2")
writer.add_tokenizer_pre("default")
writer.add_token_list([*letters, *("".join(pair) for pair in pairs)])
writer.add_token_types([1] * WORDS)
writer.add_token_merges([" ".join(pair) for pair in pairs])
writer.add_bos_token_id(0)
writer.add_eos_token_id(1)
shapes = {"token_embd": (WORDS, WIDTH), "output": (WORDS, WIDTH), "output_norm": (WIDTH,)}
for part in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"):
    shapes[f"blk.0.{part}"] = (WIDTH, WIDTH)
shapes |= {"blk.0.attn_norm": (WIDTH,), "blk.0.ffn_norm": (WIDTH,)}
for name, shape in shapes.items():
    writer.add_tensor(f"{name}.weight", rng.normal(size=shape).astype(np.float32))
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()

spent = []
parse = gguf.GGUFReader.__init__


def timed(self, *args, **settings):
    begun = time.perf_counter()
    parse(self, *args, **settings)
    spent.append(time.perf_counter() - begun)


gguf.GGUFReader.__init__ = timed
found, parsing, whole = {}, 0.0, 0.0
for what, kind in (("config", AutoConfig), ("tokenizer", AutoTokenizer), ("model", AutoModelForCausalLM)):
    spent.clear()
    begun = time.perf_counter()
    opened = kind.from_pretrained(os.environ["FOLDER"], gguf_file=NAME)
    whole += time.perf_counter() - begun
    parsing += sum(spent)
    found[what] = len(spent)
print(f"transformers {transformers.__version__}, {os.path.getsize(FILE) / 1e6:.1f} MB: parses {found}")
print(f"{parsing / whole:.0%} of {whole:.1f} s is parsing")
sys.exit(0 if found == {"config": 1, "tokenizer": 1, "model": 2} else 1)
PY
