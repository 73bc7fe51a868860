"""TrolModel and TrolForConditionalGeneration: vision tower -> projector -> decoder (-> head).

Shapes: B rows, T tokens, D hidden size of the decoder, V vocabulary; N images in the batch, each
[3, H, W] pixels and P = `config.tokens_per_image` image tokens.
"""

from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling
from transformers.utils.generic import can_return_tuple

from trol.axes import States, TokenIds, TokenMask
from trol.depth import attach, attached, is_attached
from trol.depth.policy import from_settings, to_settings
from trol.depth.roles import IGNORED_LABEL
from trol.errors import DataError, HostError
from trol.family.configuration import TrolCausalLMOutput, TrolConfig, TrolModelOutput, check_count
from trol.family.generation import TrolGenerationMixin, by_row, check_length
from trol.family.memory import skip_parts
from trol.family.published.opening import open_published
from trol.host.names import KNOWN_CACHE_NAMES, cache_among, takes_cache
from trol.policies.mixer import from_nothing


class TrolProjector(nn.Module):
    """Two linear layers with an activation between, then optional learned positions.

    y_t = W_2 · act(W_1 · n(x_t) + b_1) + b_2 + p_t, where t counts the tokens of one image and n
    is a LayerNorm or nothing. Without p a decoder cannot tell where in the image a token lies if
    the tower's features do not say.
    """

    def __init__(self, config: TrolConfig) -> None:
        super().__init__()
        width = round(config.vision_config.hidden_size / config.downsample_ratio**2)
        hidden, positions = config.text_config.hidden_size, config.projector_positions
        inner = config.projector_hidden_size or hidden
        self.norm = nn.LayerNorm(width) if config.projector_norm else None
        self.linear_1 = nn.Linear(width, inner)
        self.act = ACT2FN[config.projector_hidden_act]
        self.linear_2 = nn.Linear(inner, hidden)
        self.positions = nn.Embedding(positions, hidden) if positions else None

    def forward(self, features: Float[Tensor, "N P width"]) -> Float[Tensor, "N P D"]:
        """Features [N, P, width of the tower / downsample_ratio²] -> [N, P, D]."""
        features = features if self.norm is None else self.norm(features)
        projected = self.linear_2(self.act(self.linear_1(features)))
        return projected if self.positions is None else projected + self.positions.weight


def pixel_shuffle(
    features: Float[Tensor, "N rows columns C"], ratio: float
) -> Float[Tensor, "N rows_k columns_k C_kk"]:
    """One feature from each block of k x k neighbours, k = 1 / ratio, side by side.

    [N, rows, columns, C] -> [N, rows / k, columns / k, C · k²]; within a block row by row.
    """
    images, rows, columns, width = features.shape
    block = round(1 / ratio)
    blocks = features.view(images, rows // block, block, columns // block, block, width)
    return blocks.transpose(2, 3).reshape(
        images, rows // block, columns // block, width * block * block
    )


Encoded = dict[str, BaseModelOutputWithPooling]
"""What transformers' generate encodes beforehand: {"image": get_image_features(...)}."""


class TrolPreTrainedModel(PreTrainedModel):
    """What all TroL models declare to transformers; their parts refuse what they cannot do."""

    config_class = TrolConfig
    base_model_prefix = "model"
    input_modalities = ["image", "text"]  # noqa: RUF012 - transformers' own declaration
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = list(KNOWN_CACHE_NAMES)  # noqa: RUF012
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True


class TrolModel(TrolPreTrainedModel):
    """Vision tower, projector and decoder, without a language-modelling head."""

    def __init__(self, config: TrolConfig) -> None:
        super().__init__(config)
        self.vision_tower = AutoModel.from_config(config.vision_config)
        self.projector = TrolProjector(config)
        self.language_model = AutoModel.from_config(config.text_config)
        by_row(self.language_model, config.text_config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        """The decoder's token table."""
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replaces the decoder's token table."""
        self.language_model.set_input_embeddings(value)

    def get_decoder(self) -> nn.Module:
        """The module that owns the decoder's layers; within OPT's, for one, it lies deeper."""
        return self.language_model.get_decoder()

    def get_vision_features(self, pixel_values: Tensor) -> Float[Tensor, "N P width"]:
        """What the projector reads: the tower's patches, class tokens left out, pixel-shuffled.

        `pixel_values` [N, 3, H, W] -> [N, P, width of the tower / downsample_ratio²].
        `DataError` for other shapes; `HostError` where the tower gives too few features.
        """
        if pixel_values.ndim != 4:
            raise DataError(
                f"pixel_values has the shape {list(pixel_values.shape)}; "
                "give [images in the batch, 3, height, width], all rows' images in one list."
            )
        layer, (rows, columns) = self.config.vision_feature_layer, self.config.patch_grid
        outputs = self.vision_tower(
            pixel_values=pixel_values.to(self.vision_tower.dtype),
            output_hidden_states=layer is not None,
            return_dict=True,
        )
        states = outputs.last_hidden_state if layer is None else outputs.hidden_states[layer]
        if states.ndim != 3 or states.shape[1] < rows * columns:
            raise HostError(
                f"the tower {self.config.vision_config.model_type!r} gives features "
                f"{list(states.shape)}, but {rows * columns} patches an image were expected; use "
                "a tower that keeps one feature for each patch."
            )
        patches = states[:, -rows * columns :]  # class and register tokens come first
        if self.config.downsample_ratio == 1:
            return patches
        return pixel_shuffle(
            patches.unflatten(1, (rows, columns)), self.config.downsample_ratio
        ).flatten(1, 2)

    @can_return_tuple
    def get_image_features(
        self, pixel_values: torch.Tensor, **kwargs: Any
    ) -> BaseModelOutputWithPooling:
        """Image tokens: tower -> without class tokens -> pixel shuffle -> projector.

        `pixel_values` [N, 3, H, W] -> `last_hidden_state`, the projector's inputs, and
        `pooler_output` [N, P, D], its outputs. Raises as `get_vision_features`.
        """
        features = self.get_vision_features(pixel_values)
        return BaseModelOutputWithPooling(features, self.projector(features))

    def get_placeholder_mask(
        self, input_ids: TokenIds | None, inputs_embeds: States | None
    ) -> TokenMask:
        """Where image features go [B, T]: the image token's id, or without ids its embedding."""
        if (input_ids is None) == (inputs_embeds is None):
            raise DataError("give either input_ids or inputs_embeds, not both and not neither.")
        if inputs_embeds is None:
            return cast(torch.Tensor, input_ids) == self.config.image_token_id
        token = torch.tensor(self.config.image_token_id, device=inputs_embeds.device)
        if token >= self.get_input_embeddings().num_embeddings:
            return inputs_embeds.new_zeros(inputs_embeds.shape[:2], dtype=torch.bool)
        return (inputs_embeds == self.get_input_embeddings()(token)).all(-1)

    def _embed(self, input_ids: TokenIds) -> States:
        """Ids [B, T] -> [B, T, D]; an image token outside the table is looked up as id 0."""
        table = self.get_input_embeddings()
        if self.config.image_token_id >= table.num_embeddings:
            input_ids = input_ids.masked_fill(self.get_placeholder_mask(input_ids, None), 0)
        return table(input_ids)

    def _with_images(
        self, inputs_embeds: States, mask: TokenMask, encoded: BaseModelOutputWithPooling
    ) -> tuple[States, Float[Tensor, "NP D"]]:
        """Embeddings [B, T, D] with the image features where mask [B, T] is, and those [N·P, D]."""
        assert encoded.pooler_output is not None
        features = encoded.pooler_output.flatten(0, -2)
        features = features.to(inputs_embeds.device, inputs_embeds.dtype)
        check_count(mask, features.shape[0], self.config.tokens_per_image)
        return inputs_embeds.masked_scatter(mask[..., None], features), features

    @takes_cache
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        *,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        mm_encoder_outputs: Encoded | None = None,
        **kwargs: Any,
    ) -> TrolModelOutput:
        """The decoder's last hidden state [B, T, D].

        `input_ids` [B, T] or `inputs_embeds` [B, T, D]; `pixel_values` [N, 3, H, W] for the
        B rows together (or `mm_encoder_outputs`, the same already encoded). Without images the
        tower does not run. `DataError` where placeholders and features differ in number.
        """
        encoded, features = (mm_encoder_outputs or {}).get("image"), None
        if pixel_values is not None:
            encoded = self.get_image_features(pixel_values, return_dict=True)
        mask = self.get_placeholder_mask(input_ids, inputs_embeds)
        if inputs_embeds is None:
            inputs_embeds = self._embed(cast(torch.Tensor, input_ids))
        if encoded is not None:
            inputs_embeds, features = self._with_images(inputs_embeds, mask, encoded)
            if getattr(self.language_model, "reads_image_tokens", False):
                kwargs["image_tokens"] = mask
        elif (cache := cache_among(kwargs)) is None or cache.get_seq_length() == 0:
            # Later calls are not checked: guesses of assisted decoding may hold image tokens.
            check_count(mask, 0, self.config.tokens_per_image)
        check_length(self.config.text_config, inputs_embeds.shape[1])
        outputs = self.language_model(
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            return_dict=True,
            **kwargs,
        )
        fields = {name: outputs.get(name) for name in BaseModelOutputWithPast.__annotations__}
        return TrolModelOutput(**fields, image_hidden_states=features)


class TrolForConditionalGeneration(TrolPreTrainedModel, TrolGenerationMixin):
    """TroL with its head: the model that answers questions about images.

    The depth policy that `config.depth` names is attached to the decoder.
    """

    depth_in_config = True

    def __init__(self, config: TrolConfig) -> None:
        super().__init__(config)
        self.model = TrolModel(config)
        text = config.text_config
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        self._tied_weights_keys = {"lm_head.weight": self._token_table_name()}
        if config.image_token_id < text.vocab_size:
            self.generation_config.suppress_tokens = [config.image_token_id]
        self.post_init()
        self._attach_depth()

    @classmethod
    def from_pretrained(cls, source: Any = None, *args: Any, **kwargs: Any) -> Any:
        """As transformers does; opens the published TroL checkpoints too, by hub name or folder.

        `DataError` for a damaged checkpoint, `HostError` for one that cannot be had. Whatever a
        `quantization_config` says, tower, projector, head and gates are not quantised.
        """
        kwargs = skip_parts(kwargs)
        opened = open_published(cls, source, **kwargs)
        return super().from_pretrained(source, *args, **kwargs) if opened is None else opened

    def _token_table_name(self) -> str:
        table = self.model.get_input_embeddings()
        return next(f"{name}.weight" for name, module in self.named_modules() if module is table)

    def _attach_depth(self) -> None:
        """Gives the decoder the policy that `config.depth` names.

        After post_init, which would draw the policy's parameters anew.
        """
        policy = from_settings(from_nothing(self.config.depth))
        attach(self, policy, probe=False)  # the laws know this family

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """As transformers does, with the policy that is attached now in `config.depth`."""
        policy = attached(self)[1].depth_policy if is_attached(self) else None
        self.config.depth = {"policy": "plain"} if policy is None else to_settings(policy)
        super().save_pretrained(*args, **kwargs)

    def get_image_features(
        self, pixel_values: torch.Tensor, **kwargs: Any
    ) -> BaseModelOutputWithPooling:
        """As `TrolModel.get_image_features`."""
        return self.model.get_image_features(pixel_values, **kwargs)

    @takes_cache
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        *,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        mm_encoder_outputs: Encoded | None = None,
        **kwargs: Any,
    ) -> TrolCausalLMOutput:
        """Logits [B, T, V], and the mean next-token loss where labels [B, T] are given.

        The rest as `TrolModel.forward`; labels of -100 and of image tokens count for nothing;
        `logits_to_keep` K > 0 computes logits for the last K positions only, a tensor for the
        positions it names.
        """
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            mm_encoder_outputs=mm_encoder_outputs,
            return_dict=True,
            **kwargs,
        )
        last = isinstance(logits_to_keep, int)
        positions = slice(-logits_to_keep, None) if last else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, positions])
        loss = None
        if labels is not None:
            vocab_size = self.config.text_config.vocab_size
            # Labels may be a copy of the ids, but image tokens are never to be predicted.
            targets = labels.masked_fill(labels == self.config.image_token_id, IGNORED_LABEL)
            loss = self.loss_function(
                logits=logits, labels=targets, vocab_size=vocab_size, **kwargs
            )
        rest = {name: value for name, value in outputs.items() if name != "last_hidden_state"}
        return TrolCausalLMOutput(loss=loss, logits=logits, **rest)
