"""TrolConfig and those of the published sizes, what TroL models return, and the count of images.

A TroL model is any vision tower, any decoder, the projector between them, and a depth policy. The
images of a batch are consumed in reading order: row by row, within a row from left to right.
"""

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from jaxtyping import Bool, Shaped
from torch import Tensor
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    CLIPVisionConfig,
    InternVLVisionConfig,
    Phi3Config,
    PretrainedConfig,
)
from transformers.activations import ACT2FN
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from trol.errors import DataError, UsageError, unknown
from trol.family.internlm2 import InternLM2Config
from trol.policies.mixer import from_nothing

DEFAULT_DEPTH = from_nothing({"policy": "trol_mixer"})
"""Published TroL: each layer's gate decides per token how much of a second visit counts."""

DEFAULT_PARTS = {"vision_config": "clip_vision_model", "text_config": "llama"}
"""Part -> its model type where its dict names none."""


@strict
class TrolConfig(PretrainedConfig):
    """What a TroL model is built from.

    `vision_config` and `text_config` are configs of any registered model type, or their dicts
    (of a CLIP- or SigLIP-like pair the vision part is taken). `UsageError` where parts do not fit.
    """

    model_type = "trol"
    sub_configs = {"vision_config": AutoConfig, "text_config": AutoConfig}  # noqa: RUF012  # pyright: ignore

    vision_config: Any = None
    text_config: Any = None
    image_token_id: int = 32000
    """Stands in `input_ids` where an image feature goes; may lie outside the vocabulary."""
    projector_hidden_size: int | None = None
    """Width between the projector's two linear layers; None: the decoder's hidden size."""
    projector_hidden_act: str = "gelu"
    projector_positions: int = 0
    """Learned position embeddings added after the projector: 0, or `tokens_per_image`."""
    projector_norm: bool = False
    """Whether a LayerNorm comes before the projector's first linear layer."""
    downsample_ratio: float = 1.0
    """Pixel shuffle before the projector: 0.5 makes one wider feature of 2 x 2 patches."""
    vision_feature_layer: int | None = None
    """Which of the tower's hidden states is read; None: its last hidden state."""
    depth: Any = None
    """The depth policy: {"policy": name, **settings}; None: `DEFAULT_DEPTH`. Gates of a mixer start
    as published unless `initial_gate` says how."""
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        self.vision_config = _part("vision_config", self.vision_config)
        self.vision_config = getattr(self.vision_config, "vision_config", self.vision_config)
        self.text_config = _part("text_config", self.text_config)
        # Checkpoints of tied decoders say so in their own config; the head lives up here.
        self.tie_word_embeddings |= bool(getattr(self.text_config, "tie_word_embeddings", False))
        self.depth = _depth(DEFAULT_DEPTH if self.depth is None else self.depth)
        self._check_projector()
        super().__post_init__(**kwargs)

    @property
    def patch_grid(self) -> tuple[int, int]:
        """Rows and columns of patches that the tower makes of one image: H/p, W/p."""
        height, width = _pair(self.vision_config, "image_size")
        patch_height, patch_width = _pair(self.vision_config, "patch_size")
        return height // patch_height, width // patch_width

    @property
    def tokens_per_image(self) -> int:
        """Image tokens of one image, or of one tile of a tiled image: H/p · r · W/p · r."""
        rows, columns = self.patch_grid
        return int(rows * self.downsample_ratio) * int(columns * self.downsample_ratio)

    def _check_projector(self) -> None:
        block = 1 / self.downsample_ratio if 0 < self.downsample_ratio <= 1 else 0.5
        if not block.is_integer() or any(patches % block for patches in self.patch_grid):
            raise UsageError(
                f"downsample_ratio is {self.downsample_ratio}, but must be 1, 1/2, 1/3, ... and "
                f"divide the grid of {self.patch_grid} patches evenly."
            )
        if self.projector_hidden_act not in ACT2FN:
            raise unknown("projector_hidden_act", self.projector_hidden_act, ACT2FN)
        if self.projector_positions not in (0, self.tokens_per_image):
            raise UsageError(
                f"projector_positions is {self.projector_positions}, but one image is "
                f"{self.tokens_per_image} tokens; give {self.tokens_per_image}, or 0 for none."
            )


def _part(name: str, value: Any) -> PretrainedConfig:
    """The config of one part, from a config, its dict, or None (the default type's default)."""
    if isinstance(value, PretrainedConfig):
        return value
    if value is not None and not isinstance(value, dict):
        raise UsageError(f"{name} is {value!r}; give a transformers config, or its dict.")
    settings = dict(value or {})
    model_type = settings.pop("model_type", DEFAULT_PARTS[name])
    if model_type not in CONFIG_MAPPING:
        raise unknown(f"model_type of {name}", model_type, CONFIG_MAPPING.keys())
    return CONFIG_MAPPING[model_type](**settings)


def _pair(config: Any, name: str) -> tuple[int, int]:
    """`config.name` as (height, width) in pixels; one number is both."""
    value = getattr(config, name, None)
    if isinstance(value, int):
        return value, value
    if isinstance(value, list | tuple) and len(value) == 2:
        return int(value[0]), int(value[1])
    raise UsageError(
        f"the vision tower {config.model_type!r} has {name}={value!r}, so its image tokens cannot "
        "be counted; use a tower with a fixed image_size and patch_size (CLIP, SigLIP, ViT, ...)."
    )


def _depth(settings: Any) -> dict[str, Any]:
    """A copy of the depth settings, checked as far as is possible without knowing the policies."""
    cure = 'give {"policy": name, ...settings}, for example {"policy": "trol_mixer"}.'
    if not isinstance(settings, dict) or not isinstance(settings.get("policy"), str):
        raise UsageError(f"depth names no policy, got {settings!r}; {cure}")
    try:
        json.dumps(settings, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise UsageError(
            f"depth cannot be written as JSON ({error}), got {settings!r}; {cure}"
        ) from error
    return copy.deepcopy(from_nothing(settings))


@dataclass
class TrolModelOutput(BaseModelOutputWithPast):
    """A decoder's outputs, and the projected image features [N·P, D] where images were given."""

    image_hidden_states: torch.Tensor | None = None


@dataclass
class TrolCausalLMOutput(CausalLMOutputWithPast):
    """Loss, logits and cache, and the projected image features [N·P, D] if there were images."""

    image_hidden_states: torch.Tensor | None = None


def check_count(mask: Bool[Tensor, "B T"], features: int, tokens_per_image: int) -> None:
    """`DataError` unless the mask [B, T] marks as many placeholders as there are features."""
    if torch.compiler.is_compiling():
        return  # a check on values would break the graph; TrolProcessor has checked before
    rows = mask.sum(-1).tolist()
    if sum(rows) != features:
        raise DataError(
            f"got {sum(rows)} image tokens in the text (row by row: {rows}), expected {features}: "
            f"{features // tokens_per_image} images of {tokens_per_image} tokens; give "
            f"{tokens_per_image} image tokens for each image (TrolProcessor does), in pixel_values "
            "all rows' images in reading order, and do not truncate a row within an image."
        )


def repeat_images(
    pixel_values: Shaped[Tensor, "N 3 H W"],
    mask: Bool[Tensor, "B T"],
    tokens_per_image: int,
    times: int,
) -> Shaped[Tensor, "N_times 3 H W"]:
    """Pixels [N, 3, H, W] for rows each repeated `times` times: all images of a row, again.

    Repeating image by image, as transformers does where it has not encoded them before, would
    give two copies of a row with the images a, b the images (a, a) and (b, b).
    """
    rows = pixel_values.split((mask.sum(-1) // tokens_per_image).tolist())
    return torch.cat([row.repeat(times, 1, 1, 1) for row in rows])


PUBLISHED_DEPTH = from_nothing({"policy": "trol_mixer", "sharing": "shared"})
"""The released checkpoints have one gate for all layers."""


def trol_1_8b() -> TrolConfig:
    """TroL-1.8B: InternLM2-1.8B, CLIP-L/14 at 490 pixels, 1,225 image tokens."""
    return _internlm2_size(hidden_size=2048, layers=24, heads=16, intermediate_size=8192)


def trol_3_8b() -> TrolConfig:
    """TroL-3.8B: Phi-3-mini, InternViT-300M on tiles of 448 pixels, 256 image tokens a tile."""
    vision = InternVLVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=448,
        patch_size=14,
        attention_bias=True,
        use_mean_pooling=True,  # InternViT has no norm after its last layer
    )
    text = Phi3Config(
        vocab_size=32064,
        hidden_size=3072,
        intermediate_size=8192,
        num_hidden_layers=32,
        num_attention_heads=32,
        max_position_embeddings=4096,
    )
    return TrolConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=32012,
        downsample_ratio=0.5,
        projector_norm=True,
        depth=PUBLISHED_DEPTH,
    )


def trol_7b() -> TrolConfig:
    """TroL-7B: InternLM2-7B, CLIP-L/14 at 490 pixels, 1,225 image tokens."""
    return _internlm2_size(hidden_size=4096, layers=32, heads=32, intermediate_size=14336)


PUBLISHED: dict[str, Callable[[], TrolConfig]] = {
    "trol-1.8b": trol_1_8b,
    "trol-3.8b": trol_3_8b,
    "trol-7b": trol_7b,
}
"""The dimensions of the released models; without weights."""


def _internlm2_size(
    hidden_size: int, layers: int, heads: int, intermediate_size: int
) -> TrolConfig:
    vision = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=490,
        patch_size=14,
    )
    text = InternLM2Config(
        vocab_size=92544,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        max_position_embeddings=32768,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        pad_token_id=2,
    )
    return TrolConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=text.vocab_size,
        depth=PUBLISHED_DEPTH,
    )
