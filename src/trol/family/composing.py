"""A new TroL model of a published size: its tower and its decoder from checkpoints of their own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from trol.errors import HostError, unknown
from trol.family import TrolConfig, TrolForConditionalGeneration, TrolProcessor
from trol.family.internlm2 import InternLM2Config
from trol.family.loading import config_file
from trol.family.presets import PUBLISHED, word_tokenizer
from trol.family.published.configs import internlm2_rope
from trol.family.published.files import CONFIG, Checkpoint, Stated, read_json
from trol.family.published.layouts import TEXT, VISION, resize_position_table, sources
from trol.family.published.processors import SIGHTS, processor_of, published_processor
from trol.family.published.templates import chat_template

KEYS = ("name", "vision", "text")
RAW = "internlm2"
"""The model type of InternLM2's own checkpoints, which transformers cannot open."""

Weights = dict[str, Tensor]


def composed(
    preset: dict[str, Any], policy: dict[str, Any], words: Sequence[str]
) -> tuple[Any, TrolProcessor]:
    """The model of a published size and its processor, in float32.

    `preset` names the size, a `vision` tower and a `text` decoder (folders or hub names), whose
    own dimensions go before the published ones. What no checkpoint has is drawn: the projector,
    the gates, without `vision` the tower, and without `text` the decoder, whose tokenizer then
    knows these `words`.

    Raises:
        UsageError: no such size, or a key that is none of a preset's.
        HostError: a checkpoint cannot be opened, or is of another kind than the published part.
    """
    for key in preset:
        if key not in KEYS:
            raise unknown("key in recipe.preset", key, KEYS)
    if preset["name"] not in PUBLISHED:
        raise unknown("preset", preset["name"], PUBLISHED)
    config = PUBLISHED[preset["name"]]()
    config.depth = policy
    weights: Weights = {}
    if preset.get("vision"):
        weights |= _tower(config, str(preset["vision"]))
    if preset.get("text"):
        processor = _decoder(config, str(preset["text"]), weights)
    else:
        processor = _processor(config, word_tokenizer(words), template=None)
    model = TrolForConditionalGeneration(TrolConfig(**_settings(config)))
    strange = model.load_state_dict(weights, strict=False).unexpected_keys
    if strange:
        raise HostError(f"the checkpoints of {preset} have weights without a place: {strange}.")
    return model, processor


def _settings(config: TrolConfig) -> dict[str, Any]:
    names = ("vision_config", "text_config", "image_token_id", "downsample_ratio")
    return {name: getattr(config, name) for name in (*names, "projector_norm", "depth")}


def _tower(config: TrolConfig, source: str) -> Weights:
    """The tower's weights at the published resolution; its configuration goes into `config`."""
    published = config.vision_config
    try:
        whole, told = AutoModel.from_pretrained(source, dtype="float32", output_loading_info=True)
    except (OSError, ValueError) as error:
        raise HostError(f"no vision tower can be opened from {source!r}: {error}") from error
    inside = (getattr(whole, name, None) for name in ("vision_tower", "vision_model"))
    tower = next((part for part in inside if part is not None), whole)
    own, published = tower.config, config.vision_config
    _check_kind(source, own, published)
    if told["missing_keys"]:
        raise HostError(
            f"{source} lacks weights of {type(whole).__name__}: "
            f"{sorted(told['missing_keys'])[:3]}, ...; give a checkpoint of the tower itself."
        )
    config.vision_config = type(own)(**{**own.to_dict(), "image_size": published.image_size})
    grid = config.patch_grid[0]
    return {
        f"{VISION}.{name}": resize_position_table(tensor, grid) if _is_table(name) else tensor
        for name, tensor in tower.state_dict().items()
        if not name.endswith("position_ids")
    }


def _check_kind(source: str, found: Any, published: Any) -> None:
    if found.model_type != published.model_type:
        raise HostError(
            f"{source} is a {found.model_type!r}, but this preset has a {published.model_type!r} "
            "there; give a checkpoint of that kind."
        )


def _is_table(name: str) -> bool:
    return name.endswith(("position_embedding.weight", "position_embeddings"))


def _decoder(config: TrolConfig, source: str, weights: Weights) -> TrolProcessor:
    """Puts the decoder's weights in place and its configuration into `config`."""
    try:
        found = config_file(source)
        if read_json(found).get("model_type") == RAW:
            return _internlm2(config, found, source, weights)
        text = AutoModelForCausalLM.from_pretrained(source, dtype="float32")
        tokenizer = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise HostError(f"no text decoder can be opened from {source!r}: {error}") from error
    _check_kind(source, text.config, config.text_config)
    config.text_config = text.config
    for name, tensor in text.state_dict().items():
        inner = name.removeprefix("model.")
        weights[name if name.startswith("lm_head.") else f"{TEXT}.{inner}"] = tensor
    family = SIGHTS[config.text_config.model_type].family
    return _processor(config, tokenizer, chat_template(family))


def _processor(config: TrolConfig, tokenizer: Any, template: str | None) -> TrolProcessor:
    """A TroL processor of this tokenizer, which learns the tokens that stand for a picture."""
    sight = SIGHTS[config.text_config.model_type]
    tokens = [t for t in (sight.image_token, sight.image_prefix, sight.image_suffix) if t]
    tokenizer.add_tokens(tokens, special_tokens=True)
    if len(tokenizer) > config.text_config.vocab_size:
        raise HostError(
            f"the tokenizer has {len(tokenizer)} tokens with those of a picture, but the token "
            f"table has {config.text_config.vocab_size} rows; resize the decoder's table first."
        )
    config.image_token_id = tokenizer.convert_tokens_to_ids(sight.image_token)
    return processor_of(config, tokenizer, template)


def _internlm2(config: TrolConfig, file: Path, source: str, weights: Weights) -> TrolProcessor:
    """InternLM2's own checkpoint: no partial LoRA, and no row for the image token."""
    folder = file.parent if Path(source).is_dir() else Path(snapshot_download(source))
    stated = Stated(read_json(file), str(file))
    dimensions = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    config.text_config = InternLM2Config(
        **{name: stated.need(name) for name in (*dimensions, "num_key_value_heads", "vocab_size")},
        **stated.take("max_position_embeddings", "rms_norm_eps", "pad_token_id"),
        rope_parameters=internlm2_rope(stated),
    )
    config.image_token_id = config.text_config.vocab_size
    weights |= dict(_internlm2_weights(config, Checkpoint(folder)))
    return published_processor(folder, config)


def _internlm2_weights(config: TrolConfig, checkpoint: Checkpoint) -> Iterator[tuple[str, Tensor]]:
    """The published layout's weights, as far as a plain InternLM2 has them."""
    for source in sources(RAW, config, positions=0):
        if not source.name.startswith(("model.", "output.")) or ".lora_" in source.name:
            continue
        tensor = checkpoint.read(source.name.replace(".ffn.weight", ".weight")).float()
        if source.name == "model.tok_embeddings.weight":
            # The image token is read nowhere; its row only has to be there.
            tensor = nn.functional.pad(tensor, (0, 0, 0, config.text_config.image_rows))
        if list(tensor.shape) != source.shape:
            raise HostError(
                f"{checkpoint.folder}: {source.name} has the shape {list(tensor.shape)}, expected "
                f"{source.shape} by its {CONFIG}; download the checkpoint again."
            )
        for target, part in source.targets.items():
            yield target, part(tensor)
