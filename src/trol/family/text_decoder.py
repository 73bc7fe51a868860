"""Text decoders of any number of layers, made from nothing, and the form that Glavas et al. train.

A conversation is BOS user <SEP> assistant EOS (arXiv 2410.20022, its code).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, PreTrainedTokenizerFast

from trol.data.sources.pair_files import SEPARATOR
from trol.errors import HostError, UsageError

PAD, BOS, EOS = "<pad>", "<bos>", "<eos>"
SPECIAL_TOKENS = (PAD, BOS, EOS, SEPARATOR)
"""The first ids of every byte-level tokenizer, in this order."""

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
"""What the assistant says, its end included, is marked as generation."""

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

    Weights begin at 0.05 in place of Llama's 0.02, which suits hidden sizes of about 100.

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
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=8 * hidden_size // 3,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=positions,
        tie_word_embeddings=True,
        initializer_range=0.05,
        pad_token_id=SPECIAL_TOKENS.index(PAD),
        bos_token_id=SPECIAL_TOKENS.index(BOS),
        eos_token_id=SPECIAL_TOKENS.index(EOS),
    )


def byte_level_tokenizer(texts: Iterable[str], vocabulary: int = 1024) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of at most `vocabulary` tokens, learnt from `texts`.

    It reads any text (no unknown token), pads on the left and has the chat template `SEPARATED`.

    Raises:
        UsageError: the vocabulary does not even hold the bytes and the special tokens.
    """
    least = BYTES + len(SPECIAL_TOKENS)
    if vocabulary < least:
        raise UsageError(f"a vocabulary of {vocabulary} does not hold all bytes; give {least}.")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        sep_token=SEPARATOR,
        chat_template=SEPARATED,
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )


def separate(model: Any, tokenizer: Any) -> None:
    """Gives a text decoder and its tokenizer the form `SEPARATED`, in place.

    A tokenizer without a separator learns `<SEP>`; the embeddings grow where its number is beyond
    them. Where there is no padding token, the end stands for it.

    Raises:
        HostError: this is a processor's, whose template must know pictures; or nothing ends a text.
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
