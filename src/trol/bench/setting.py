"""What a suite is measured on: the host's size, its numbers' type, device, threads, rounds.

The random decoders that suites measure, built only where they fit.

The rows that suites give: what was measured, beside the limit that it is held against.

The limit: what the host itself takes for the layer visits that are really made.

    fixed(n)  = time of the host with no layer left (embedding, norm, head) for n tokens or rows
    layer(n)  = (host(n) - fixed(n)) / layers
    limit     = fixed(N) + sum over all visits of layer(how many tokens or rows make the visit)

All of it is measured in the same rounds as what is held against it, and taken round by round.
"""

from __future__ import annotations

import copy
import os
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from trol.errors import UsageError, unknown
from trol.evaluation.timing import Timing, ratio_and_spread
from trol.family.configuration import PUBLISHED
from trol.family.memory import BLOCK, check_fits, quantised


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


CURE = "take --size small, a narrower --dtype, or a device with more"


def host(setting: Setting, *, layers: int | None = None, training: bool = False) -> Any:
    """A random Llama, sdpa, in evaluation mode; the same weights on every call.

    Raises:
        HostError: it does not fit the memory at hand; nothing was built then.
    """
    config = _config(setting.size, layers or setting.size.layers)
    what = f"a host of size {setting.size.name!r} in {setting.dtype}"
    check_fits(what, needed_bytes(setting, config, training=training), setting.device, CURE)
    torch.manual_seed(0)
    with torch.device(setting.device):
        made = AutoModelForCausalLM.from_config(
            config, dtype=DTYPES[setting.dtype], attn_implementation="sdpa"
        )
    if setting.dtype == "nf4":
        made = LlamaForCausalLM.from_pretrained(
            None,
            config=config,
            state_dict=made.state_dict(),
            dtype=DTYPES[setting.dtype],
            device_map=setting.device,
            quantization_config=quantised(4, DTYPES[setting.dtype]),
        )
    return made.eval()


def needed_bytes(setting: Setting, config: Any, *, training: bool = False) -> int:
    """At least what the weights, and in training their gradients, take while they are made.

    Four bits are made of the same weights in bfloat16, so these must fit as well.
    """
    with torch.device("meta"):
        weights = sum(p.numel() for p in LlamaForCausalLM(config).parameters())
    width = DTYPES[setting.dtype].itemsize + (0.5 if setting.dtype == "nf4" else 0)
    return int(weights * width) * (2 if training else 1)


def twin(model: Any) -> Any:
    """A copy of a model that shares its weights."""
    shared = chain(model.parameters(), model.buffers())
    return copy.deepcopy(model, {id(tensor): tensor for tensor in shared})


def _config(size: Size, layers: int) -> LlamaConfig:
    heads = size.heads or size.hidden // 64
    return LlamaConfig(
        hidden_size=size.hidden,
        intermediate_size=size.width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=size.kv_heads or heads,
        vocab_size=size.vocabulary,
        max_position_embeddings=4096,
        bos_token_id=1,
        eos_token_id=2,
    )


Row = dict[str, Any]
"""`{"case", "baseline_ms", "measured_ms", "limit_ms", "ratio", "spread", "must", "limit",
"noisy"}`: medians in milliseconds; ratio = measured / limit, the median over rounds, spread half
its interquartile range; `must` is the most that the ratio may be, None where nothing is promised;
`limit` says in words what the limit is."""

NOISE = 0.05
"""A spread above this share of the ratio makes a row noisy."""


def row(
    case: str,
    baseline_ms: list[float],
    measured_ms: list[float],
    limits_ms: list[float],
    *,
    limit: str,
    must: float | None,
) -> Row:
    """A row of times, one for each round."""
    ratio, spread = ratio_and_spread(limits_ms, measured_ms)
    return {
        "case": case,
        "baseline_ms": statistics.median(baseline_ms),
        "measured_ms": statistics.median(measured_ms),
        "limit_ms": statistics.median(limits_ms),
        "ratio": ratio,
        "spread": spread,
        "must": must,
        "limit": limit,
        "noisy": spread > NOISE * abs(ratio),
    }


def figure_row(case: str, ratio: float, *, limit: str, must: float | None) -> Row:
    """A row of something that is no time."""
    times: Row = dict.fromkeys(("baseline_ms", "measured_ms", "limit_ms"))
    told = {"ratio": ratio, "spread": 0.0, "must": must, "limit": limit, "noisy": False}
    return {"case": case, **times, **told}


def memory_row(case: str, bare: list[Timing], measured: list[Timing]) -> Row | None:
    """The most memory held on a GPU, to the bare host's; None without a GPU."""
    peaks = [max(t.peak_bytes or 0 for t in times) for times in (bare, measured)]
    if not all(peaks):
        return None
    told = figure_row(case, peaks[1] / peaks[0], limit="the bare host's peak", must=None)
    return {**told, "baseline_bytes": peaks[0], "measured_bytes": peaks[1]}


def phase_of(times: list[Timing], phase: str) -> list[float]:
    """The milliseconds of `prefill` or `decode`, round by round."""
    return [getattr(one, phase) for one in times]


@dataclass(frozen=True)
class HostTimes:
    """The bare host's milliseconds at one number of tokens or rows, round by round."""

    whole: list[float]
    """With all its layers."""
    fixed: list[float]
    """With none of them."""
    layers: int

    def layer(self) -> list[float]:
        """What one layer takes; nothing at least, whatever hiccup the round had."""
        pairs = zip(self.whole, self.fixed, strict=True)
        return [max(whole - fixed, 0.0) / self.layers for whole, fixed in pairs]


def limit_of(times: Mapping[int, HostTimes], at: int, visits: Mapping[int, float]) -> list[float]:
    """The limit, round by round.

    Args:
        times: number of tokens or rows -> the host's times there.
        at: the number at which the fixed part is paid.
        visits: number of tokens or rows -> how many layer visits so many of them make.
    """
    limits = list(times[at].fixed)
    for number, count in visits.items():
        if number and count:
            layer = times[number].layer()
            limits = [limit + count * one for limit, one in zip(limits, layer, strict=True)]
    return limits


def scaled(times: list[float], by: float) -> list[float]:
    """`by` times each."""
    return [by * one for one in times]
