"""A tiny GGUF file, as llama.cpp's own tools lay one out."""

from pathlib import Path

import gguf
import torch
from tokenizers import pre_tokenizers

TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"


def written(path: Path, *, family: str = "llama", layers: int = 2, kind: str = "Q8_0") -> Path:
    """A chat model of a few layers with random weights and a vocabulary of bytes."""
    wide, vocabulary = 32, 300
    path.parent.mkdir(exist_ok=True)
    packing = gguf.GGMLQuantizationType[kind]
    writer = gguf.GGUFWriter(path, family)
    writer.add_context_length(256)
    writer.add_embedding_length(wide)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(4)
    writer.add_rope_dimension_count(wide // 4)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(vocabulary)
    writer.add_tokenizer_model("gpt2")
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    # Two merges: of one alone, transformers 5.16 makes letters.
    writer.add_token_list([*letters, "he", "ll", *(f"<{i}>" for i in range(vocabulary - 258))])
    writer.add_token_types([1] * vocabulary)
    writer.add_token_merges(["h e", "l l"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template(TEMPLATE)
    drawn = torch.Generator().manual_seed(0)
    shapes = {
        "token_embd": (vocabulary, wide),
        "output_norm": (wide,),
        "output": (vocabulary, wide),
    }
    for layer in range(layers):
        block = f"blk.{layer}"
        shapes |= {f"{block}.{norm}": (wide,) for norm in ("attn_norm", "ffn_norm")}
        shapes |= {f"{block}.attn_{one}": (wide, wide) for one in ("q", "k", "v", "output")}
        shapes |= {f"{block}.ffn_{one}": (64, wide) for one in ("gate", "up")}
        shapes[f"{block}.ffn_down"] = (wide, 64)
    for name, shape in shapes.items():
        values = torch.randn(shape, generator=drawn).numpy() / 8
        if len(shape) == 1:
            writer.add_tensor(f"{name}.weight", values)
        else:
            packed = gguf.quants.quantize(values, packing)
            writer.add_tensor(f"{name}.weight", packed, raw_dtype=packing)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
