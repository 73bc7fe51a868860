"""Opening takes transformers' time, and never the weights' size in memory twice.

A checkpoint in the published layout is opened as it lies, its tensors renamed and cut while they
are read. Its limit is what transformers takes to open the same model where it saved it itself.
And a host is opened with an adapter put on it; its limit is the host alone. Memory is the most that
the process held of its own while opening (what is mapped from a file does not count), to the bytes
of the weights.

A checkpoint of random weights in the published layout, and what opening one takes.
"""

from __future__ import annotations

import json
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import LlamaForCausalLM

from trol.bench.overhead import released_kind
from trol.bench.setting import DTYPES, Row, Setting, figure_row, host, row
from trol.checkpoints.adapter import load as load_adapter
from trol.checkpoints.adapter import save as save_adapter
from trol.depth import attach
from trol.evaluation.timing import interleaved
from trol.family import TrolConfig, TrolForConditionalGeneration
from trol.family.configuration import PUBLISHED
from trol.family.memory import quantised, trim_memory
from trol.family.published.layouts import sources
from trol.policies.mixer import TrolMixer

SHARD_BYTES = 2**30


def write_published(folder: Path, config: TrolConfig, dtype: torch.dtype = torch.bfloat16) -> None:
    """Writes random weights of these dimensions as the released checkpoints lie."""
    family = "phi3" if config.text_config.model_type == "phi3" else "internlm2"
    rows, columns = config.patch_grid
    names, shard = {}, 0
    torch.manual_seed(0)
    for shard, tensors in enumerate(_shards(sources(family, config, rows * columns + 1), dtype)):
        file = f"model-{shard:05}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        names |= dict.fromkeys(tensors, file)
    index = {"metadata": {}, "weight_map": names}
    _write_json(folder / "model.safetensors.index.json", index)
    hidden = config.text_config.hidden_size
    gate = {"weight": 0.02 * torch.randn(1, hidden), "bias": torch.zeros(1)}
    layers = range(config.text_config.num_hidden_layers)
    torch.save({f"{i}.{k}": v for i in layers for k, v in gate.items()}, folder / "trol_gating.pt")
    stated = _phi3(config) if family == "phi3" else _internlm2(config)
    _write_json(
        folder / "config.json", {**stated, "torch_dtype": str(dtype).removeprefix("torch.")}
    )


def _shards(wanted: Any, dtype: torch.dtype) -> Iterator[dict[str, torch.Tensor]]:
    shard: dict[str, torch.Tensor] = {}
    for source in wanted:
        shard[source.name] = torch.empty(source.shape, dtype=dtype).normal_(std=0.02)
        if len(source.shape) == 1 and source.name.endswith("weight"):
            shard[source.name].fill_(1)
        if sum(tensor.nbytes for tensor in shard.values()) > SHARD_BYTES:
            yield shard
            shard = {}
    if shard:
        yield shard


def _internlm2(config: TrolConfig) -> dict[str, Any]:
    text = config.text_config
    kept = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    more = ("num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "vocab_size")
    return {
        **{name: getattr(text, name) for name in (*kept, *more)},
        "architectures": ["TroLForCausalLM"],
        "model_type": "internlm2",
        "rope_theta": 1e6,
        "rope_scaling": None,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
    }


def _phi3(config: TrolConfig) -> dict[str, Any]:
    vision = config.vision_config.to_dict()
    for name in ("image_size", "patch_size"):
        vision[name] = vision[name][0] if isinstance(vision[name], list | tuple) else vision[name]
    return {
        "architectures": ["TroLForCausalLM"],
        "model_type": "internvl_chat",
        "downsample_ratio": config.downsample_ratio,
        "force_image_size": vision["image_size"],
        "image_token_index": config.image_token_id,
        "llm_config": {**config.text_config.to_dict(), "rope_theta": 1e4, "rope_scaling": None},
        "vision_config": {**vision, "qkv_bias": True, "qk_normalization": False},
        "select_layer": -1,
    }


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")


class PeakMemory:
    """The most anonymous memory of this process above what it had at first. Unit: bytes.

    Only where the system tells it of a process: on Linux. `peak` is 0 elsewhere.
    """

    def __enter__(self) -> PeakMemory:
        self.first, self.peak, self._open = _anonymous(), 0, True
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._open = False
        self._thread.join()

    def _watch(self) -> None:
        while self._open:
            self.peak = max(self.peak, _anonymous() - self.first)
            time.sleep(0.005)


def _anonymous() -> int:
    if sys.platform != "linux":
        return 0
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    line = next(line for line in status.splitlines() if line.startswith("RssAnon"))
    return 1024 * int(line.split()[1])


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
