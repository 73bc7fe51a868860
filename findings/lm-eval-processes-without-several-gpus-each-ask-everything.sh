#!/usr/bin/env bash
# lm-eval is started by torchrun (or accelerate launch) as two processes on a
# machine without a GPU.
#
# A good guess: they share the questions, as lm-eval says of data parallel runs;
# or one of them warns.
#
# What happens (lm-eval 0.4.13): the process group is made, but its class for
# transformers models takes rank and world size from it only where it counts two
# GPUs or more (`gpus > 1` on each machine: one GPU on each of several machines
# counts as none as well, read in the source). Each process answers all questions
# and the first one reports: right figures, no time saved, no word.
#
# Exit 0: as stated; 1: no longer.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat >"$folder/look.py" <<'PY'
import json
import os
import sys
import warnings

warnings.filterwarnings("ignore")
import torch
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

folder = sys.argv[1]
rank = int(os.environ["RANK"])
own = f"{folder}/model-{rank}"  # each process its own, so that none waits for another
words = ["<unk>", "<s>", "</s>", *"abcdefghij"]
tokenizer = Tokenizer(models.WordLevel({word: at for at, word in enumerate(words)}, unk_token="<unk>"))
tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>").save_pretrained(own)
torch.manual_seed(0)
LlamaForCausalLM(LlamaConfig(vocab_size=len(words), hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                             num_attention_heads=2, num_key_value_heads=2)).save_pretrained(own)
with open(f"{own}/rows.jsonl", "w") as file:
    for at in range(8):
        file.write(json.dumps({"q": "a b c", "choices": ["d", "e"], "gold": at % 2}) + "\n")
os.makedirs(f"{own}/tasks")
with open(f"{own}/tasks/eight.yaml", "w") as file:
    file.write(f'task: eight\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: "{own}/rows.jsonl"}}}}\n'
               'test_split: test\noutput_type: multiple_choice\ndoc_to_text: "{{q}}"\n'
               'doc_to_choice: choices\ndoc_to_target: gold\n')
lm = HFLM(pretrained=own, device="cpu", batch_size=4)
asked = []
answer = lm.loglikelihood
lm.loglikelihood = lambda requests, **kw: asked.append(len(requests)) or answer(requests, **kw)
simple_evaluate(model=lm, tasks=["eight"], task_manager=TaskManager(include_path=f"{own}/tasks", include_defaults=False),
                bootstrap_iters=0)
with open(f"{folder}/said-{rank}.json", "w") as file:
    json.dump({"processes": torch.distributed.get_world_size(), "world_size": lm.world_size, "asked": asked}, file)
PY
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install -qq "torch==2.13.0" "transformers==5.24.0" "accelerate==1.15.0" \
  "peft==0.21.2" "lm-eval==0.4.13" || exit 2
CUDA_VISIBLE_DEVICES="" HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 "$folder/env/bin/python" -W ignore -m torch.distributed.run \
  --standalone --nproc_per_node 2 "$folder/look.py" "$folder" >/dev/null 2>&1
cat "$folder"/said-0.json "$folder"/said-1.json
echo
# Eight questions of two choices are 16 requests; shared, each process would have 8.
said='{"processes": 2, "world_size": 1, "asked": [16]}'
[ "$(cat "$folder/said-0.json")" = "$said" ] && [ "$(cat "$folder/said-1.json")" = "$said" ]
