"""Opening takes transformers' time, and never the weights' size in memory twice.

A checkpoint in the published layout is opened as it lies, its tensors renamed and cut while they
are read. Its limit is what transformers takes to open the same model where it saved it itself.
And a host is opened with an adapter put on it; its limit is the host alone. Memory is the most that
the process held of its own while opening (what is mapped from a file does not count), to the bytes
of the weights.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaForCausalLM

from trol.depth import attach
from trol.evaluation.bench.checkpoint import PeakMemory, write_published
from trol.evaluation.bench.hosts import host
from trol.evaluation.bench.overhead import released_kind
from trol.evaluation.bench.row import Row, figure_row, row
from trol.evaluation.bench.setting import DTYPES, Setting
from trol.evaluation.timing import interleaved
from trol.family import TrolConfig, TrolForConditionalGeneration
from trol.family.presets import PUBLISHED
from trol.family.published.files import trim_memory
from trol.family.published.quantisation import quantised
from trol.policies.adapter import load as load_adapter
from trol.policies.adapter import save as save_adapter
from trol.policies.mixer import TrolMixer

MUST_HOLD = 1.1
"""The most memory of its own that opening may take, to the bytes of the weights."""

Opened = tuple[float, int]
"""Milliseconds, and the most bytes held meanwhile."""


def load(setting: Setting, rounds: int) -> list[Row]:
    """Published layout against transformers' own, and a host with its adapter against the host."""
    with tempfile.TemporaryDirectory() as folder:
        return _rows(Path(folder), setting, rounds)


def _rows(folder: Path, setting: Setting, rounds: int) -> list[Row]:
    places = {name: folder / name for name in ("published", "saved", "host", "adapter")}
    for place in places.values():
        place.mkdir()
    weights = _write(places, setting)
    settings: dict[str, Any] = {}
    if setting.dtype == "nf4":
        kind = DTYPES[setting.dtype]
        settings = {"dtype": kind, "quantization_config": quantised(4, compute_dtype=kind)}

    def trol(place: str) -> Any:
        return TrolForConditionalGeneration.from_pretrained(places[place], **settings)

    def llama() -> Any:
        return LlamaForCausalLM.from_pretrained(places["host"], **settings)

    runs: dict[str, Callable[[], Opened]] = {
        "saved": lambda: _opened(lambda: trol("saved")),
        "published": lambda: _opened(lambda: trol("published")),
        "host": lambda: _opened(llama),
        "adapter": lambda: _opened(lambda: load_adapter(llama(), places["adapter"])),
    }
    times = interleaved(runs, rounds=rounds)
    pairs = (("published", "saved"), ("adapter", "host"))
    must = setting.must(MUST_HOLD)
    return [made for pair in pairs for made in _pair_rows(times, pair, weights, must)]


def _pair_rows(
    times: dict[str, list[Opened]],
    pair: tuple[str, str],
    weights: dict[str, int],
    must: float | None,
) -> list[Row]:
    name, plain = pair
    own, bare = ([ms for ms, _ in times[which]] for which in pair)
    limit = {"saved": "transformers' own layout", "host": "the host alone"}[plain]
    made = [row(f"{name} open", bare, own, bare, limit=limit, must=None)]
    peak = max(held for _, held in times[name])
    if peak:
        case, share = f"{name} peak memory", peak / weights[plain]
        made.append(figure_row(case, share, limit="bytes of the weights", must=must))
    return made


def _opened(opens: Callable[[], Any]) -> Opened:
    trim_memory()
    with PeakMemory() as memory:
        began = time.perf_counter()
        opens()
        taken = time.perf_counter() - began
    return 1000 * taken, memory.peak


def _write(places: dict[str, Path], setting: Setting) -> dict[str, int]:
    """Writes what is opened; gives the bytes of the weights."""
    kind = DTYPES[setting.dtype]
    bare = host(Setting(setting.size, "bf16" if setting.dtype == "nf4" else setting.dtype))
    bare.save_pretrained(places["host"])
    save_adapter(attach(bare, TrolMixer()), places["adapter"])
    del bare
    write_published(places["published"], _config(setting), kind)
    opened = TrolForConditionalGeneration.from_pretrained(places["published"])
    opened.save_pretrained(places["saved"])
    del opened
    return {
        name: sum(file.stat().st_size for file in places[name].glob("*.safetensors"))
        for name in ("saved", "host")
    }


def _config(setting: Setting) -> TrolConfig:
    if setting.size.name in {name.removeprefix("trol-") for name in PUBLISHED}:
        return PUBLISHED[f"trol-{setting.size.name}"]()
    with torch.device("meta"):
        return released_kind(setting.size).config
