"""TrolProcessor: conversations and pictures to token ids and pixels."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import BatchFeature, ProcessorMixin
from transformers.utils.chat_template_utils import render_jinja_template

from trol.data.images import IMAGE_TOKEN, open_image
from trol.errors import DataError, UsageError
from trol.family.published.opening import find_published

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
    """An image processor and a tokenizer; every `<image>` becomes the image tokens of one image.

    An image of n tiles (1, unless the image processor cuts it) becomes `image_prefix`,
    n * `tokens_per_image` times `image_token`, and `image_suffix`.
    """

    marks_answers_itself = True

    def __init__(  # noqa: PLR0917  # from_pretrained reads the settings off the positional parameters
        self,
        image_processor: Any,
        tokenizer: Any,
        tokens_per_image: int,
        image_token: str = IMAGE_TOKEN,
        image_prefix: str = "",
        image_suffix: str = "",
        chat_template: str | dict[str, str] | None = None,
    ) -> None:
        self.tokens_per_image = tokens_per_image
        self.image_token = image_token
        self.image_token_id = _token_id(tokenizer, image_token)
        self.image_prefix = image_prefix
        self.image_suffix = image_suffix
        super().__init__(image_processor, tokenizer, chat_template=chat_template or CHAT_TEMPLATE)

    @classmethod
    def from_pretrained(cls, source: Any, *args: Any, **kwargs: Any) -> Any:
        """As transformers does; opens the published TroL checkpoints' processors too."""
        published = find_published(source, **kwargs)
        if published is None:
            return super().from_pretrained(source, *args, **kwargs)
        return published.open_processor(cls)

    def __call__(self, images: Any = None, text: Any = None, **kwargs: Any) -> BatchFeature:
        """Token ids and attention mask [B, T], and pixels [N, 3, H, W] of all tiles of all images.

        `text` is one text or B texts with one `<image>` per image; `images` is one image, the
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
        # The image token itself marks the places from here on: ProcessorMixin looks for it.
        marked = [one.replace(IMAGE_TOKEN, self.image_token) for one in texts]
        encoded = super().__call__(images=pictures or None, text=marked, **kwargs)
        encoded.pop("num_patches", None)  # counted the tokens; no model takes it
        return encoded

    def apply_chat_template(self, conversation: Any, *args: Any, **kwargs: Any) -> Any:
        """As `ProcessorMixin.apply_chat_template`; `DataError` for an empty user message."""
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

        Read off the texts with one image token per image: the processor's own way marks nothing
        beside images before transformers 5.18, and takes several times as long after.
        """
        single = isinstance(conversation[0], Mapping)
        conversations = [conversation] if single else conversation
        texts_and_spans: Any = render_jinja_template(
            [_without_pixels(getattr(one, "messages", one)) for one in conversations],
            chat_template=self._template(settings.get("chat_template")),
            return_assistant_tokens_mask=True,
            add_generation_prompt=settings.get("add_generation_prompt", False),
            **self.tokenizer.special_tokens_map,
        )
        rows = ids.tolist() if isinstance(ids, torch.Tensor) else ids
        batched = bool(rows) and isinstance(rows[0], list)
        rows = rows if batched else [rows]
        left = self.tokenizer.padding_side == "left"
        masks = [
            _stretched(*self._encoded(text, spans), row, self.image_token_id, left=left)
            for text, spans, row in zip(*texts_and_spans, rows, strict=True)
        ]
        masks = masks if batched else masks[0]
        return torch.tensor(masks) if isinstance(ids, torch.Tensor) else masks

    def _template(self, template: str | None) -> str | None:
        """The template of this name, or this template itself, or the default."""
        if isinstance(self.chat_template, dict):
            return self.chat_template.get(template or "default", template)
        return template or self.chat_template

    def _encoded(self, text: str, spans: list[tuple[int, int]]) -> tuple[list[int], list[int]]:
        """Token ids of a rendered text, one image token per image, and 1 inside the spans."""
        image = self._image(1)
        longer = len(image) - len(IMAGE_TOKEN)
        # The characters move by what the images before them have grown.
        moved = [
            range(*(place + longer * text.count(IMAGE_TOKEN, 0, place) for place in span))
            for span in spans
        ]
        encoded = self.tokenizer(
            text.replace(IMAGE_TOKEN, image), add_special_tokens=False, return_offsets_mapping=True
        )
        starts = [start for start, _ in encoded["offset_mapping"]]
        return encoded["input_ids"], [int(any(s in span for span in moved)) for s in starts]

    def replace_image_token(self, image_inputs: Mapping[str, Any], image_idx: int, **_: Any) -> str:
        """What stands in the text for the image with this number."""
        tiles = image_inputs.get("num_patches")
        return self._image(self.tokens_per_image * (1 if tiles is None else int(tiles[image_idx])))

    def _image(self, tokens: int) -> str:
        return self.image_prefix + self.image_token * tokens + self.image_suffix

    def _texts(self, text: Any) -> list[str]:
        texts = [text] if isinstance(text, str) else text
        if not isinstance(texts, list | tuple) or not texts:
            raise DataError(f"text is {text!r}; give a text, or a list of at least one text.")
        for number, one in enumerate(texts):
            if not isinstance(one, str) or not one.strip():
                raise DataError(f"text {number} is {one!r}: empty; write a question into it.")
            if self.image_token != IMAGE_TOKEN and self.image_token in one:
                raise DataError(
                    f"text {number} has {self.image_token!r} in it, which stands for image "
                    f"features; write {IMAGE_TOKEN!r} where an image goes."
                )
        return list(texts)

    def _pictures(self, images: Any, texts: list[str]) -> list[Any]:
        """All images in reading order, as many as the texts have placeholders."""
        wanted = [text.count(IMAGE_TOKEN) for text in texts]
        rows = [] if images is None else images if isinstance(images, list | tuple) else [images]
        nested = bool(rows) and all(row is None or isinstance(row, list | tuple) for row in rows)
        if nested and len(rows) != len(texts):
            raise DataError(
                f"got images for {len(rows)} texts, expected {len(texts)}; "
                "give one list of images for each text, empty for a text without."
            )
        pictures = [picture for row in rows for picture in row or ()] if nested else list(rows)
        counts = [len(row or ()) for row in rows] if nested else [len(pictures)]
        if counts != (wanted if nested else [sum(wanted)]):
            noun = "image" if sum(counts) == 1 else "images"
            raise DataError(
                f"got {_listed(counts)} {noun}, expected {_listed(wanted)}, one for each "
                f"{IMAGE_TOKEN!r} in the texts; give an image for every placeholder, "
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
    number = tokenizer.convert_tokens_to_ids(token)
    if number is None or number == tokenizer.unk_token_id:
        raise UsageError(
            f"the tokenizer does not know the image token {token!r}; add it with "
            f"tokenizer.add_tokens([{token!r}], special_tokens=True), or name its own image token."
        )
    return number


def _without_pixels(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The messages as far as a template reads them: a part that is no text is an image."""
    return [
        dict(message)
        if isinstance(message.get("content"), str | None)
        else {
            **message,
            "content": [
                dict(part) if part["type"] == "text" else {"type": "image"}
                for part in message["content"]
            ],
        }
        for message in messages
    ]


def _stretched(
    tokens: list[int], masks: list[int], row: list[int], image_token_id: int, *, left: bool
) -> list[int]:
    """The masks of `tokens` for `row`: the same with longer runs of image tokens, and padded."""
    others = [mask for token, mask in zip(tokens, masks, strict=True) if token != image_token_id]
    padding = [0] * (sum(token != image_token_id for token in row) - len(others))
    if len(row) < len(tokens):
        raise DataError(
            f"the conversation was cut from at least {len(tokens)} tokens to {len(row)}, so its "
            "answers cannot be marked; leave truncation and max_length out."
        )
    rest = iter(padding + others if left else others + padding)
    runs = groupby(zip(tokens, masks, strict=True), key=lambda pair: pair[0] == image_token_id)
    images = iter([next(run)[1] for is_image, run in runs if is_image])
    stretched: list[int] = []
    for is_image, run in groupby(row, key=lambda token: token == image_token_id):
        if is_image:
            stretched += [next(images)] * len(list(run))
        else:
            stretched += [next(rest) for _ in run]
    return stretched


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
    """Whether a message's content has any text, or a part that is no text."""
    if isinstance(content, str) or not isinstance(content, Sequence):
        return bool(content and content.strip())
    return any(part.get("type") != "text" or part.get("text", "").strip() for part in content)


def _listed(counts: list[int]) -> str:
    return str(counts[0]) if len(counts) == 1 else f"{sum(counts)} (text by text: {counts})"
