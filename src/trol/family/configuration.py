"""TrolConfig: any vision tower, any decoder, the projector between them, and the depth policy.

What TroL models return: transformers' outputs, and the image features.

Image placeholders: how many there must be, and whose images are whose.

Images are consumed in reading order: row by row, and within a row from left to right.
"""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig
from transformers.activations import ACT2FN
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from trol.errors import DataError, UsageError, unknown

DEFAULT_DEPTH = {"policy": "trol_mixer"}
"""Published TroL: each layer's gate decides per token how much of a second visit counts."""

DEFAULT_PARTS = {"vision_config": "clip_vision_model", "text_config": "llama"}
"""The model type of a part whose dict names none."""


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
    """The depth policy: {"policy": name, **settings}; None: `DEFAULT_DEPTH`."""
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
        fewer = 1 / self.downsample_ratio if 0 < self.downsample_ratio <= 1 else 0.5
        if not fewer.is_integer() or any(side % fewer for side in self.patch_grid):
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


def _part(name: str, given: Any) -> PretrainedConfig:
    """The config of one part, from a config, its dict, or nothing (the default type's default)."""
    if isinstance(given, PretrainedConfig):
        return given
    if given is not None and not isinstance(given, dict):
        raise UsageError(f"{name} is {given!r}; give a transformers config, or its dict.")
    settings = dict(given or {})
    model_type = settings.pop("model_type", DEFAULT_PARTS[name])
    if model_type not in CONFIG_MAPPING:
        raise unknown(f"model_type of {name}", model_type, CONFIG_MAPPING.keys())
    return CONFIG_MAPPING[model_type](**settings)


def _pair(config: Any, name: str) -> tuple[int, int]:
    """`config.name` as (height, width) in pixels; one number stands for both."""
    value = getattr(config, name, None)
    if isinstance(value, int):
        return value, value
    if isinstance(value, list | tuple) and len(value) == 2:
        return int(value[0]), int(value[1])
    raise UsageError(
        f"the vision tower {config.model_type!r} has {name}={value!r}, so its image tokens cannot "
        "be counted; use a tower with a fixed image_size and patch_size (CLIP, SigLIP, ViT, ...)."
    )


def _depth(given: Any) -> dict[str, Any]:
    """The depth settings, checked as far as can be without knowing the policies."""
    cure = 'give {"policy": name, ...settings}, for example {"policy": "trol_mixer"}.'
    if not isinstance(given, dict) or not isinstance(given.get("policy"), str):
        raise UsageError(f"depth names no policy, got {given!r}; {cure}")
    try:
        json.dumps(given, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise UsageError(
            f"depth cannot be written as JSON ({error}), got {given!r}; {cure}"
        ) from error
    return copy.deepcopy(given)


@dataclass
class TrolModelOutput(BaseModelOutputWithPast):
    """A decoder's outputs, and the projected image features [N·P, D] where images were given."""

    image_hidden_states: torch.Tensor | None = None


@dataclass
class TrolCausalLMOutput(CausalLMOutputWithPast):
    """Loss, logits and cache, and the projected image features [N·P, D] if there were images."""

    image_hidden_states: torch.Tensor | None = None


def check_count(mask: torch.Tensor, features: int, tokens_per_image: int) -> None:
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
    pixel_values: torch.Tensor, mask: torch.Tensor, tokens_per_image: int, times: int
) -> torch.Tensor:
    """Pixels [N, 3, H, W] for rows each repeated `times` times: all images of a row, again.

    Repeating image by image, as transformers does where it has not encoded them before, would
    give two copies of a row with the images a, b the images (a, a) and (b, b).
    """
    rows = pixel_values.split((mask.sum(-1) // tokens_per_image).tolist())
    return torch.cat([row.repeat(times, 1, 1, 1) for row in rows])
