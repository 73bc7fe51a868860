"""The suite `load`: opening takes transformers' time, and never the weights' size in memory twice.

A checkpoint in the published layout is opened as it lies, its tensors renamed and cut while they
are read; the limit is what transformers takes to open the same model where it saved it itself. A
host is opened with an adapter put on it; the limit is the host alone. Memory is the most that the
process held of its own while opening (what is mapped from a file does not count), to the bytes of
the weights. The published checkpoint has random weights and is written here.
"""

import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import LlamaForCausalLM

from trol.bench.cases import Case, Row, Runs, figure, measured
from trol.bench.setting import DTYPES, Setting, host, released_kind
from trol.checkpoints.adapter import load as load_adapter
from trol.checkpoints.adapter import save as save_adapter
from trol.depth import attach
from trol.family import TrolConfig, TrolForConditionalGeneration
from trol.family.configuration import PUBLISHED
from trol.family.memory import quantised, trim_memory
from trol.family.published.layouts import sources
from trol.files import write_json
from trol.policies.mixer import TrolMixer

SHARD_BYTES = 2**30


def write_published(folder: Path, config: TrolConfig, dtype: torch.dtype = torch.bfloat16) -> None:
    """Writes random weights of these dimensions in the layout of the released checkpoints."""
    family = "phi3" if config.text_config.model_type == "phi3" else "internlm2"
    rows, columns = config.patch_grid
    names, shard = {}, 0
    torch.manual_seed(0)
    for shard, tensors in enumerate(_shards(sources(family, config, rows * columns + 1), dtype)):
        file = f"model-{shard:05}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        names |= dict.fromkeys(tensors, file)
    index = {"metadata": {}, "weight_map": names}
    write_json(folder / "model.safetensors.index.json", index)
    hidden = config.text_config.hidden_size
    gate = {"weight": 0.02 * torch.randn(1, hidden), "bias": torch.zeros(1)}
    layers = range(config.text_config.num_hidden_layers)
    torch.save({f"{i}.{k}": v for i in layers for k, v in gate.items()}, folder / "trol_gating.pt")
    settings = _phi3(config) if family == "phi3" else _internlm2(config)
    settings["torch_dtype"] = str(dtype).removeprefix("torch.")
    write_json(folder / "config.json", settings)


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
    same = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    same += ("num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "vocab_size")
    return {
        **{name: getattr(text, name) for name in same},
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


class PeakMemory:
    """The most anonymous memory that this process holds beyond what it held before. Unit: bytes.

    It is known on Linux alone; `peak` is 0 elsewhere.
    """

    def __enter__(self) -> "PeakMemory":
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


@dataclass(frozen=True)
class Opening:
    """One opening of a model."""

    open: float
    """Unit: milliseconds."""
    peak: int
    """The most bytes held meanwhile."""


def load(setting: Setting, rounds: int) -> list[Row]:
    """Published layout against transformers' own, and a host with its adapter against the host."""
    with tempfile.TemporaryDirectory() as folder:
        places = {name: Path(folder) / name for name in ("published", "saved", "host", "adapter")}
        _write(places, setting)
        times = measured(_runs(places, setting), rounds)
        rows = []
        for name, plain, limit in (
            ("published", "saved", "transformers' own layout"),
            ("adapter", "host", "the host alone"),
        ):
            run, bare = f"{name} open", f"{plain} open"
            rows.append(Case(run, run, limit, 1, baseline=bare).row(times, setting))
            if peak := max(times[f"{name} peak"]):
                weights = sum(one.stat().st_size for one in places[plain].glob("*.safetensors"))
                case, must = f"{name} peak memory", setting.must(1.1)
                rows.append(figure(case, peak / weights, "bytes of the weights", must))
        return rows


def _runs(places: dict[str, Path], setting: Setting) -> Runs:
    settings: dict[str, Any] = {}
    if setting.dtype == "nf4":
        dtype = DTYPES[setting.dtype]
        settings = {"dtype": dtype, "quantization_config": quantised(4, compute_dtype=dtype)}

    def trol(place: str) -> Any:
        return TrolForConditionalGeneration.from_pretrained(places[place], **settings)

    def llama() -> Any:
        return LlamaForCausalLM.from_pretrained(places["host"], **settings)

    return {
        "saved": lambda: _opened(lambda: trol("saved")),
        "published": lambda: _opened(lambda: trol("published")),
        "host": lambda: _opened(llama),
        "adapter": lambda: _opened(lambda: load_adapter(llama(), places["adapter"])),
    }


def _opened(opens: Callable[[], Any]) -> Opening:
    trim_memory()
    with PeakMemory() as memory:
        began = time.perf_counter()
        opens()
        seconds = time.perf_counter() - began
    return Opening(1000 * seconds, memory.peak)


def _write(places: dict[str, Path], setting: Setting) -> None:
    """Writes the four models that are opened."""
    for place in places.values():
        place.mkdir()
    bare = host(Setting(setting.size, "bf16" if setting.dtype == "nf4" else setting.dtype))
    bare.save_pretrained(places["host"])
    save_adapter(attach(bare, TrolMixer()), places["adapter"])
    del bare
    published = PUBLISHED.get(f"trol-{setting.size.name}")
    with torch.device("meta"):
        config = published() if published else released_kind(setting.size).config
    write_published(places["published"], config, DTYPES[setting.dtype])
    TrolForConditionalGeneration.from_pretrained(places["published"]).save_pretrained(
        places["saved"]
    )
