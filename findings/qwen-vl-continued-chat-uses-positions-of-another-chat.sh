#!/usr/bin/env bash
# An image takes fewer rotary positions than tokens in the Qwen vision-language
# models, so text after an image is shifted back by some amount.
#
# A good guess: that shift belongs to the chat, or to its cache. A chat whose
# cache was kept can be continued later, whatever the model did in between.
#
# What happens: the shift (rope_deltas) is an attribute of the model object
# and holds only the value of the latest call. This was seen with
# Qwen3-VL, Qwen2.5-VL and Qwen2-VL; this script runs the first two.
#   1. Chat A (with an image) is answered and its cache kept. Chat B (text only)
#      is answered. Continuing A from its cache now puts the new tokens at
#      wrong positions and gives other tokens, without an error or a warning.
#   2. If chat B was a batch of three, continuing A raises an error about tensor
#      sizes instead.
#   3. A plain text step by hand (new token, kept cache, attention mask over all
#      tokens so far) works on a fresh model object, and raises an error about
#      matrix shapes once the same object has generated anything.
# The same in transformers 5.16.1, 5.23.0 and 5.24.0; 5.24.0 is run here.
#
# Why it matters: a server that keeps caches for several chats, a logits
# processor or reward that asks the same model for something else, or an
# evaluation pass between two steps all change answers of earlier chats.
set -euo pipefail

work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1

python3 -m venv "$work/venv"
"$work/venv/bin/pip" -qq --disable-pip-version-check install torch==2.13.0 transformers==5.24.0 || exit 2

cat > "$work/check.py" <<'PY'
import copy
import sys

import torch
import transformers
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

transformers.logging.set_verbosity_error()
IMAGE = 100


def tiny(model_class, config_class, **vision):
    torch.manual_seed(0)
    text = dict(
        vocab_size=120, hidden_size=64, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, initializer_range=0.2,
        pad_token_id=0, bos_token_id=1, eos_token_id=None,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
    )
    vision.update(depth=1, hidden_size=32, intermediate_size=32, num_heads=2, patch_size=4, out_hidden_size=64)
    return model_class(
        config_class(
            text_config=text, vision_config=vision, image_token_id=IMAGE, video_token_id=101,
            vision_start_token_id=102, vision_end_token_id=103,
        )
    ).eval()


def text_inputs(ids):
    return dict(input_ids=ids, attention_mask=torch.ones_like(ids))


def attempt(call):
    try:
        return call(), None
    except RuntimeError as error:
        return None, str(error)


print(f"torch {torch.__version__}, transformers {transformers.__version__}")
print("good guess: a chat continued from its own cache gives the same tokens whatever ran in between")
ok = True
for model in (
    tiny(Qwen3VLForConditionalGeneration, Qwen3VLConfig, num_position_embeddings=64, deepstack_visual_indexes=[0]),
    tiny(Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLConfig),
):
    print(f"{type(model).__name__}:")
    greedy = dict(do_sample=False, return_dict_in_generate=True, output_logits=True)
    line, batch = torch.randint(20, 60, (1, 4)), torch.randint(20, 60, (3, 4))
    token = torch.tensor([[11]])

    def text_step_by_hand():
        kept = model(**text_inputs(line), use_cache=True)["cache"]
        return model(input_ids=token, attention_mask=torch.ones(1, 5, dtype=torch.long), cache=kept).logits[:, -1]

    with torch.no_grad():
        whole = model(**text_inputs(torch.cat([line, token], 1)), use_cache=False).logits[:, -1]
        fresh, fresh_error = attempt(text_step_by_hand)

        first = torch.tensor([[5, 6, 102] + [IMAGE] * 16 + [103, 7, 8]])
        image = dict(pixel_values=torch.randn(64, 96), image_grid_thw=torch.tensor([[1, 8, 8]]))
        chat_a = dict(text_inputs(first), **image, mm_token_type_ids=(first == IMAGE).int())
        turn_1 = model.generate(**chat_a, max_new_tokens=5, **greedy)
        second = torch.cat([turn_1.sequences, torch.tensor([[30, 31]])], 1)
        turn_2 = dict(text_inputs(second), mm_token_type_ids=(second == IMAGE).int(), max_new_tokens=6, **greedy)

        def continued(between):
            kept = model.generate(**chat_a, max_new_tokens=5, **greedy)["cache"]
            if between is not None:
                model.generate(**text_inputs(between), max_new_tokens=3, do_sample=False)
            return model.generate(**turn_2, cache=copy.deepcopy(kept))

        anew = model.generate(**turn_2, **image)
        alone, _ = attempt(lambda: continued(None))
        after_text, _ = attempt(lambda: continued(line))
        _, batch_error = attempt(lambda: continued(batch))
        model.generate(**text_inputs(line), max_new_tokens=3, do_sample=False)
        _, step_error = attempt(text_step_by_hand)

    def answer(result):
        return None if result is None else result.sequences[0, second.shape[1]:].tolist()

    def gap(result):
        return float("nan") if result is None else (result.logits[0] - anew.logits[0]).abs().max().item()

    print(f"  chat A, second turn, read anew:           {answer(anew)}")
    print(f"  from its cache, nothing in between:       {answer(alone)}, logits off by {gap(alone):.1e}")
    print(f"  from its cache, after a text chat B:      {answer(after_text)}, logits off by {gap(after_text):.1e}")
    print(f"  from its cache, after a batch of three:   {batch_error}")
    print(f"  text step by hand on a fresh object:      {fresh_error or 'works'}")
    print(f"  the same step after a generate call:      {step_error or 'works'}")
    ok &= answer(alone) == answer(anew) and gap(alone) < 1e-3
    ok &= answer(after_text) is not None and answer(after_text) != answer(anew) and gap(after_text) > 0.1
    ok &= batch_error is not None and "Sizes of tensors must match" in batch_error
    ok &= fresh is not None and torch.allclose(fresh, whole, atol=1e-3)
    ok &= step_error is not None and "shapes cannot be multiplied" in step_error

print("as stated" if ok else "NOT as stated any more")
sys.exit(0 if ok else 1)
PY
"$work/venv/bin/python" "$work/check.py"
