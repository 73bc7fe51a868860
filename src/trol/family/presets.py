"""New models: one that trains in minutes, text decoders, and the published sizes.

`tiny` and `word_tokenizer` are for small closed vocabularies. `text_decoder` is a Llama of any
number of layers, whose conversations may have the form BOS user <SEP> assistant EOS of Glavas et
al. (arXiv 2410.20022, its code). `composed` makes a published size of checkpoints of its parts.
"""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    PreTrainedTokenizerFast,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
)

from trol.data.own_files import SEPARATOR
from trol.errors import HostError, UsageError, unknown
from trol.family.configuration import IMAGE_TOKEN, PUBLISHED, TrolConfig
from trol.family.internlm2 import InternLM2Config
from trol.family.loading import config_file
from trol.family.modeling import TrolForConditionalGeneration
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

PAD, BOS, EOS, UNKNOWN = "<pad>", "<bos>", "<eos>", "<unk>"
ROLE_TOKENS = ("<system>", "<user>", "<assistant>")
SPECIAL_TOKENS = (PAD, BOS, EOS, UNKNOWN, IMAGE_TOKEN, *ROLE_TOKENS)
"""The first ids of every word tokenizer, in this order."""

BYTE_LEVEL_TOKENS = (PAD, BOS, EOS, SEPARATOR)
"""The first ids of every byte-level tokenizer, in this order."""

FIRST_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
"""Of both kinds of tokenizers."""

_NO_SPACE_BEFORE = Regex(r" (?=[.,:;!?%)\]}])|(?<=[(\[{]) ")


def word_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """The tokenizer whose words are all words of `texts`, lower-cased, in sorted order.

    A word is what spaces and punctuation marks (each a word of its own) divide; other words are
    `<unk>`. Pads on the left; decodes with no space before a full stop or a comma.
    """
    lower = normalizers.Lowercase()
    split = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation("isolated")]
    )
    words = {
        word for text in texts for word, _ in split.pre_tokenize_str(lower.normalize_str(text))
    }
    entries = [*SPECIAL_TOKENS, *sorted(words.difference(SPECIAL_TOKENS))]
    vocabulary = {word: number for number, word in enumerate(entries)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.normalizer = lower
    tokenizer.pre_tokenizer = split
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.WordPiece(prefix="##", cleanup=False),
            decoders.Fuse(),
            decoders.Replace(_NO_SPACE_BEFORE, ""),
        ]
    )
    extra = [IMAGE_TOKEN, *ROLE_TOKENS]
    return _wrapped(tokenizer, unk_token=UNKNOWN, extra_special_tokens=extra)


def _wrapped(tokenizer: Tokenizer, **settings: Any) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
        **settings,
    )


TINY_IMAGE_PIXELS = 48
TINY_PATCH_PIXELS = 16
TINY_TOKENS = (TINY_IMAGE_PIXELS // TINY_PATCH_PIXELS) ** 2
TINY_HEAD_SIZE = 32
"""Of every attention head; the smallest that serving engines take."""


def tiny(
    vocab_size: int,
    *,
    hidden_size: int = 96,
    layers: int = 4,
    heads: int = 4,
    vision_hidden_size: int = 64,
    vision_layers: int = 2,
    positions: int = 512,
    depth: dict[str, Any] | None = None,
) -> TrolConfig:
    """A TroL of well under a million parameters for word tokenizers and 48 x 48 pictures.

    SigLIP tower (3 x 3 patches, 9 image tokens), projector with learned positions, Llama decoder
    for at most `positions` tokens; its special ids are the word tokenizer's.
    """
    text = _small_llama(vocab_size, hidden_size, layers, heads, positions, head_dim=TINY_HEAD_SIZE)
    vision = SiglipVisionConfig(
        hidden_size=vision_hidden_size,
        intermediate_size=4 * vision_hidden_size,
        num_hidden_layers=vision_layers,
        num_attention_heads=vision_hidden_size // TINY_HEAD_SIZE,
        image_size=TINY_IMAGE_PIXELS,
        patch_size=TINY_PATCH_PIXELS,
        vision_use_head=False,
    )
    return TrolConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=SPECIAL_TOKENS.index(IMAGE_TOKEN),
        projector_positions=TINY_TOKENS,
        depth=depth,
    )


def _small_llama(
    vocab_size: int, hidden_size: int, layers: int, heads: int, positions: int, **settings: Any
) -> LlamaConfig:
    """Weights begin at 0.05 in place of Llama's 0.02, which suits hidden sizes of about 100."""
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=8 * hidden_size // 3,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=positions,
        tie_word_embeddings=True,
        initializer_range=0.05,
        **FIRST_IDS,
        **settings,
    )


def tiny_processor(texts: Iterable[str]) -> TrolProcessor:
    """The processor that goes with `tiny`: 48 x 48 pixels in [-1, 1], and the words of `texts`."""
    return TrolProcessor(
        SiglipImageProcessorPil(size={"height": TINY_IMAGE_PIXELS, "width": TINY_IMAGE_PIXELS}),
        word_tokenizer(texts),
        tokens_per_image=TINY_TOKENS,
    )


BYTES = 256

SEPARATED = """\
{{- bos_token if bos_token else '' -}}
{%- for message in messages -%}
    {%- if message.role == 'assistant' -%}
        {%- generation -%}
            {{- message.content + eos_token -}}
        {%- endgeneration -%}
    {%- else -%}
        {{- message.content + sep_token -}}
    {%- endif -%}
{%- endfor -%}
"""
"""The assistant's messages, their ends included, are marked as generation."""

TEMPLATES = {"separated": SEPARATED}
"""Chat templates that a recipe can give a host, by name."""


def text_decoder(
    tokenizer: PreTrainedTokenizerFast,
    *,
    hidden_size: int = 96,
    layers: int = 12,
    heads: int = 4,
    positions: int = 512,
) -> LlamaConfig:
    """A Llama of `layers` layers for the ids of this tokenizer and `positions` tokens.

    Raises:
        UsageError: a size is below 1, or the heads do not divide the hidden size evenly.
    """
    sizes = {"hidden_size": hidden_size, "layers": layers, "heads": heads, "positions": positions}
    for name, value in sizes.items():
        if value < 1:
            raise UsageError(f"{name} is {value}; give 1 or more.")
    if hidden_size % (2 * heads):
        raise UsageError(
            f"a hidden size of {hidden_size} cannot be divided into {heads} heads of even width; "
            f"give a multiple of {2 * heads}."
        )
    return _small_llama(len(tokenizer), hidden_size, layers, heads, positions)


def byte_level_tokenizer(texts: Iterable[str], vocabulary: int = 1024) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of at most `vocabulary` tokens, learnt from `texts`.

    It reads any text (no unknown token), pads on the left and has the chat template `SEPARATED`.

    Raises:
        UsageError: the vocabulary is too small for the bytes and the special tokens.
    """
    least = BYTES + len(BYTE_LEVEL_TOKENS)
    if vocabulary < least:
        raise UsageError(f"a vocabulary of {vocabulary} does not hold all bytes; give {least}.")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(BYTE_LEVEL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return _wrapped(tokenizer, sep_token=SEPARATOR, chat_template=SEPARATED)


def separate(model: Any, tokenizer: Any) -> None:
    """Gives a text decoder and its tokenizer the form `SEPARATED`, in place.

    A tokenizer without a separator learns `<SEP>`; the embeddings grow where its number is beyond
    them. Without a padding token, the token that ends a text pads.

    Raises:
        HostError: the tokenizer is a processor, which reads pictures; or it has no end token.
    """
    if hasattr(tokenizer, "tokenizer"):
        raise HostError(
            f"chat_template 'separated' knows no pictures, which {type(tokenizer).__name__} reads; "
            "leave chat_template out, so that the host's own is taken."
        )
    if tokenizer.eos_token is None:
        raise HostError(f"{type(tokenizer).__name__} has no token that ends a text; set eos_token.")
    if tokenizer.sep_token is None:
        tokenizer.add_special_tokens({"sep_token": SEPARATOR})
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.chat_template = SEPARATED
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)


RAW = "internlm2"
"""The model type of InternLM2's own checkpoints, which transformers cannot open."""


def composed(
    preset: dict[str, Any], policy: dict[str, Any], words: Sequence[str]
) -> tuple[Any, TrolProcessor]:
    """The model of a published size and its processor, in float32.

    `preset` names the size, a `vision` tower and a `text` decoder (folders, short names or hub
    names), whose
    own dimensions replace the published ones. Weights that no checkpoint has are random: projector,
    gates, the tower without `vision`, and the decoder without `text`. The tokenizer of such a
    decoder knows these `words`.

    Raises:
        UsageError: the size or a key is unknown.
        HostError: a checkpoint cannot be opened, or is of another kind than the published part.
    """
    keys = ("name", "vision", "text")
    for key in preset:
        if key not in keys:
            raise unknown("key in recipe.preset", key, keys)
    if preset["name"] not in PUBLISHED:
        raise unknown("preset", preset["name"], PUBLISHED)
    config = PUBLISHED[preset["name"]]()
    config.depth = policy
    weights: dict[str, Tensor] = {}
    if preset.get("vision"):
        weights |= _tower(config, located(str(preset["vision"])))
    if preset.get("text"):
        processor = _decoder(config, located(str(preset["text"])), weights)
    else:
        processor = _processor(config, word_tokenizer(words), template=None)
    names = ("vision_config", "text_config", "image_token_id", "downsample_ratio")
    settings = {name: getattr(config, name) for name in (*names, "projector_norm", "depth")}
    model = TrolForConditionalGeneration(TrolConfig(**settings))
    strange = model.load_state_dict(weights, strict=False).unexpected_keys
    if strange:
        raise HostError(f"the checkpoints of {preset} have weights without a place: {strange}.")
    return model, processor


def _tower(config: TrolConfig, source: str) -> dict[str, Tensor]:
    """The tower's weights at the published resolution; its configuration goes into `config`."""
    try:
        whole, info = AutoModel.from_pretrained(source, dtype="float32", output_loading_info=True)
    except (OSError, ValueError) as error:
        raise HostError(f"no vision tower can be opened from {source!r}: {error}") from error
    inside = (getattr(whole, name, None) for name in ("vision_tower", "vision_model"))
    tower = next((part for part in inside if part is not None), whole)
    own, published = tower.config, config.vision_config
    _check_kind(source, own, published)
    if info["missing_keys"]:
        raise HostError(
            f"{source} lacks weights of {type(whole).__name__}: "
            f"{sorted(info['missing_keys'])[:3]}, ...; give a checkpoint of the tower itself."
        )
    config.vision_config = type(own)(**{**own.to_dict(), "image_size": published.image_size})
    grid = config.patch_grid[0]
    tables = ("position_embedding.weight", "position_embeddings")
    return {
        f"{VISION}.{name}": resize_position_table(tensor, grid) if name.endswith(tables) else tensor
        for name, tensor in tower.state_dict().items()
        if not name.endswith("position_ids")
    }


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
    for name, tensor in text.state_dict().items():
        inner = name.removeprefix("model.")
        weights[name if name.startswith("lm_head.") else f"{TEXT}.{inner}"] = tensor
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
