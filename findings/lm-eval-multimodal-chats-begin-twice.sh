#!/usr/bin/env bash
# A model that sees is measured by lm-eval's `hf-multimodal` with
# --apply_chat_template, as its documentation says for chat models.
#
# A good guess: the prompt has the tokens that transformers' own
# processor.apply_chat_template(tokenize=True) makes of the same chat; lm-eval's
# `hf` for models of text takes care of a template's begin token.
#
# What happens (lm-eval 0.4.13): the template writes the begin token, and the
# processor, which is called on that text, puts another one before it. Every
# prompt of every such model whose tokenizer adds one begins twice.
#
# Exit 0: as stated; 1: no longer.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat >"$folder/look.py" <<'PY'
import logging
import sys
import tempfile
import warnings

warnings.filterwarnings("ignore")
logging.disable(logging.ERROR)
import torch
import transformers
from lm_eval.models.hf_vlms import HFMultimodalLM
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

words = ["<unk>", "<s>", "</s>", "<image>", "user:", "assistant:", "what", "colour", "?"]
tokens = Tokenizer(models.WordLevel({word: at for at, word in enumerate(words)}, unk_token="<unk>"))
tokens.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokens.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokens, unk_token="<unk>", bos_token="<s>", eos_token="</s>",
                                    pad_token="</s>", additional_special_tokens=["<image>"])
template = ("{{ bos_token }} {% for m in messages %}{{ m.role }}: {% for c in m.content %}"
            "{% if c.type == 'image' %}<image> {% else %}{{ c.text }} {% endif %}{% endfor %}{% endfor %}"
            "{% if add_generation_prompt %}assistant:{% endif %}")
pictures = CLIPImageProcessor(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
processor = LlavaProcessor(pictures, tokenizer, patch_size=4, vision_feature_select_strategy="default",
                           chat_template=template, num_additional_image_tokens=1)
torch.manual_seed(0)
text = LlamaConfig(vocab_size=len(words), hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                   num_attention_heads=2, num_key_value_heads=2)
sight = CLIPVisionConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
                         image_size=8, patch_size=4)
model = LlavaForConditionalGeneration(LlavaConfig(vision_config=sight, text_config=text, image_token_index=3))
with tempfile.TemporaryDirectory() as folder:
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    lm = HFMultimodalLM(folder, device="cpu", batch_size=1)
picture = Image.new("RGB", (8, 8), "red")
prompt = lm.apply_chat_template([{"role": "user", "content": "<image>what colour ?"}])
theirs = lm.tok_batch_multimodal_encode([prompt], [[picture]])["input_ids"][0].tolist()
chat = [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": "what colour ?"}]}]
right = lm.processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=True,
                                         return_tensors="pt")["input_ids"][0].tolist()
print("prompt", repr(prompt))
print("lm-eval", theirs, "transformers", right)
stated = theirs.count(1) == 2 and right.count(1) == 1 and theirs[1:] == right
sys.exit(0 if stated else 1)
PY
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install -qq "torch==2.13.0" "transformers==5.24.0" "accelerate==1.15.0" \
  "peft==0.21.2" "lm-eval==0.4.13" "pillow==12.3.0" || exit 2
HF_HUB_OFFLINE=1 "$folder/env/bin/python" -W ignore "$folder/look.py"
