"""New models: one that trains in minutes, and text decoders.

`tiny` and `word_tokenizer` are for small closed vocabularies. `text_decoder` is a Llama of any
number of layers, whose conversations may have the form BOS user <SEP> assistant EOS of Glavas et
al. (arXiv 2410.20022, its code).
"""

from collections.abc import Iterable
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    PreTrainedTokenizerFast,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
)

from trol.data.images import IMAGE_TOKEN
from trol.data.own_files import SEPARATOR
from trol.errors import HostError, UsageError
from trol.family.configuration import TrolConfig
from trol.family.processing import TrolProcessor

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
