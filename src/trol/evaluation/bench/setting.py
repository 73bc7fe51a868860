"""What a suite is measured on: the host's size, its numbers' type, device, threads, rounds."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from trol.errors import UsageError, unknown
from trol.family.presets import PUBLISHED
from trol.family.published.quantisation import BLOCK


@dataclass(frozen=True)
class Size:
    """The dimensions of a random Llama, and the prompts that it reads."""

    name: str
    hidden: int
    layers: int
    deep: int
    """Layers in the suites about skipping and drafting."""
    prompt: int
    """Tokens of a whole prompt."""
    short: int | None
    """Tokens of a short prompt; None where one whole prompt is dear enough."""
    vocabulary: int = 2048
    intermediate: int | None = None
    """None for 8/3 of the hidden size, in whole blocks of 64 (which 4 bits need)."""
    heads: int | None = None
    """None for heads of size 64."""
    kv_heads: int | None = None
    new_tokens: int = 16

    @property
    def width(self) -> int:
        """Of the layers' inner part."""
        return self.intermediate or -(-self.hidden * 8 // (3 * BLOCK)) * BLOCK


def _published(name: str) -> Size:
    text = PUBLISHED[f"trol-{name}"]().text_config
    return Size(
        name,
        hidden=text.hidden_size,
        layers=text.num_hidden_layers,
        deep=text.num_hidden_layers,
        prompt=1300,
        short=None,
        vocabulary=text.vocab_size,
        intermediate=text.intermediate_size,
        heads=text.num_attention_heads,
        kv_heads=text.num_key_value_heads,
    )


TINY = Size("tiny", hidden=64, layers=4, deep=4, prompt=64, short=8, new_tokens=8)
SMALL = Size("small", hidden=512, layers=8, deep=12, prompt=512, short=32)
SIZES = {size.name: size for size in (TINY, SMALL, _published("1.8b"), _published("7b"))}

DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16, "nf4": torch.bfloat16}
"""Name -> the type of the activations; nf4 has weights of 4 bits."""

DEVICES = ("cpu", "cuda")

ON_GPU = (1, 8, 32)
"""Rows of a batch on a GPU."""


@dataclass(frozen=True)
class Setting:
    """Where a suite is measured; the default is what the bounds were promised for."""

    size: Size = SMALL
    dtype: str = "float32"
    device: str = "cpu"
    threads: int = 1
    rounds: int | None = None
    """None for as many as each suite takes by itself."""

    @property
    def name(self) -> str:
        """How it differs from the default, as in "1.8b-bf16"; nothing where it does not."""
        default = Setting()
        parts = [self.size.name] if self.size.name != default.size.name else []
        parts += [self.dtype] if self.dtype != default.dtype else []
        parts += [self.device] if self.device != default.device else []
        parts += [f"{self.threads}threads"] if self.threads != default.threads else []
        return "-".join(parts)

    def must(self, bound: float) -> float | None:
        """`bound` where bounds were promised, at the default; None elsewhere."""
        return None if self.name else bound

    def record(self) -> dict[str, object]:
        """What result files say of it."""
        kinds = {"size": self.size.name, "dtype": self.dtype, "device": self.device}
        return {**kinds, "threads": self.threads}

    def shapes(self, rows: int) -> list[tuple[int, int]]:
        """(rows, tokens) of the prompts: one short, one whole, and `rows` of a quarter of it."""
        whole = self.size.prompt
        if self.device == "cuda":
            return [(batch, whole) for batch in ON_GPU]
        if self.size.short is None:
            return [(1, whole)]
        return list(dict.fromkeys([(1, self.size.short), (1, whole), (rows, whole // 4)]))

    def ids(self, rows: int, tokens: int) -> torch.Tensor:
        """Random token ids, the same each time. Shape: [B, T]."""
        source = torch.Generator().manual_seed(0)
        ids = torch.randint(3, self.size.vocabulary, (rows, tokens), generator=source)
        return ids.to(self.device)

    def check(self) -> None:
        """Raises `UsageError` unless this can be measured on this machine."""
        for kind, name, known in (("dtype", self.dtype, DTYPES), ("device", self.device, DEVICES)):
            if name not in known:
                raise unknown(kind, name, known)
        if self.device == "cuda" and not torch.cuda.is_available():
            raise UsageError("device is 'cuda', but torch finds no GPU here; give 'cpu'.")
        if self.rounds is not None and self.rounds < 2:
            raise UsageError(f"rounds is {self.rounds}, but a spread needs at least 2.")
        if self.threads < 1:
            raise UsageError(f"threads is {self.threads}; give at least 1.")


def size_of(name: str) -> Size:
    """The size of this name; `UsageError` where there is none."""
    if name not in SIZES:
        raise unknown("size", name, SIZES)
    return SIZES[name]


def cores() -> int:
    """The processor cores that this process may use."""
    usable = getattr(os, "sched_getaffinity", None)
    return len(usable(0)) if usable else os.cpu_count() or 1
