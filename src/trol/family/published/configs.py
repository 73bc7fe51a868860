"""The configuration of a published checkpoint: from its `config.json` and its tensors' shapes.

What the shapes tell is taken from them, and `config.json` may leave it out or null, but must not
contradict it; what they cannot tell (heads, RoPE, special ids) must be there. InternLM2's file is
flat, like that of InternLM-XComposer2; Phi-3's has a part each for decoder and tower, like that of
InternVL-Chat.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import CLIPVisionConfig, InternVLVisionConfig, Phi3Config
from transformers.activations import ACT2FN

from trol.errors import DataError
from trol.family.configuration import TrolConfig
from trol.family.internlm2 import InternLM2Config
from trol.family.published.files import CONFIG, CURE, Checkpoint, added_tokens, read_json

IMAGE_CONTEXT = "<IMG_CONTEXT>"
"""Phi-3's image token; InternLM2's has the id after its vocabulary, and no name."""

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


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_positive(value: Any) -> bool:
    return _is_number(value) and value > 0


def _are_ids(value: Any) -> bool:
    return _is_id(value) or (isinstance(value, list) and bool(value) and all(map(_is_id, value)))


def _are_factors(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_positive, value))


VALIDATORS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "a whole number above 0": (
        lambda value: _is_id(value) and value > 0,
        "num_attention_heads max_position_embeddings original_max_position_embeddings "
        "sliding_window img_size image_size force_image_size",
    ),
    "a number above 0": (
        _is_positive,
        "rope_theta factor rms_norm_eps layer_norm_eps initializer_range lora_alpha "
        "downsample_ratio",
    ),
    "a number from 0 to 1": (
        lambda value: _is_number(value) and 0 <= value <= 1,
        "lora_dropout attention_dropout embd_pdrop resid_pdrop",
    ),
    "a whole number from 0": (
        _is_id,
        "bos_token_id pad_token_id image_token_index img_context_token_id",
    ),
    "a whole number from 0, or a list of them": (_are_ids, "eos_token_id"),
    "a list of numbers above 0": (_are_factors, "short_factor long_factor"),
    "an activation that transformers knows, such as 'silu'": (
        lambda value: isinstance(value, str) and value in ACT2FN,
        "hidden_act",
    ),
}
"""What a value must be -> whether one is, and the keys of such values.

transformers' own configurations refuse wrong types, but few wrong values, and name no file. Keys
that are not listed are compared with the tensors, or checked where they are read.
"""

_EXPECTED = {key: words for words, (_, keys) in VALIDATORS.items() for key in keys.split()}


class ConfigReader:
    """The values of `config.json`, or of a part of it; `place` names it in errors.

    Null counts as left out. A value that is not what its key needs (`VALIDATORS`) is a `DataError`
    when it is read.
    """

    def __init__(self, values: Any, place: str) -> None:
        if not isinstance(values, dict):
            raise DataError(f"{place} is {values!r}, not an object; {CURE}.")
        self._values, self.place = values, place

    def part(self, name: str) -> "ConfigReader":
        """The reader of a part; of an empty one where it is left out."""
        return ConfigReader(self.get(name, default={}), f"{self.place}: {name}")

    def get(self, *names: str, default: Any = None) -> Any:
        """The value of the first of these keys that is there."""
        return next(iter(self.optional(*names).values()), default)

    def optional(self, *names: str) -> dict[str, Any]:
        """Those of these keys that are there, with their values."""
        values = {name: self._values[name] for name in names if self._values.get(name) is not None}
        for name, value in values.items():
            expected = _EXPECTED.get(name)
            if expected is not None and not VALIDATORS[expected][0](value):
                raise DataError(
                    f"{self.place} states {name} {value!r}, expected {expected}; {CURE}."
                )
        return values

    def required(self, name: str) -> Any:
        """A value that must be there; `DataError` where it is not."""
        value = self.get(name)
        if value is None:
            raise DataError(f"{self.place} does not state {name!r}; {CURE}.")
        return value

    def must_equal(self, **from_tensors: Any) -> dict[str, Any]:
        """What the tensors tell; `DataError` where another value is given."""
        for name, value in from_tensors.items():
            if self.get(name, default=value) != value:
                raise DataError(
                    f"{self.place} states {name} {self.get(name)!r}, but the tensors are made for "
                    f"{value!r}; {CURE}."
                )
        return from_tensors


def trol_config(family: str, checkpoint: Checkpoint) -> TrolConfig:
    """The TroL configuration of a checkpoint, all but its depth policy.

    Raises:
        DataError: `config.json` lacks what is needed or contradicts the tensors.
    """
    file = checkpoint.folder / CONFIG
    reader = ConfigReader(read_json(file), str(file))
    parts = {"internlm2": _internlm2, "phi3": _phi3}[family](reader, checkpoint)
    return TrolConfig(
        **parts,
        projector_hidden_size=checkpoint.shape(f"vision_proj.{_FIRST_LINEAR[family]}.weight")[0],
        dtype=checkpoint.read(HEADS[family]).dtype,
    )


def _internlm2(reader: ConfigReader, checkpoint: Checkpoint) -> dict[str, Any]:
    vocab, hidden = checkpoint.shape(HEADS["internlm2"])
    heads, layer = reader.required("num_attention_heads"), "model.layers.0"
    rows = checkpoint.shape("model.tok_embeddings.weight")[0]
    if reader.get("vocab_size") != rows:  # it may include the token table's rows for images
        reader.must_equal(vocab_size=vocab)
    rank = checkpoint.shape(f"{layer}.attention.wqkv.lora_A.weight")[0]
    text = InternLM2Config(
        **reader.must_equal(
            hidden_size=hidden,
            intermediate_size=checkpoint.shape(f"{layer}.feed_forward.w1.ffn.weight")[0],
            num_hidden_layers=_count(checkpoint, "model.layers."),
            num_key_value_heads=_key_heads(
                checkpoint, f"{layer}.attention.wqkv.ffn.weight", heads, hidden
            ),
        ),
        **reader.optional("hidden_act", "initializer_range", "rms_norm_eps"),
        vocab_size=vocab,
        num_attention_heads=heads,
        max_position_embeddings=reader.required("max_position_embeddings"),
        rope_parameters=internlm2_rope(reader),
        image_lora_rank=rank,
        image_lora_alpha=reader.get("lora_alpha", default=rank),
        image_lora_dropout=reader.get("lora_dropout", default=0.05),
        image_rows=rows - vocab,
        **_special_ids(reader, vocab),
    )
    return {
        "text_config": text,
        "vision_config": _clip(reader, checkpoint),
        "image_token_id": vocab,
    }


def _clip(whole: ConfigReader, checkpoint: Checkpoint) -> CLIPVisionConfig:
    reader, tower = whole.part("vision_config"), "vit.vision_tower.vision_model"
    size, channels, patch, _ = checkpoint.shape(f"{tower}.embeddings.patch_embedding.weight")
    grid = position_grid(checkpoint, "internlm2")
    grid = PUBLISHED_GRID if grid == CLIP_GRID else grid
    pixels = whole.get("img_size", "image_size", default=grid * patch)
    return CLIPVisionConfig(
        **reader.must_equal(
            hidden_size=size,
            intermediate_size=checkpoint.shape(f"{tower}.encoder.layers.0.mlp.fc1.weight")[0],
            num_hidden_layers=_count(checkpoint, f"{tower}.encoder.layers."),
            num_channels=channels,
            patch_size=patch,
        ),
        num_attention_heads=_vision_heads(reader, size),
        image_size=_whole_patches(whole, pixels, patch),
        **reader.optional("hidden_act", "layer_norm_eps"),
    )


def _phi3(whole: ConfigReader, checkpoint: Checkpoint) -> dict[str, Any]:
    reader = whole.part("llm_config")
    vocab, hidden = checkpoint.shape("language_model.model.embed_tokens.weight")
    heads, layers = reader.required("num_attention_heads"), "language_model.model.layers."
    positions = reader.required("max_position_embeddings")
    window = reader.get("sliding_window")
    text = Phi3Config(
        **reader.must_equal(
            hidden_size=hidden,
            intermediate_size=checkpoint.shape(f"{layers}0.mlp.gate_up_proj.weight")[0] // 2,
            num_hidden_layers=_count(checkpoint, layers),
            num_key_value_heads=_key_heads(
                checkpoint, f"{layers}0.self_attn.qkv_proj.weight", heads, hidden
            ),
            vocab_size=vocab,
        ),
        **reader.optional("hidden_act", "initializer_range", "original_max_position_embeddings"),
        **reader.optional("rms_norm_eps", "attention_dropout", "embd_pdrop", "resid_pdrop"),
        num_attention_heads=heads,
        max_position_embeddings=positions,
        # A window no shorter than the longest text hides nothing.
        sliding_window=window if window and window < positions else None,
        rope_parameters=phi3_rope(reader, hidden // heads),
        **_special_ids(reader, vocab),
    )
    return {
        "text_config": text,
        "vision_config": _internvit(whole, checkpoint),
        "image_token_id": _image_token_id(whole, checkpoint.folder, vocab),
        "projector_norm": True,
        "downsample_ratio": whole.get("downsample_ratio", default=0.5),
    }


def _internvit(whole: ConfigReader, checkpoint: Checkpoint) -> InternVLVisionConfig:
    reader = whole.part("vision_config")
    tower, layer = "vision_model.", "vision_model.encoder.layers.0"
    size, channels, *patch = checkpoint.shape(f"{tower}embeddings.patch_embedding.weight")
    pixels = whole.get("force_image_size", default=position_grid(checkpoint, "phi3") * patch[0])
    return InternVLVisionConfig(
        **reader.must_equal(
            hidden_size=size,
            intermediate_size=checkpoint.shape(f"{layer}.mlp.fc1.weight")[0],
            num_hidden_layers=_count(checkpoint, f"{tower}encoder.layers."),
            num_channels=channels,
        ),
        num_attention_heads=_vision_heads(reader, size),
        patch_size=patch,
        image_size=_whole_patches(whole, pixels, patch[0]),
        attention_bias=f"{layer}.attn.qkv.bias" in checkpoint,
        use_qk_norm=f"{layer}.attn.q_norm.weight" in checkpoint,
        norm_type="layer_norm" if f"{layer}.norm1.bias" in checkpoint else "rms_norm",
        use_mean_pooling=True,  # the published tower has no final norm
        **reader.optional("hidden_act", "layer_norm_eps"),
    )


def internlm2_rope(reader: ConfigReader) -> dict[str, Any]:
    """InternLM2's RoPE, in transformers' words: plain, linear, or dynamic (NTK).

    `DataError` for another kind.
    """
    scaling = reader.part("rope_scaling")
    kind = _rope_kind(reader, scaling, "InternLM2", ("dynamic", "linear"))
    rope = {"rope_type": kind, "rope_theta": reader.get("rope_theta", default=10000.0)}
    return rope if kind == "default" else rope | {"factor": scaling.required("factor")}


def phi3_rope(reader: ConfigReader, head_size: int | None = None) -> dict[str, Any]:
    """Phi-3's RoPE: "su" is transformers' longrope, and "yarn" is it with another factor.

    cos and sin are scaled by √(1 + ln s / ln original), or for "yarn" by 0.1 ln s + 1, where
    s = longest / original. `DataError` for another kind, and for other than head_size / 2 factors
    where the size of a head is given.
    """
    scaling = reader.part("rope_scaling")
    kind = _rope_kind(reader, scaling, "Phi-3", ("su", "longrope", "yarn"))
    rope = {"rope_type": "default", "rope_theta": reader.get("rope_theta", default=10000.0)}
    if kind == "default":
        return rope
    original = reader.required("original_max_position_embeddings")
    scale = reader.required("max_position_embeddings") / original
    rope |= {
        "rope_type": "longrope",
        "original_max_position_embeddings": original,
        "factor": scale,
    }
    if kind == "yarn":
        rope["attention_factor"] = 0.1 * math.log(scale) + 1 if scale > 1 else 1.0
    factors = {name: scaling.required(name) for name in ("short_factor", "long_factor")}
    for name, values in factors.items():
        if head_size is not None and len(values) != head_size // 2:
            raise DataError(
                f"{scaling.place} states {len(values)} numbers as {name}, expected "
                f"{head_size // 2}, half the size of a head; {CURE}."
            )
    return rope | factors


def _rope_kind(
    reader: ConfigReader, scaling: ConfigReader, decoder: str, kinds: tuple[str, ...]
) -> str:
    kind = scaling.get("type", "rope_type", default="default")
    if kind not in ("default", *kinds):
        raise DataError(
            f"{reader.place} asks for RoPE scaling {kind!r}, but {decoder} knows "
            f"{', '.join(kinds)}; {CURE}."
        )
    return kind


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


def _vision_heads(reader: ConfigReader, hidden: int) -> int:
    heads = reader.get("num_attention_heads", default=max(1, hidden // HEAD_SIZE))
    if hidden % heads:
        raise DataError(
            f"{reader.place} states num_attention_heads {heads}, expected a divisor of the "
            f"tower's width {hidden}; {CURE}."
        )
    return heads


def _whole_patches(reader: ConfigReader, pixels: int, patch: int) -> int:
    """The largest side of whole patches within so many pixels."""
    if pixels < patch:
        raise DataError(
            f"{reader.place} states an image size of {pixels} pixels, expected at least one patch "
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
    key_heads = (rows // size - heads) // 2 if size else 0
    if key_heads < 1 or (heads + 2 * key_heads) * size != rows or heads % key_heads:
        raise DataError(
            f"{checkpoint.file(name)}: {name!r} has {rows} rows, which do not divide into {heads} "
            f"query heads of {size} and pairs of key and value heads; {CURE}."
        )
    return key_heads


def _special_ids(reader: ConfigReader, vocab: int) -> dict[str, Any]:
    end = reader.get("eos_token_id", default=2)
    ends = end if isinstance(end, list) else [end]
    first = reader.get("bos_token_id", default=1)
    pad = reader.get("pad_token_id", default=ends[0])
    for name, ids in {"bos": [first], "eos": ends, "pad": [pad]}.items():
        if max(ids) >= vocab:
            raise DataError(
                f"{reader.place} states {name}_token_id {max(ids)}, expected one of the {vocab} "
                f"in the vocabulary; {CURE}."
            )
    return {"bos_token_id": first, "eos_token_id": end, "pad_token_id": pad}


def _image_token_id(reader: ConfigReader, folder: Path, vocab: int) -> int:
    """The id of `IMAGE_CONTEXT`, from `config.json`, or else from the tokenizer's files."""
    number = reader.get("image_token_index", "img_context_token_id")
    if number is None:
        number = added_tokens(folder).get(IMAGE_CONTEXT)
    if number is None or not 0 <= number < vocab:
        raise DataError(
            f"the tokenizer in {folder} gives the image token {IMAGE_CONTEXT!r} the id {number}, "
            f"expected one of the {vocab} in the token table; put the checkpoint's own tokenizer "
            "files (tokenizer.json, added_tokens.json, tokenizer_config.json) beside its weights."
        )
    return number
