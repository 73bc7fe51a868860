"""TroL models made of checkpoints of their parts: of any tower and decoder, or a published size."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    ProcessorMixin,
    SiglipImageProcessorPil,
)

# From its own module: before transformers 5.2x the other name wants torchvision.
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from trol.data.images import IMAGE_TOKEN
from trol.errors import HostError, UsageError, unknown
from trol.family.configuration import PUBLISHED, TrolConfig
from trol.family.internlm2 import InternLM2Config
from trol.family.loading import config_file, load_model
from trol.family.modeling import TrolForConditionalGeneration
from trol.family.presets import word_tokenizer
from trol.family.pretrained import located
from trol.family.processing import TrolProcessor
from trol.family.published.configs import ConfigReader, internlm2_rope
from trol.family.published.files import CONFIG, Checkpoint, read_json
from trol.family.published.layouts import TEXT, VISION, resize_position_table, sources
from trol.family.published.processors import (
    IMAGE_SETTINGS,
    chat_template,
    processor_of,
    published_processor,
)
from trol.host.chat_templates import template_of

PARTS = ("vision", "text", "image_size", "downsample_ratio")
"""Keys of a preset that joins any tower to any decoder."""

SIZE = ("name", "vision", "text")
"""Keys of a preset that fills a published size."""

RAW = "internlm2"
"""The model type of InternLM2's own checkpoints, which transformers cannot open."""

AS_TEXT = """\
{%- set flat = namespace(messages=[]) -%}
{%- for message in messages -%}
    {%- set words = namespace(text='') -%}
    {%- if message.content is string -%}
        {%- set words.text = message.content -%}
    {%- else -%}
        {%- for part in message.content -%}
            {%- set words.text = words.text + ('<image>' if part.type == 'image' else part.text) -%}
        {%- endfor -%}
    {%- endif -%}
    {%- set flat.messages = flat.messages + [dict(message, content=words.text)] -%}
{%- endfor -%}
{%- set messages = flat.messages -%}
"""
"""In front of a text decoder's template: makes each message's content a string, pictures in it."""


def composed(
    preset: dict[str, Any], policy: dict[str, Any], words: Sequence[str]
) -> tuple[Any, TrolProcessor]:
    """A model that is made of checkpoints, and its processor, in float32.

    With a `name`, it is a published size; its `vision` tower and `text` decoder (folders, short
    names or hub names) are optional, and their own dimensions replace the published ones. Without,
    it is any tower on any text decoder: pictures are resized to `image_size` pixels (None: the
    tower's own size), and `downsample_ratio` 1/k makes one image token of k x k patches.

    Weights that no checkpoint has are random: projector, gates, the tower without `vision`, and the
    decoder without `text`. The tokenizer of such a decoder knows these `words`.

    Raises:
        UsageError: the size or a key is unknown, a part is not named, or the sizes do not fit.
        HostError: a checkpoint cannot be opened, or is not of the kind that stands there.
    """
    keys = SIZE if "name" in preset else PARTS
    for key in preset:
        if key not in keys:
            raise unknown("key in recipe.preset", key, keys)
    make = _published_size if "name" in preset else _joined
    config, weights, processor = make(preset, policy, words)
    model = TrolForConditionalGeneration(config)
    strange = model.load_state_dict(weights, strict=False).unexpected_keys
    if strange:
        raise HostError(f"the checkpoints of {preset} have weights without a place: {strange}.")
    return model, processor


Composition = tuple[TrolConfig, dict[str, Tensor], TrolProcessor]
"""A model's configuration, the weights that are not random, and its processor."""


def _joined(preset: dict[str, Any], policy: dict[str, Any], _: Sequence[str]) -> Composition:
    """Any tower on any text decoder; the projector has a norm, and a position for each token."""
    for part in ("vision", "text"):
        if not preset.get(part):
            raise UsageError(
                f"recipe.preset has no {part}; give a folder or hub name of a vision tower and of "
                "a text decoder, or the name of a published size."
            )
    source = located(str(preset["vision"]))
    text, tokenizer = load_model(str(preset["text"]), dtype="float32")
    if isinstance(tokenizer, ProcessorMixin):
        raise HostError(
            f"{preset['text']} reads pictures already; name a text decoder, or it as host."
        )
    tokenizer.add_tokens([IMAGE_TOKEN], special_tokens=True)
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tower = _opened_tower(source)
    pixels = _pixels(source, tower.config, preset.get("image_size"))
    config = TrolConfig(
        vision_config=_at_size(tower.config, pixels),
        text_config=text.config,
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        downsample_ratio=preset.get("downsample_ratio", 1.0),
        projector_norm=True,
        depth=policy,
    )
    config.projector_positions = config.tokens_per_image
    processor = TrolProcessor(
        _square_pictures(source, pixels),
        tokenizer,
        tokens_per_image=config.tokens_per_image,
        chat_template=AS_TEXT + template_of(tokenizer),
    )
    return config, _tower_weights(tower, config) | _decoder_weights(text), processor


def _pixels(source: str, config: Any, wanted: Any) -> int:
    """Height and width of the pictures, checked; None is the tower's own."""
    patch, own = (_side(getattr(config, name, None)) for name in ("patch_size", "image_size"))
    if patch is None or own is None:
        raise HostError(
            f"{source} is a {config.model_type!r}, which sees no square pictures in patches; give "
            "a vision tower such as DINOv2, CLIP or SigLIP."
        )
    pixels = own if wanted is None else wanted
    if not isinstance(pixels, int) or pixels < 1 or pixels % patch:
        raise UsageError(
            f"recipe.preset.image_size is {pixels!r}; give a multiple of {patch} pixels, the width "
            f"of a patch of {source}."
        )
    return pixels


def _side(size: Any) -> int | None:
    """The side of a square, which some configurations give twice."""
    lengths = {size} if isinstance(size, int) else set(size or ())
    return lengths.pop() if len(lengths) == 1 else None


def _at_size(config: Any, image_size: Any) -> Any:
    """A tower's configuration for pictures of this size."""
    return type(config)(**{**config.to_dict(), "image_size": image_size})


def _square_pictures(source: str, pixels: int) -> SiglipImageProcessorPil:
    """Resizes pictures to a square and normalises them as the tower's own image processor does."""
    try:
        own = AutoImageProcessor.from_pretrained(source)
        return SiglipImageProcessorPil(
            size={"height": pixels, "width": pixels},
            resample=own.resample,
            image_mean=own.image_mean,
            image_std=own.image_std,
            do_convert_rgb=True,
        )
    except (OSError, ValueError, AttributeError, ImportError) as error:
        raise HostError(
            f"{source} does not say how its pictures are normalised: {error}; put the tower's "
            "preprocessor_config.json beside its weights."
        ) from error


def _published_size(
    preset: dict[str, Any], policy: dict[str, Any], words: Sequence[str]
) -> Composition:
    """A published size, its parts those of checkpoints of the same kind where there are any."""
    if preset["name"] not in PUBLISHED:
        raise unknown("preset", preset["name"], PUBLISHED)
    config = PUBLISHED[preset["name"]]()
    config.depth = policy
    weights: dict[str, Tensor] = {}
    if preset.get("vision"):
        source = located(str(preset["vision"]))
        tower = _opened_tower(source)
        published = config.vision_config
        _check_kind(source, tower.config, published)
        config.vision_config = _at_size(tower.config, published.image_size)
        weights |= _tower_weights(tower, config)
    if preset.get("text"):
        processor = _decoder(config, located(str(preset["text"])), weights)
    else:
        processor = _processor(config, word_tokenizer(words), template=None)
    names = ("vision_config", "text_config", "image_token_id", "downsample_ratio")
    settings = {name: getattr(config, name) for name in (*names, "projector_norm", "depth")}
    return TrolConfig(**settings), weights, processor


def _opened_tower(source: str) -> Any:
    """The vision tower of a folder or hub name, or the one inside the model that lies there."""
    try:
        whole, info = AutoModel.from_pretrained(source, dtype="float32", output_loading_info=True)
    except (OSError, ValueError) as error:
        raise HostError(f"no vision tower can be opened from {source!r}: {error}") from error
    if info["missing_keys"]:
        raise HostError(
            f"{source} lacks weights of {type(whole).__name__}: "
            f"{sorted(info['missing_keys'])[:3]}, ...; give a checkpoint of the tower itself."
        )
    inside = (getattr(whole, name, None) for name in ("vision_tower", "vision_model"))
    return next((part for part in inside if part is not None), whole)


def _tower_weights(tower: Any, config: TrolConfig) -> dict[str, Tensor]:
    """The tower's weights by their names in the model, its position table for the model's grid."""
    grid = config.patch_grid[0]
    tables = ("position_embedding.weight", "position_embeddings")
    return {
        f"{VISION}.{name}": resize_position_table(tensor, grid) if name.endswith(tables) else tensor
        for name, tensor in tower.state_dict().items()
        if not name.endswith("position_ids")
    }


def _decoder_weights(text: Any) -> dict[str, Tensor]:
    """A decoder's weights by their names in the model."""
    head = text.get_output_embeddings()
    if head.bias is not None:
        raise HostError(f"the head of {type(text).__name__} has a bias, which TroL's has not.")
    inner = {f"{TEXT}.{name}": tensor for name, tensor in text.base_model.state_dict().items()}
    return inner | {"lm_head.weight": head.weight}


def _check_kind(source: str, config: Any, published: Any) -> None:
    if config.model_type != published.model_type:
        raise HostError(
            f"{source} is a {config.model_type!r}, but this preset has a {published.model_type!r} "
            "there; give a checkpoint of that kind."
        )


def _decoder(config: TrolConfig, source: str, weights: dict[str, Tensor]) -> TrolProcessor:
    """Puts the decoder's weights in place and its configuration into `config`."""
    try:
        file = config_file(source)
        if read_json(file).get("model_type") == RAW:
            return _internlm2(config, file, source, weights)
        text = AutoModelForCausalLM.from_pretrained(source, dtype="float32")
        tokenizer = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise HostError(f"no text decoder can be opened from {source!r}: {error}") from error
    _check_kind(source, text.config, config.text_config)
    config.text_config = text.config
    weights |= _decoder_weights(text)
    family = IMAGE_SETTINGS[config.text_config.model_type].family
    return _processor(config, tokenizer, chat_template(family))


def _processor(config: TrolConfig, tokenizer: Any, template: str | None) -> TrolProcessor:
    """A TroL processor of this tokenizer, which learns the tokens that stand for a picture."""
    images = IMAGE_SETTINGS[config.text_config.model_type]
    tokenizer.add_tokens(images.tokens, special_tokens=True)
    if len(tokenizer) > config.text_config.vocab_size:
        raise HostError(
            f"the tokenizer has {len(tokenizer)} tokens with those of a picture, but the token "
            f"table has {config.text_config.vocab_size} rows; resize the decoder's table first."
        )
    config.image_token_id = tokenizer.convert_tokens_to_ids(images.image_token)
    return processor_of(TrolProcessor, config, tokenizer, template)


def _internlm2(
    config: TrolConfig, file: Path, source: str, weights: dict[str, Tensor]
) -> TrolProcessor:
    """InternLM2's own checkpoint: no partial LoRA, and no row for the image token."""
    folder = file.parent if Path(source).is_dir() else Path(snapshot_download(source))
    reader = ConfigReader(read_json(file), str(file))
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    config.text_config = InternLM2Config(
        **{name: reader.required(name) for name in (*sizes, "num_key_value_heads", "vocab_size")},
        **reader.optional("max_position_embeddings", "rms_norm_eps", "pad_token_id"),
        rope_parameters=internlm2_rope(reader),
    )
    config.image_token_id = config.text_config.vocab_size
    weights |= dict(_internlm2_weights(config, Checkpoint(folder)))
    return published_processor(TrolProcessor, folder, config)


def _internlm2_weights(config: TrolConfig, checkpoint: Checkpoint) -> Iterator[tuple[str, Tensor]]:
    """The weights that a plain InternLM2 has, by their names in the TroL model."""
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
