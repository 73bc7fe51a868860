"""TrolProcessor: conversations and pictures to token ids and pixels."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import BatchFeature, ProcessorMixin

from trol.data.images import open_image
from trol.errors import DataError, UsageError

IMAGE_TOKEN = "<image>"
"""Stands for one image in the text, and for one image feature in the token ids."""

CHAT_TEMPLATE = """\
{%- macro say(content) -%}
    {%- if content is string -%}
        {{- content -}}
    {%- else -%}
        {%- for part in content -%}
            {{- '<image>' if part.type == 'image' else part.text -}}
        {%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
{{- bos_token -}}
{%- for message in messages -%}
    {{- '<' + message.role + '>' -}}
    {%- if message.role == 'assistant' -%}
        {%- generation -%}
            {{- say(message.content) + eos_token -}}
        {%- endgeneration -%}
    {%- else -%}
        {{- say(message.content) -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<assistant>' -}}
{%- endif -%}
"""
"""Roles as tokens; what the assistant says, its end included, is marked as generation."""


class TrolProcessor(ProcessorMixin):
    """An image processor and a tokenizer; every image becomes `tokens_per_image` image tokens."""

    marks_answers_itself = True

    def __init__(
        self,
        image_processor: Any,
        tokenizer: Any,
        tokens_per_image: int,
        image_token: str = IMAGE_TOKEN,
        chat_template: str | dict[str, str] | None = None,
    ) -> None:
        # from_pretrained reads the settings off the positional parameters: none is keyword-only.
        self.tokens_per_image = tokens_per_image
        self.image_token = image_token
        self.image_token_id = _token_id(tokenizer, image_token)
        super().__init__(image_processor, tokenizer, chat_template=chat_template or CHAT_TEMPLATE)

    def __call__(self, images: Any = None, text: Any = None, **kwargs: Any) -> BatchFeature:
        """Token ids and attention mask [B, T], and pixels [N, 3, H, W] where there are images.

        `text` is one text or B texts with one placeholder per image; `images` is one image, the
        images of all texts in reading order, or a list of images per text; each a PIL image,
        array, path or address. Several texts are padded unless `padding` says otherwise.
        `DataError` for an empty text, an image that cannot be read, or counts that differ.
        """
        for kind in ("videos", "audio"):
            if kwargs.get(kind) is not None:
                raise DataError(f"got {kind}, but TroL reads texts and pictures; leave {kind} out.")
        texts = self._texts(text)
        pictures = self._pictures(images, texts)
        if len(texts) > 1 and "padding" not in kwargs.get("text_kwargs", {}):
            kwargs.setdefault("padding", True)
        return super().__call__(images=pictures or None, text=texts, **kwargs)

    def apply_chat_template(self, conversation: Any, *args: Any, **kwargs: Any) -> Any:
        """As `ProcessorMixin.apply_chat_template`; `DataError` for a user who says nothing."""
        for message in _messages(conversation):
            if message.get("role") == "user" and not _says_something(message.get("content")):
                raise DataError(
                    f"the user message {dict(message)!r} is empty; "
                    "write a question, or take the message out."
                )
        wants_masks = kwargs.pop("return_assistant_tokens_mask", False)
        encoded: Any = super().apply_chat_template(conversation, *args, **kwargs)
        if wants_masks:
            encoded["assistant_masks"] = self._answers(conversation, encoded["input_ids"], kwargs)
        return encoded

    def _answers(self, conversation: Any, ids: Any, settings: dict[str, Any]) -> Any:
        """1 where the assistant speaks, in the form of `ids`: [T], or [B, T] padded as they are.

        Asked of the tokenizer, with the images already expanded: the processor's own way marks
        nothing beside images before transformers 5.18, and takes several times as long after.
        """
        single = isinstance(conversation[0], Mapping)
        conversations = [conversation] if single else conversation
        told = self.tokenizer.apply_chat_template(
            [self._expanded(getattr(one, "messages", one)) for one in conversations],
            chat_template=settings.get("chat_template") or self.chat_template,
            add_generation_prompt=settings.get("add_generation_prompt", False),
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )["assistant_masks"]
        rows = ids.tolist() if isinstance(ids, torch.Tensor) else ids
        batched = bool(rows) and isinstance(rows[0], list)
        left = self.tokenizer.padding_side == "left"
        padded = []
        for row, masks in zip(rows if batched else [rows], told, strict=True):
            rest = [0] * (len(row) - len(masks))
            padded.append(rest + masks if left else masks + rest)
        padded = padded if batched else padded[0]
        return torch.tensor(padded) if isinstance(ids, torch.Tensor) else padded

    def _expanded(self, messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """The messages with texts for contents, each image as its image tokens."""
        image = self.image_token * self.tokens_per_image
        return [
            {
                **message,
                "content": message["content"].replace(self.image_token, image)
                if isinstance(message["content"], str)
                else "".join(
                    image if part["type"] == "image" else part["text"]
                    for part in message["content"]
                ),
            }
            for message in messages
        ]

    def replace_image_token(self, image_inputs: dict[str, Any], image_idx: int, **_: Any) -> str:
        """What stands in the text for the image with this number."""
        return self.image_token * self.tokens_per_image

    def _texts(self, text: Any) -> list[str]:
        texts = [text] if isinstance(text, str) else text
        if not isinstance(texts, list | tuple) or not texts:
            raise DataError(f"text is {text!r}; give a text, or a list of at least one text.")
        for number, one in enumerate(texts):
            if not isinstance(one, str) or not one.strip():
                raise DataError(f"text {number} is {one!r}: empty; write a question into it.")
        return list(texts)

    def _pictures(self, images: Any, texts: list[str]) -> list[Any]:
        """All images in reading order, as many as the texts have placeholders."""
        wanted = [text.count(self.image_token) for text in texts]
        rows = [] if images is None else images if isinstance(images, list | tuple) else [images]
        nested = bool(rows) and all(row is None or isinstance(row, list | tuple) for row in rows)
        pictures = [picture for row in rows for picture in row or ()] if nested else list(rows)
        if nested and len(rows) != len(texts):
            raise DataError(
                f"got images for {len(rows)} texts, expected {len(texts)}; "
                "give one list of images for each text, empty for a text without."
            )
        given = [len(row or ()) for row in rows] if nested else [len(pictures)]
        if given != wanted if nested else len(pictures) != sum(wanted):
            raise DataError(
                f"got {_listed(given)} images, expected {_listed(wanted)}, one for each "
                f"{self.image_token!r} in the texts; give an image for every placeholder, "
                "and a placeholder for every image."
            )
        return [self._opened(picture) for picture in pictures]

    def _opened(self, picture: Any) -> Any:
        if isinstance(picture, str) and picture.startswith(("http://", "https://", "data:")):
            try:
                picture = self.image_processor.fetch_images(picture)
            except (OSError, ValueError) as error:
                raise DataError(
                    f"no image could be read from {picture[:80]!r} ({error}); check the address."
                ) from error
        return open_image(picture) if isinstance(picture, str | Path | Image.Image) else picture


def _token_id(tokenizer: Any, token: str) -> int:
    """The id of the image token; `UsageError` for a tokenizer that lacks it."""
    found = tokenizer.convert_tokens_to_ids(token)
    if found is None or found == tokenizer.unk_token_id:
        raise UsageError(
            f"the tokenizer does not know the image token {token!r}; add it with "
            f"tokenizer.add_tokens([{token!r}], special_tokens=True), or name its own image token."
        )
    return found


def _messages(conversation: Any) -> Iterator[Mapping[str, Any]]:
    """The messages of one conversation, or of a batch of conversations."""
    if not isinstance(conversation, list | tuple) or not conversation:
        raise DataError(
            f"the conversation is {conversation!r}; give a list of at least one message: "
            '[{"role": "user", "content": [{"type": "text", "text": "..."}]}].'
        )
    for item in conversation:
        if isinstance(item, Mapping):
            yield item
        else:
            yield from _messages(getattr(item, "messages", item))


def _says_something(content: Any) -> bool:
    """Whether a message's content has any text or anything else than text."""
    if isinstance(content, str) or not isinstance(content, Sequence):
        return bool(content and content.strip())
    return any(part.get("type") != "text" or part.get("text", "").strip() for part in content)


def _listed(counts: list[int]) -> str:
    return str(counts[0]) if len(counts) == 1 else f"{sum(counts)} (text by text: {counts})"
