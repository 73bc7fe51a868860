"""The published checkpoints' processors: tokenizer, chat template, and the way of seeing.

The published checkpoints' tokenizers, made of their files alone: no code of theirs is run.

The processor that belongs to a published checkpoint, by the checkpoint's own name.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import LlamaTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import SentencePieceExtractor
from transformers.tokenization_utils_base import generate_merges

from trol.errors import DataError, HostError, unknown
from trol.family.configuration import TrolConfig
from trol.family.processing import (
    IMAGE_TOKEN,
    SquareImageProcessor,
    TiledImageProcessor,
    TrolProcessor,
)
from trol.family.published.files import CURE, added_tokens, read_json
from trol.family.published.files import IMAGE_TOKEN as PHI3_IMAGE_TOKEN
from trol.family.published.opening import HUB_SETTINGS, find_published
from trol.family.published.templates import MARKS, chat_template

CONFIG = "tokenizer_config.json"
PIECES = "tokenizer.model"
COMPLETE = "tokenizer.json"

SPACE = "▁"
"""How sentencepiece writes a space."""

NORMAL, CONTROL, USER_DEFINED = 1, 3, 4
"""Kinds of sentencepiece pieces: made of merges; never met in text; always met as a whole."""
BPE = 2
"""Sentencepiece's number for a model of merges."""


def published_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a published folder, padding on the left and adding nothing to a text.

    Its own beginning of text is not added: the chat template writes it.

    Raises:
        DataError: a file is missing, or is not what the family needs.
        HostError: the folder's tokenizer is of neither family.
    """
    named = str(read_json(folder / CONFIG).get("tokenizer_class"))
    # transformers 4 called the same tokenizer's two forms Llama's with and without "Fast".
    makers = {"InternLM2Tokenizer": _internlm2, "LlamaTokenizer": _llama}
    if named.removesuffix("Fast") not in makers:
        raise HostError(
            f"{folder / CONFIG} names the tokenizer {named!r}, expected one of "
            f"{', '.join(makers)}; give the folder of a published TroL checkpoint."
        )
    return makers[named.removesuffix("Fast")](folder)


def _llama(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of TroL-3.8B, from its whole description or else from its pieces."""
    settings: dict[str, Any] = {"padding_side": "left", "add_bos_token": False}
    if (folder / COMPLETE).is_file():
        _check_complete(folder / COMPLETE)
        # Not as LlamaTokenizer, which would put its own treatment of spaces for the file's.
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, **settings)
    elif (folder / PIECES).is_file():
        _parsed(folder / PIECES)  # transformers would take a damaged one for another kind of file
        tokenizer = LlamaTokenizer.from_pretrained(folder, **settings)
    else:
        raise DataError(f"{folder} has neither {COMPLETE} nor {PIECES}; {CURE}.")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _check_complete(file: Path) -> None:
    """`DataError` where the file is no whole description, of which tokenizers says little."""
    if "model" not in read_json(file):
        raise DataError(f'{file} has no "model", which holds the tokenizer\'s pieces; {CURE}.')


def _internlm2(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of TroL-1.8B and -7B, its ids those of sentencepiece.

    The image token gets the id after the vocabulary. Names that the settings give to pieces are
    not used: the models were spoken to with the pieces' own.
    """
    file = folder / PIECES
    proto = _sentence_pieces(file)
    tokenizer = _byte_pairs(proto)
    marks = (MARKS["internlm2"].before_role, MARKS["internlm2"].end)
    for mark in marks:
        if tokenizer.token_to_id(mark) is None:
            raise DataError(
                f"{file} has no piece {mark!r} among its {len(proto.pieces)}, expected the marks "
                f"of turns {marks}; {CURE}."
            )
    special = [*marks, *(piece.piece for piece in proto.pieces if piece.type == CONTROL)]
    whole = [piece.piece for piece in proto.pieces if piece.type == USER_DEFINED]
    tokenizer.add_tokens([_added(token, special=token in special) for token in [*special, *whole]])
    for token in (*_beyond(folder, tokenizer), IMAGE_TOKEN):
        tokenizer.add_tokens([_added(token, special=token == IMAGE_TOKEN)])
    pieces = proto.trainer_spec
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=pieces.bos_piece,
        eos_token=pieces.eos_piece,
        pad_token=pieces.eos_piece,
        unk_token=pieces.unk_piece,
        extra_special_tokens=[*marks, IMAGE_TOKEN],
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )


def _parsed(file: Path) -> Any:
    """What a sentencepiece file holds; `DataError` if it is none."""
    if not file.is_file():
        raise DataError(f"there is no {file}, which holds the tokenizer's pieces; {CURE}.")
    if file.stat().st_size == 0:
        raise DataError(f"{file} holds 0 bytes, expected a sentencepiece model; {CURE}.")
    try:
        # Both come with the extra that reads sentencepiece files, and are needed nowhere else.
        from google.protobuf.message import DecodeError  # noqa: PLC0415

        return SentencePieceExtractor(str(file)).proto
    except ImportError as missing:
        raise HostError(
            f"{file} is read with sentencepiece and protobuf ({missing}); "
            "pip install 'trol-vlm[published]'."
        ) from missing
    except DecodeError as damaged:
        raise DataError(f"{file} is no sentencepiece model ({damaged}); {CURE}.") from damaged


def _sentence_pieces(file: Path) -> Any:
    """The parsed sentencepiece model; `DataError` if it is none that can be treated exactly."""
    proto = _parsed(file)
    rules = proto.normalizer_spec
    found = {
        "model_type": proto.trainer_spec.model_type,
        "byte_fallback": proto.trainer_spec.byte_fallback,
        "remove_extra_whitespaces": rules.remove_extra_whitespaces,
        "precompiled_charsmap": bool(rules.precompiled_charsmap),
    }
    expected = {
        "model_type": BPE,
        "byte_fallback": True,
        "remove_extra_whitespaces": False,
        "precompiled_charsmap": False,
    }
    if found != expected:
        raise DataError(f"{file} has the settings {found}, expected {expected}; {CURE}.")
    return proto


def _byte_pairs(proto: Any) -> Tokenizer:
    """Sentencepiece's merges and bytes: of all pairs of pieces that make a piece, the best first.

    A prefix space that the model wants (InternLM2's wants none) is put before a text that begins
    with neither a space nor a token of its own, and nowhere else.
    """
    pieces = {piece.piece: number for number, piece in enumerate(proto.pieces)}
    merged = {piece.piece: piece.score for piece in proto.pieces if piece.type == NORMAL}
    tokenizer = Tokenizer(
        models.BPE(
            vocab=pieces,
            merges=generate_merges({piece: pieces[piece] for piece in merged}, merged),
            unk_token=proto.trainer_spec.unk_piece,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.normalizer = normalizers.Replace(" ", SPACE)
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if proto.normalizer_spec.add_dummy_prefix:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, "first", split=False)
        steps.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


def _added(token: str, *, special: bool) -> AddedToken:
    # Pieces write spaces their own way, so they are looked for in texts that do so as well.
    return AddedToken(token, special=special, normalized=not special)


def _beyond(folder: Path, tokenizer: Tokenizer) -> Iterator[str]:
    """Tokens that the settings add after the vocabulary; `DataError` if their ids leave a gap."""
    size = tokenizer.get_vocab_size()
    later = sorted((n, token) for token, n in added_tokens(folder).items() if n >= size)
    for expected, (found, token) in enumerate(later, start=size):
        if found != expected:
            raise DataError(
                f"the settings in {folder} give {token!r} the id {found}, expected {expected}, "
                f"the next after the vocabulary; {CURE}."
            )
        yield token


class Sight(NamedTuple):
    """How the models of one family are shown pictures."""

    family: str
    image_processor: Any
    image_token: str = IMAGE_TOKEN
    image_prefix: str = ""
    image_suffix: str = ""


SIGHTS = {
    "trol_internlm2": Sight("internlm2", SquareImageProcessor),
    "phi3": Sight("phi3", TiledImageProcessor, PHI3_IMAGE_TOKEN, "<img>", "</img>"),
}
"""By the decoder's model type."""


def published_processor(folder: Path, config: TrolConfig) -> TrolProcessor:
    """The processor of a published folder, for the model of this configuration.

    Raises:
        DataError: the tokenizer's files do not fit the configuration, or each other.
        UsageError: the configuration's decoder is of no published family.
    """
    decoder = config.text_config.model_type
    if decoder not in SIGHTS:
        raise unknown("decoder of a published checkpoint", decoder, SIGHTS)
    sight = SIGHTS[decoder]
    tokenizer = published_tokenizer(folder)
    for token in filter(None, (sight.image_token, sight.image_prefix, sight.image_suffix)):
        found = tokenizer.get_vocab().get(token)
        expected = config.image_token_id if token == sight.image_token else "any"
        if found is None or expected not in (found, "any"):
            raise DataError(
                f"the tokenizer in {folder} gives the token {token!r} the id {found}, expected "
                f"{expected}; {CURE}."
            )
    return processor_of(config, tokenizer, chat_template(sight.family))


def processor_of(config: TrolConfig, tokenizer: Any, template: str | None) -> TrolProcessor:
    """The processor of a published family's model with this tokenizer and chat template."""
    sight = SIGHTS[config.text_config.model_type]
    size = config.vision_config.image_size
    height, width = (size, size) if isinstance(size, int) else size
    return TrolProcessor(
        sight.image_processor(size={"height": height, "width": width}),
        tokenizer,
        tokens_per_image=config.tokens_per_image,
        image_token=sight.image_token,
        image_prefix=sight.image_prefix,
        image_suffix=sight.image_suffix,
        chat_template=template,
    )


def open_published_processor(source: str | Path, **settings: Any) -> TrolProcessor | None:
    """What `TrolProcessor.from_pretrained(source)` gives for a published checkpoint, or None.

    Raises:
        DataError: the checkpoint is damaged.
        HostError: it cannot be fetched.
    """
    hub = {name: settings[name] for name in HUB_SETTINGS if name in settings}
    published = find_published(source, **hub)
    return None if published is None else published_processor(published.folder, published.config)
