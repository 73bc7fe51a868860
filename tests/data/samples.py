"""Small rows, pictures and mixtures for the tests of the data sources."""

import io
import json
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from trol.data.conversations import ConversationCollator
from trol.data.mixture import Mixture, open_mixture


def jpeg(colour: str = "red", size: int = 64) -> bytes:
    """The bytes of a noisy JPEG, so that half of them is not enough."""
    noise = Image.effect_noise((size, size), 80).convert("RGB")
    file = io.BytesIO()
    Image.blend(noise, Image.new("RGB", (size, size), colour), 0.5).save(file, "JPEG")
    return file.getvalue()


def said(question: Any, answer: Any = "yes", **more: Any) -> dict[str, Any]:
    """A row in the messages format."""
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": turns, **more}


def shared(question: str, answer: str = "yes", **more: Any) -> dict[str, Any]:
    """A row in the ShareGPT format."""
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"conversations": turns, **more}


def lines(path: Path, rows: list[Any]) -> Path:
    """Rows as JSON lines; a string is a line as it stands."""
    texts = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")
    return path


def mixture_file(folder: Path, sources: dict[str, Any], **more: Any) -> Path:
    path = folder / "mixture.yaml"
    path.write_text(yaml.safe_dump({"sources": sources, **more}, sort_keys=False), encoding="utf-8")
    return path


def opened(folder: Path, sources: dict[str, Any], **more: Any) -> Mixture:
    return open_mixture(mixture_file(folder, sources), cache=folder / "cache", **more)


def texts(messages: list[dict[str, Any]]) -> list[str]:
    """All texts of a conversation; `<image>` for a picture."""
    parts = [part for message in messages for part in message["content"]]
    return [part["text"] if part["type"] == "text" else "<image>" for part in parts]


def asked(mixture: Mixture) -> list[str]:
    """The last question of each conversation."""
    return [texts(mixture[number])[-2] for number in range(len(mixture))]


def talk(*texts: str, system: str | None = None) -> list[dict[str, Any]]:
    """A conversation of user and assistant in turn."""
    turns = [("system", system)] if system else []
    turns += [(("user", "assistant")[n % 2], text) for n, text in enumerate(texts)]
    return [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in turns]


def encoded(processor: Any, messages: Any, **settings: Any) -> tuple[list[int], list[int]]:
    """Token ids and labels of one conversation."""
    batch = ConversationCollator(processor, **settings)([messages])
    return batch["input_ids"][0].tolist(), batch["labels"][0].tolist()
