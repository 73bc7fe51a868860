"""A word-level tokenizer for small closed vocabularies."""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from trol.family.processing import IMAGE_TOKEN

PAD, BOS, EOS, UNKNOWN = "<pad>", "<bos>", "<eos>", "<unk>"
ROLE_TOKENS = ("<system>", "<user>", "<assistant>")
SPECIAL_TOKENS = (PAD, BOS, EOS, UNKNOWN, IMAGE_TOKEN, *ROLE_TOKENS)
"""The first ids of every word tokenizer, in this order."""

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
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNKNOWN,
        extra_special_tokens=[IMAGE_TOKEN, *ROLE_TOKENS],
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )
