"""The published checkpoints' processors: tokenizer, chat template, and the way of seeing."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from trol.errors import DataError, unknown
from trol.family.configuration import TrolConfig
from trol.family.processing import IMAGE_TOKEN, TrolProcessor
from trol.family.published.files import CURE
from trol.family.published.stated import IMAGE_TOKEN as PHI3_IMAGE_TOKEN
from trol.family.published.templates import chat_template
from trol.family.published.tokenizers import published_tokenizer
from trol.family.square import SquareImageProcessor
from trol.family.tiled import TiledImageProcessor


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
