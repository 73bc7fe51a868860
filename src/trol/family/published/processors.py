"""What belongs to a published checkpoint's processor: tokenizer, chat template, image processor.

The tokenizers are made of the checkpoint's files alone: no code of theirs is run. TroL-1.8B and -7B
see one square picture, resized as torch does it; TroL-3.8B one to six square tiles, and the whole
picture once more.
"""

from collections.abc import Iterator
from pathlib import Path
from string import Template
from typing import Any, NamedTuple

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from torch.nn import functional
from transformers import (
    GotOcr2ImageProcessorPil,
    LlamaTokenizer,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.convert_slow_tokenizer import SentencePieceExtractor
from transformers.image_processing_backends import PilBackend
from transformers.image_utils import PILImageResampling, SizeDict
from transformers.tokenization_utils_base import generate_merges
from transformers.utils.constants import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
)

from trol.data.images import IMAGE_TOKEN
from trol.errors import DataError, HostError, unknown
from trol.family.configuration import TrolConfig
from trol.family.published.configs import IMAGE_CONTEXT
from trol.family.published.files import CURE, added_tokens, read_json

SETTINGS = "tokenizer_config.json"
PIECES = "tokenizer.model"
COMPLETE = "tokenizer.json"

SPACE = "▁"
"""How sentencepiece writes a space."""

NORMAL, CONTROL, USER_DEFINED = 1, 3, 4
"""Kinds of sentencepiece pieces: made of merges; never met in text; always met as a whole."""
BPE = 2
"""Sentencepiece's number for a model of merges."""


class SquareImageProcessor(PilBackend):
    """Resizes to `size` whatever the aspect ratio, then normalises: (x/255 - mean) / std.

    The resize is torch's bicubic interpolation of the 8-bit pixels, not antialiased: the published
    models were evaluated so, and Pillow's bicubic differs from it wherever a picture shrinks.
    """

    size = {"height": 490, "width": 490}  # noqa: RUF012  # as in every image processor
    resample = PILImageResampling.BICUBIC
    image_mean = OPENAI_CLIP_MEAN
    image_std = OPENAI_CLIP_STD
    do_resize = True
    do_rescale = True
    do_normalize = True
    do_convert_rgb = True

    def resize(self, image: np.ndarray, size: SizeDict, *_: Any, **__: Any) -> np.ndarray:
        """The picture [3, H, W] at the given height and width; `DataError` unless it is 8-bit."""
        if image.dtype != np.uint8:
            raise DataError(
                f"the picture has {image.dtype} values; give 8-bit ones (uint8, 0 to 255), "
                "which is what the model's way of resizing is defined on."
            )
        pixels = torch.from_numpy(np.ascontiguousarray(image))[None]
        target = (int(size["height"]), int(size["width"]))
        resized = functional.interpolate(pixels, size=target, mode="bicubic", align_corners=False)
        return resized[0].numpy()


class TiledImageProcessor(GotOcr2ImageProcessorPil):
    """Cuts a picture into the grid of tiles [3, H, W] nearest its aspect ratio, row by row.

    Of more than one tile a thumbnail comes last. A class of its own, so that a saved processor is
    opened as this one: under the parent's name torchvision's, which resizes differently, would be
    taken wherever torchvision is installed.
    """

    size = {"height": 448, "width": 448}  # noqa: RUF012  # as in every image processor
    image_mean = IMAGENET_DEFAULT_MEAN
    image_std = IMAGENET_DEFAULT_STD
    crop_to_patches = True
    max_patches = 6


class ImageSettings(NamedTuple):
    """How the models of one family are shown pictures."""

    family: str
    image_processor: Any
    image_token: str = IMAGE_TOKEN
    image_prefix: str = ""
    image_suffix: str = ""

    @property
    def tokens(self) -> list[str]:
        """All tokens that stand for a picture."""
        return [t for t in (self.image_token, self.image_prefix, self.image_suffix) if t]


IMAGE_SETTINGS = {
    "trol_internlm2": ImageSettings("internlm2", SquareImageProcessor),
    "phi3": ImageSettings("phi3", TiledImageProcessor, IMAGE_CONTEXT, "<img>", "</img>"),
}
"""By the decoder's model type."""


def published_processor(cls: Any, folder: Path, config: TrolConfig) -> Any:
    """The processor of a published folder, of the class `cls`, for the model of this configuration.

    Raises:
        DataError: the tokenizer's files do not fit the configuration, or each other.
        UsageError: the configuration's decoder is of no published family.
    """
    decoder = config.text_config.model_type
    if decoder not in IMAGE_SETTINGS:
        raise unknown("decoder of a published checkpoint", decoder, IMAGE_SETTINGS)
    images = IMAGE_SETTINGS[decoder]
    tokenizer = published_tokenizer(folder)
    for token in images.tokens:
        number = tokenizer.get_vocab().get(token)
        expected = config.image_token_id if token == images.image_token else "any"
        if number is None or expected not in (number, "any"):
            raise DataError(
                f"the tokenizer in {folder} gives the token {token!r} the id {number}, expected "
                f"{expected}; {CURE}."
            )
    return processor_of(cls, config, tokenizer, chat_template(images.family))


def processor_of(cls: Any, config: TrolConfig, tokenizer: Any, template: str | None) -> Any:
    """A processor, of the class `cls`, for a published family's model."""
    images = IMAGE_SETTINGS[config.text_config.model_type]
    size = config.vision_config.image_size
    height, width = (size, size) if isinstance(size, int) else size
    return cls(
        images.image_processor(size={"height": height, "width": width}),
        tokenizer,
        tokens_per_image=config.tokens_per_image,
        image_token=images.image_token,
        image_prefix=images.image_prefix,
        image_suffix=images.image_suffix,
        chat_template=template,
    )


def published_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a published folder, padding on the left and adding nothing to a text.

    Its own beginning of text is not added: the chat template writes it.

    Raises:
        DataError: a file is missing, or is not what the family needs.
        HostError: the folder's tokenizer is of neither family.
    """
    name = str(read_json(folder / SETTINGS).get("tokenizer_class"))
    # transformers 4 called the same tokenizer's two forms Llama's with and without "Fast".
    makers = {"InternLM2Tokenizer": _internlm2, "LlamaTokenizer": _llama}
    if name.removesuffix("Fast") not in makers:
        raise HostError(
            f"{folder / SETTINGS} names the tokenizer {name!r}, expected one of "
            f"{', '.join(makers)}; give the folder of a published TroL checkpoint."
        )
    return makers[name.removesuffix("Fast")](folder)


def _llama(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of TroL-3.8B, from its whole description or else from its pieces."""
    settings: dict[str, Any] = {"padding_side": "left", "add_bos_token": False}
    if (file := folder / COMPLETE).is_file():
        if "model" not in read_json(file):  # of which tokenizers says little
            raise DataError(f'{file} has no "model", which holds the tokenizer\'s pieces; {CURE}.')
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


def _internlm2(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of TroL-1.8B and -7B, its ids those of sentencepiece.

    The image token gets the id after the vocabulary. Names that the settings give to pieces are
    not used: the models were trained with the pieces' own.
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
    settings = {
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
    if settings != expected:
        raise DataError(f"{file} has the settings {settings}, expected {expected}; {CURE}.")
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
    for expected, (number, token) in enumerate(later, start=size):
        if number != expected:
            raise DataError(
                f"the settings in {folder} give {token!r} the id {number}, expected {expected}, "
                f"the next after the vocabulary; {CURE}."
            )
        yield token


SYSTEM_PROMPT = (
    "You are AI model created by Byung-Kwan Lee, Ph.D. candidate, KAIST EE, of which AI model name "
    "is TroL (Traversal of Layers). You must give helpful, detailed, and polite answers to the "
    "user's questions"
)
"""The system message of the published models for conversations that have none."""


class Marks(NamedTuple):
    """The marks of turns in one family's texts."""

    before_role: str
    after_role: str
    end: str
    """What ends a turn."""
    answer: str
    """What an answer begins after in a decoded text, as the published models were read."""


MARKS = {
    "internlm2": Marks("[UNUSED_TOKEN_146]", "\n", "[UNUSED_TOKEN_145]", "assistant\n"),
    "phi3": Marks("<|", "|>\n", "<|end|>", "<|assistant|>\n"),
}
"""By family."""


_TEMPLATE = Template("""\
{%- macro say(content) -%}
    {%- if content is string -%}
        {{- content -}}
    {%- else -%}
        {%- for part in content -%}
            {%- if part.type == 'text' -%}
                {{- part.text -}}
            {%- else -%}
                {{- '$image' if loop.last else '$image\\n' -}}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
{{- '<s>' -}}
{%- if messages[0].role != 'system' -%}
    {{- "${before}system${after}$prompt$end\\n" -}}
{%- endif -%}
{%- for message in messages -%}
    {{- ('' if loop.first else '\\n') + '$before' + message.role + '$after' -}}
    {%- if message.role == 'assistant' -%}
        {%- generation -%}
            {{- say(message.content) + '$end\\n</s>' -}}
        {%- endgeneration -%}
    {%- else -%}
        {{- say(message.content) + '$end' -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '\\n${before}assistant$after' -}}
{%- endif -%}
""")


def chat_template(family: str) -> str:
    """The chat template of a family: turns joined by line ends, an image on a line of its own.

    Without a system message the conversation opens with `SYSTEM_PROMPT`; what the assistant says
    is marked as generation, its end included.
    """
    if family not in MARKS:
        raise unknown("family", family, MARKS)
    marks = MARKS[family]
    return _TEMPLATE.substitute(
        before=marks.before_role,
        after=marks.after_role.replace("\n", "\\n"),
        end=marks.end,
        prompt=SYSTEM_PROMPT,
        image=IMAGE_TOKEN,
    )
