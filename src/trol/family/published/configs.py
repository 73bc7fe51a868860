"""The configuration of a published checkpoint: from its `config.json` and its tensors' shapes.

What the shapes tell is taken from them, and `config.json` may leave it out or null, but must not
contradict it; what they cannot tell (heads, RoPE, special ids) must be there. InternLM2's file is
flat, like that of InternLM-XComposer2; Phi-3's has a part each for decoder and tower, like that of
InternVL-Chat.

Rotary position embeddings: what the published checkpoints state, in transformers' words.

Which parts of a TroL model are quantised: the decoder's own linear maps, and nothing else.
"""

from __future__ import annotations

import copy
import logging
import math
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig, CLIPVisionConfig, InternVLVisionConfig, Phi3Config

from trol.errors import DataError, HostError, UsageError
from trol.family.configuration import TrolConfig
from trol.family.internlm2 import InternLM2Config
from trol.family.published.files import CONFIG, CURE, Checkpoint, Stated, image_token_id, read_json


def internlm2_rope(stated: Stated) -> dict[str, Any]:
    """InternLM2's RoPE: plain, linear, or dynamic (NTK); `DataError` for another kind."""
    scaling = stated.part("rope_scaling")
    kind = scaling.get("type", "rope_type", default="default")
    if kind not in ("default", "dynamic", "linear"):
        raise DataError(
            f"{stated.place} asks for RoPE scaling {kind!r}, but InternLM2 knows dynamic and "
            f"linear; {CURE}."
        )
    made = {"rope_type": kind, "rope_theta": stated.get("rope_theta", default=10000.0)}
    return made if kind == "default" else made | {"factor": scaling.need("factor")}


def phi3_rope(stated: Stated, head_size: int | None = None) -> dict[str, Any]:
    """Phi-3's RoPE: "su" is transformers' longrope, and "yarn" is it with another factor.

    cos and sin are scaled by √(1 + ln s / ln original), or for "yarn" by 0.1 ln s + 1, where
    s = longest / original. `DataError` for another kind, and for other than head_size / 2 factors
    where the size of a head is given.
    """
    scaling = stated.part("rope_scaling")
    kind = scaling.get("type", "rope_type", default="default")
    made = {"rope_type": "default", "rope_theta": stated.get("rope_theta", default=10000.0)}
    if kind == "default":
        return made
    if kind not in ("su", "longrope", "yarn"):
        raise DataError(
            f"{stated.place} asks for RoPE scaling {kind!r}, but Phi-3 knows su, longrope and "
            f"yarn; {CURE}."
        )
    original = stated.need("original_max_position_embeddings")
    scale = stated.need("max_position_embeddings") / original
    if kind == "yarn":
        made["attention_factor"] = 0.1 * math.log(scale) + 1 if scale > 1 else 1.0
    made |= {
        "rope_type": "longrope",
        "original_max_position_embeddings": original,
        "factor": scale,
    }
    factors = {name: scaling.need(name) for name in ("short_factor", "long_factor")}
    for name, found in factors.items():
        if head_size is not None and len(found) != head_size // 2:
            raise DataError(
                f"{scaling.place} states {len(found)} numbers as {name}, expected "
                f"{head_size // 2}, half the size of a head; {CURE}."
            )
    return made | factors


PUBLISHED_GRID = 35
"""Patches along each side that InternLM2's models see; their tower's own table has `CLIP_GRID`."""
CLIP_GRID = 24

HEAD_SIZE = 64
"""Of the published vision towers, where `config.json` does not tell."""

POSITIONS = {
    "internlm2": "vit.vision_tower.vision_model.embeddings.position_embedding.weight",
    "phi3": "vision_model.embeddings.position_embedding",
}
"""Family -> its vision tower's position table."""

HEADS = {"internlm2": "output.weight", "phi3": "language_model.lm_head.weight"}
"""Family -> the head, whose type is the checkpoint's."""

_FIRST_LINEAR = {"internlm2": 0, "phi3": 1}
"""Family -> place of the first linear map in its projector."""


def trol_config(family: str, checkpoint: Checkpoint) -> TrolConfig:
    """The TroL configuration of a checkpoint, all but its depth policy.

    Raises:
        DataError: `config.json` lacks what is needed or contradicts the tensors.
    """
    file = checkpoint.folder / CONFIG
    stated = Stated(read_json(file), str(file))
    made = {"internlm2": _internlm2, "phi3": _phi3}[family](stated, checkpoint)
    return TrolConfig(
        **made,
        projector_hidden_size=checkpoint.shape(f"vision_proj.{_FIRST_LINEAR[family]}.weight")[0],
        dtype=checkpoint.read(HEADS[family]).dtype,
    )


def _internlm2(stated: Stated, checkpoint: Checkpoint) -> dict[str, Any]:
    vocab, hidden = checkpoint.shape(HEADS["internlm2"])
    heads, layer = stated.need("num_attention_heads"), "model.layers.0"
    rows = checkpoint.shape("model.tok_embeddings.weight")[0]
    if stated.get("vocab_size") != rows:  # it may include the token table's rows for images
        stated.agree(vocab_size=vocab)
    rank = checkpoint.shape(f"{layer}.attention.wqkv.lora_A.weight")[0]
    text = InternLM2Config(
        **stated.agree(
            hidden_size=hidden,
            intermediate_size=checkpoint.shape(f"{layer}.feed_forward.w1.ffn.weight")[0],
            num_hidden_layers=_count(checkpoint, "model.layers."),
            num_key_value_heads=_key_heads(
                checkpoint, f"{layer}.attention.wqkv.ffn.weight", heads, hidden
            ),
        ),
        **stated.take("hidden_act", "initializer_range", "rms_norm_eps"),
        vocab_size=vocab,
        num_attention_heads=heads,
        max_position_embeddings=stated.need("max_position_embeddings"),
        rope_parameters=internlm2_rope(stated),
        image_lora_rank=rank,
        image_lora_alpha=stated.get("lora_alpha", default=rank),
        image_lora_dropout=stated.get("lora_dropout", default=0.05),
        image_rows=rows - vocab,
        **_special_ids(stated, vocab),
    )
    tower = "vit.vision_tower.vision_model"
    vision = _clip(stated, stated.part("vision_config"), checkpoint, tower)
    return {"text_config": text, "vision_config": vision, "image_token_id": vocab}


def _clip(whole: Stated, stated: Stated, checkpoint: Checkpoint, tower: str) -> CLIPVisionConfig:
    size, channels, patch, _ = checkpoint.shape(f"{tower}.embeddings.patch_embedding.weight")
    grid = position_grid(checkpoint, "internlm2")
    grid = PUBLISHED_GRID if grid == CLIP_GRID else grid
    pixels = whole.get("img_size", "image_size", default=grid * patch)
    return CLIPVisionConfig(
        **stated.agree(
            hidden_size=size,
            intermediate_size=checkpoint.shape(f"{tower}.encoder.layers.0.mlp.fc1.weight")[0],
            num_hidden_layers=_count(checkpoint, f"{tower}.encoder.layers."),
            num_channels=channels,
            patch_size=patch,
        ),
        num_attention_heads=_vision_heads(stated, size),
        image_size=_whole_patches(whole, pixels, patch),
        **stated.take("hidden_act", "layer_norm_eps"),
    )


def _phi3(whole: Stated, checkpoint: Checkpoint) -> dict[str, Any]:
    stated = whole.part("llm_config")
    vocab, hidden = checkpoint.shape("language_model.model.embed_tokens.weight")
    heads, layers = stated.need("num_attention_heads"), "language_model.model.layers."
    most = stated.need("max_position_embeddings")
    window = stated.get("sliding_window")
    text = Phi3Config(
        **stated.agree(
            hidden_size=hidden,
            intermediate_size=checkpoint.shape(f"{layers}0.mlp.gate_up_proj.weight")[0] // 2,
            num_hidden_layers=_count(checkpoint, layers),
            num_key_value_heads=_key_heads(
                checkpoint, f"{layers}0.self_attn.qkv_proj.weight", heads, hidden
            ),
            vocab_size=vocab,
        ),
        **stated.take("hidden_act", "initializer_range", "original_max_position_embeddings"),
        **stated.take("rms_norm_eps", "attention_dropout", "embd_pdrop", "resid_pdrop"),
        num_attention_heads=heads,
        max_position_embeddings=most,
        # A window no shorter than the longest text hides nothing.
        sliding_window=window if window and window < most else None,
        rope_parameters=phi3_rope(stated, hidden // heads),
        **_special_ids(stated, vocab),
    )
    return {
        "text_config": text,
        "vision_config": _internvit(whole, checkpoint),
        "image_token_id": image_token_id(whole, checkpoint.folder, vocab),
        "projector_norm": True,
        "downsample_ratio": whole.get("downsample_ratio", default=0.5),
    }


def _internvit(whole: Stated, checkpoint: Checkpoint) -> InternVLVisionConfig:
    stated = whole.part("vision_config")
    tower, layer = "vision_model.", "vision_model.encoder.layers.0"
    size, channels, *patch = checkpoint.shape(f"{tower}embeddings.patch_embedding.weight")
    pixels = whole.get("force_image_size", default=position_grid(checkpoint, "phi3") * patch[0])
    return InternVLVisionConfig(
        **stated.agree(
            hidden_size=size,
            intermediate_size=checkpoint.shape(f"{layer}.mlp.fc1.weight")[0],
            num_hidden_layers=_count(checkpoint, f"{tower}encoder.layers."),
            num_channels=channels,
        ),
        num_attention_heads=_vision_heads(stated, size),
        patch_size=patch,
        image_size=_whole_patches(whole, pixels, patch[0]),
        attention_bias=f"{layer}.attn.qkv.bias" in checkpoint,
        use_qk_norm=f"{layer}.attn.q_norm.weight" in checkpoint,
        norm_type="layer_norm" if f"{layer}.norm1.bias" in checkpoint else "rms_norm",
        use_mean_pooling=True,  # the published tower has no final norm
        **stated.take("hidden_act", "layer_norm_eps"),
    )


def position_grid(checkpoint: Checkpoint, family: str) -> int:
    """Patches along each side that the position table in the file is made for."""
    *_, rows, _ = checkpoint.shape(POSITIONS[family])
    grid = math.isqrt(rows - 1)
    if grid * grid + 1 != rows:
        raise DataError(
            f"{checkpoint.file(POSITIONS[family])}: {POSITIONS[family]!r} has {rows} rows, "
            f"expected one and a square number of patches; {CURE}."
        )
    return grid


def _vision_heads(stated: Stated, hidden: int) -> int:
    heads = stated.get("num_attention_heads", default=max(1, hidden // HEAD_SIZE))
    if hidden % heads:
        raise DataError(
            f"{stated.place} states num_attention_heads {heads}, expected a divisor of the "
            f"tower's width {hidden}; {CURE}."
        )
    return heads


def _whole_patches(stated: Stated, pixels: int, patch: int) -> int:
    """The largest side of whole patches within so many pixels."""
    if pixels < patch:
        raise DataError(
            f"{stated.place} states an image size of {pixels} pixels, expected at least one patch "
            f"of {patch}; {CURE}."
        )
    return pixels // patch * patch


def _count(checkpoint: Checkpoint, prefix: str) -> int:
    """How many layers there are: one more than the highest number after `prefix`."""
    numbers = [n[len(prefix) :].split(".")[0] for n in checkpoint.names() if n.startswith(prefix)]
    return max((int(number) for number in numbers if number.isdigit()), default=-1) + 1


def _key_heads(checkpoint: Checkpoint, name: str, heads: int, hidden: int) -> int:
    """Key heads k, from a fused map of (heads + 2 k) · hidden / heads rows."""
    rows, size = checkpoint.shape(name)[0], hidden // heads
    found = (rows // size - heads) // 2 if size else 0
    if found < 1 or (heads + 2 * found) * size != rows or heads % found:
        raise DataError(
            f"{checkpoint.file(name)}: {name!r} has {rows} rows, which do not divide into {heads} "
            f"query heads of {size} and pairs of key and value heads; {CURE}."
        )
    return found


def _special_ids(stated: Stated, vocab: int) -> dict[str, Any]:
    end = stated.get("eos_token_id", default=2)
    ends = end if isinstance(end, list) else [end]
    first = stated.get("bos_token_id", default=1)
    pad = stated.get("pad_token_id", default=ends[0])
    for name, found in {"bos": [first], "eos": ends, "pad": [pad]}.items():
        if max(found) >= vocab:
            raise DataError(
                f"{stated.place} states {name}_token_id {max(found)}, expected one of the {vocab} "
                f"in the vocabulary; {CURE}."
            )
    return {"bos_token_id": first, "eos_token_id": end, "pad_token_id": pad}


NEVER = ("model.vision_tower", "model.projector", "lm_head", "depth", "image_down", "image_up")
"""Modules that keep their type: tower, projector, head, gates, and the LoRA of image tokens."""

BITS = (4, 8)

BLOCK = 64
"""Weights that share a scale in 4 bits; a map's rows must be made of whole blocks."""
ROWS = 32
"""Rows that bitsandbytes packs together for a CPU."""

# bitsandbytes asks for a package that it does not need, in every process that imports it.
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(
    lambda record: "from kernels-community" not in str(record.msg)
)


def quantised(bits: int, compute_dtype: torch.dtype = torch.float16) -> BitsAndBytesConfig:
    """As published: 4 bits (nf4, its scales quantised too) or 8 (int8, outliers above 6 apart).

    Raises:
        UsageError: another number of bits.
        HostError: bitsandbytes is not installed.
    """
    if bits not in BITS:
        raise UsageError(f"bits is {bits!r}; give 4 or 8, or leave it out for the full weights.")
    if find_spec("bitsandbytes") is None:
        raise HostError(
            f"weights of {bits} bits need bitsandbytes, which is not installed; "
            "run: pip install 'trol-vlm[quant]'"
        )
    return BitsAndBytesConfig(
        load_in_4bit=bits == 4,
        load_in_8bit=bits == 8,
        llm_int8_threshold=6.0,
        llm_int8_skip_modules=list(NEVER),
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
    )


def spare_parts(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings of a `from_pretrained`, in whose bitsandbytes configuration `NEVER` is spared.

    A configuration without a list of modules to skip would quantise tower, projector and gates.
    Eight bits compute in float16, which is the others' type unless the settings say one.
    """
    given = settings.get("quantization_config")
    if isinstance(given, dict) and given.get("quant_method", "bitsandbytes") == "bitsandbytes":
        given = BitsAndBytesConfig.from_dict(given)
    if not isinstance(given, BitsAndBytesConfig):
        return settings
    made = copy.deepcopy(given)
    made.llm_int8_skip_modules = list(dict.fromkeys([*(given.llm_int8_skip_modules or []), *NEVER]))
    own = {} if not made.load_in_8bit or "torch_dtype" in settings else {"dtype": torch.float16}
    return {**own, **settings, "quantization_config": made}


def check_blocks(model: nn.Module, name: str) -> None:
    """`HostError` where a 4-bit map has not the widths that bitsandbytes can compute with."""
    named: list[tuple[str, Any]] = list(model.named_modules())
    for place, module in named:
        if type(module).__name__ != "Linear4bit":
            continue
        rows, columns = module.out_features, module.in_features
        if rows % ROWS or columns % BLOCK:
            raise HostError(
                f"{name} cannot be used in 4 bits: its map {place!r} has the shape "
                f"[{rows}, {columns}], expected a multiple of {ROWS} rows and of {BLOCK} columns; "
                "take 8 bits (--bits 8, bits=8), or its full weights."
            )
