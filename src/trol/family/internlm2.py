"""InternLM2 as in the TroL checkpoints: a Llama whose linear maps treat image tokens differently.

InternLM2's weights fit transformers' Llama once its fused maps are split. What Llama lacks is
partial LoRA, a low-rank update on image tokens only, and embedding rows beyond the vocabulary.
"""

import functools
from typing import Any, cast

import torch
from huggingface_hub.dataclasses import strict
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaModel
from transformers import initialization as init
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaDecoderLayer

from trol.execution.token_wise import of_visiting_tokens
from trol.host.torch_internals import CompileableContextVar

_IMAGE_TOKENS = CompileableContextVar("trol_image_tokens")
"""Which tokens of the running layer are image tokens [B, T]; None where none is."""

_LINEARS = {
    "self_attn": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "mlp": ("gate_proj", "up_proj", "down_proj"),
}


@strict
class InternLM2Config(LlamaConfig):
    """Llama's settings, those of partial LoRA, and how many rows follow the vocabulary."""

    model_type = "trol_internlm2"
    base_model_tp_plan = None  # Llama's plan names linear maps that are wrapped here

    image_lora_rank: int = 256
    """r; 0 for no partial LoRA."""
    image_lora_alpha: int = 256
    """α; the update is scaled by α / r."""
    image_lora_dropout: float = 0.05
    """Share of a token's inputs that the update does not see in training."""
    image_rows: int = 1
    """Embedding rows for tokens that are read but never written: the image token's."""


class PartialLora(nn.Module):
    """y_t = W x_t + m_t · (α / r) · B A x_t, where m_t is 1 at image tokens and 0 elsewhere.

    `base` is W [out, in], `image_down` A [r, in], `image_up` B [out, r]. Where no token of the
    call is an image token, A and B do not run.
    """

    runs_on_images = ("image_down", "image_up")

    def __init__(self, base: nn.Linear, rank: int, alpha: float, dropout: float) -> None:
        super().__init__()
        self.base = base
        self.image_down = nn.Linear(base.in_features, rank, bias=False)
        self.image_up = nn.Linear(rank, base.out_features, bias=False)
        self.image_up.starts_at_zero = True  # pyright: ignore[reportArgumentType]
        self.dropout = nn.Dropout(dropout)
        self.scale = alpha / rank

    def forward(self, state: Float[Tensor, "*B_T in"]) -> Float[Tensor, "*B_T out"]:
        """Shape: [B, T, in] -> [B, T, out]."""
        out, image_tokens = self.base(state), _IMAGE_TOKENS.get()
        if image_tokens is None:
            return out
        update = self.scale * self.image_up(self.image_down(self.dropout(state)))
        mine = of_visiting_tokens(image_tokens)
        return torch.where(mine[..., None], out + update, out)


class InternLM2DecoderLayer(LlamaDecoderLayer):
    """Llama's layer; `image_tokens` [B, T] tells its linear maps which tokens are image tokens."""

    def __init__(self, config: InternLM2Config, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        if config.image_lora_rank:
            settings = (config.image_lora_rank, config.image_lora_alpha, config.image_lora_dropout)
            for part, names in _LINEARS.items():
                owner = getattr(self, part)
                for name in names:
                    setattr(owner, name, PartialLora(getattr(owner, name), *settings))

    # Its signature is Llama's, which says what this transformers calls the cache.
    @functools.wraps(LlamaDecoderLayer.forward)
    def forward(
        self, *args: Any, image_tokens: Bool[Tensor, "B T"] | None = None, **kwargs: Any
    ) -> Float[Tensor, "B T D"]:
        """Shape: [B, T, D], in and out."""
        # Set within the layer, so that it holds too when checkpointing runs the layer once more.
        token = _IMAGE_TOKENS.set(image_tokens)
        try:
            return super().forward(*args, **kwargs)
        finally:
            _IMAGE_TOKENS.reset(token)


class InternLM2Model(LlamaModel):
    """The decoder without a head; `forward` passes `image_tokens` [B, T] on to its layers."""

    config_class = InternLM2Config
    reads_image_tokens = True
    _no_split_modules = ["InternLM2DecoderLayer"]  # noqa: RUF012 - transformers' own declaration
    _can_record_outputs = {  # noqa: RUF012
        "hidden_states": InternLM2DecoderLayer,
        "attentions": LlamaAttention,
    }

    def __init__(self, config: InternLM2Config) -> None:
        super().__init__(config)
        rows = config.vocab_size + config.image_rows
        self.embed_tokens = nn.Embedding(rows, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(
            InternLM2DecoderLayer(config, number) for number in range(config.num_hidden_layers)
        )
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if getattr(module, "starts_at_zero", False):
            init.zeros_(cast(nn.Linear, module).weight)
