"""Loads random models of the published sizes, in full and quantised, and times their answers.

    python benchmarks/published.py --models trol-1.8b > benchmarks/results/published.json

Writes a checkpoint in the published layout, random weights in bfloat16, into a folder (4.9 GB for
trol-1.8b) that is removed at the end. Every measurement runs in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import shlex
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

import trol
from trol.cli.provenance import run_record
from trol.evaluation.timing import Timing, interleaved, ratio_and_spread, time_generate
from trol.family import TrolConfig, TrolForConditionalGeneration
from trol.family.presets import PUBLISHED
from trol.family.published.layouts import sources
from trol.family.published.quantisation import quantised

SHARD_BYTES = 2**30
TEXT_TOKENS, NEW_TOKENS, ROUNDS = 40, 16, 3


def make(folder: Path, model: str) -> None:
    """Writes a random checkpoint of this size in the published layout."""
    config = PUBLISHED[model]()
    family = "phi3" if config.text_config.model_type == "phi3" else "internlm2"
    rows, columns = config.patch_grid
    names, shard = {}, 0
    torch.manual_seed(0)
    for shard, tensors in enumerate(_shards(sources(family, config, rows * columns + 1))):
        file = f"model-{shard:05}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        names |= dict.fromkeys(tensors, file)
    index = {"metadata": {}, "weight_map": names}
    _write(folder / "model.safetensors.index.json", index)
    hidden = config.text_config.hidden_size
    gate = {"weight": 0.02 * torch.randn(1, hidden), "bias": torch.zeros(1)}
    layers = range(config.text_config.num_hidden_layers)
    torch.save({f"{i}.{k}": v for i in layers for k, v in gate.items()}, folder / "trol_gating.pt")
    stated = _phi3(config) if family == "phi3" else _internlm2(config)
    _write(folder / "config.json", {**stated, "torch_dtype": "bfloat16"})


def _shards(wanted: Any) -> Iterator[dict[str, torch.Tensor]]:
    shard: dict[str, torch.Tensor] = {}
    for source in wanted:
        shard[source.name] = torch.empty(source.shape, dtype=torch.bfloat16).normal_(std=0.02)
        if len(source.shape) == 1 and source.name.endswith("weight"):
            shard[source.name].fill_(1)
        if sum(2 * tensor.numel() for tensor in shard.values()) > SHARD_BYTES:
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


def _write(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")


def measure(folder: Path, bits: int, device: str) -> dict[str, Any]:
    """Opens the checkpoint and answers one question about one picture."""
    settings: dict[str, Any] = {"dtype": torch.bfloat16, "device_map": device}
    if bits < 16:
        settings["quantization_config"] = quantised(bits, compute_dtype=torch.bfloat16)
    with PeakMemory() as memory:
        start = time.perf_counter()
        model = TrolForConditionalGeneration.from_pretrained(folder, **settings).eval()
        seconds = time.perf_counter() - start
    row = {"bits": bits, "load_s": seconds, "peak_anonymous_gb": memory.peak}
    with torch.inference_mode():
        row |= _timed(model, _question(model))
    if device != "cpu":
        row["peak_device_gb"] = torch.cuda.max_memory_allocated() / 2**30
    return row


class PeakMemory:
    """The most anonymous memory of this process above what it had at first. Unit: GiB."""

    def __enter__(self) -> PeakMemory:
        self.first, self.peak, self._open = _anonymous(), 0.0, True
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


def _anonymous() -> float:
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    line = next(line for line in status.splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) / 2**20


def _question(model: Any) -> dict[str, torch.Tensor]:
    config = model.config
    size = config.vision_config.image_size
    side = size if isinstance(size, int) else size[0]
    words = torch.randint(3, 1000, (1, TEXT_TOKENS))
    image = torch.full((1, config.tokens_per_image), config.image_token_id)
    ids = torch.cat([words[:, :8], image, words[:, 8:]], dim=1)
    pixels = torch.randn(1, 3, side, side, dtype=torch.bfloat16)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
    return {name: tensor.to(model.device) for name, tensor in inputs.items()}


def _timed(model: Any, inputs: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Seconds of plain and traversed prefill, interleaved, and tokens per second after each."""

    def plain() -> Timing:
        with trol.depth(model, "all"):
            return time_generate(model, inputs, NEW_TOKENS)

    runs = {"plain": plain, "traversed": lambda: time_generate(model, inputs, NEW_TOKENS)}
    times = interleaved(runs, rounds=ROUNDS)
    row: dict[str, Any] = {"prompt_tokens": inputs["input_ids"].shape[1]}
    for name, made in times.items():
        row[f"{name}_prefill_s"] = statistics.median(t.prefill for t in made) / 1000
        row[f"{name}_tokens_per_s"] = 1000 / statistics.median(t.decode for t in made)
    prefills = [[t.prefill for t in times[name]] for name in runs]
    row["prefill_ratio"], row["spread"] = ratio_and_spread(*prefills)
    return row


def in_a_process(folder: Path, bits: int, device: str) -> dict[str, Any]:
    """`measure` in a new process, whose memory nothing else has touched."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(measure, (folder, bits, device))


def main() -> None:
    """Prints one JSON object with a row for each model and number of bits."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", choices=PUBLISHED, default=["trol-1.8b"])
    parser.add_argument("--bits", nargs="+", type=int, default=[16, 4])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--folder", default=None, help="where to put the checkpoint")
    given = parser.parse_args()
    rows = []
    for model in given.models:
        with tempfile.TemporaryDirectory(dir=given.folder) as folder:
            make(Path(folder), model)
            rows += [
                {"model": model, **in_a_process(Path(folder), bits, given.device)}
                for bits in given.bits
            ]
    run = {**run_record(seed=0), "command": shlex.join(["python", *sys.argv])}
    print(json.dumps({"threads": torch.get_num_threads(), "rows": rows, "run": run}, indent=2))


if __name__ == "__main__":
    main()
