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
import time
from pathlib import Path
from typing import Any

import torch

import trol
from trol.bench.opening import PeakMemory, write_published
from trol.cli.terminal import run_record
from trol.evaluation.timing import Timing, interleaved, ratio_and_spread, time_generate
from trol.family import TrolForConditionalGeneration
from trol.family.configuration import PUBLISHED
from trol.family.memory import quantised

TEXT_TOKENS, NEW_TOKENS, ROUNDS = 40, 16, 3


def measure(folder: Path, bits: int, device: str) -> dict[str, Any]:
    """Opens the checkpoint and answers one question about one picture."""
    settings: dict[str, Any] = {"dtype": torch.bfloat16, "device_map": device}
    if bits < 16:
        settings["quantization_config"] = quantised(bits, compute_dtype=torch.bfloat16)
    with PeakMemory() as memory:
        start = time.perf_counter()
        model = TrolForConditionalGeneration.from_pretrained(folder, **settings).eval()
        seconds = time.perf_counter() - start
    row = {"bits": bits, "load_s": seconds, "peak_anonymous_gb": memory.peak / 2**30}
    with torch.inference_mode():
        row |= _timed(model, _question(model))
    if device != "cpu":
        row["peak_device_gb"] = torch.cuda.max_memory_allocated() / 2**30
    return row


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
            write_published(Path(folder), PUBLISHED[model]())
            rows += [
                {"model": model, **in_a_process(Path(folder), bits, given.device)}
                for bits in given.bits
            ]
    run = {**run_record(seed=0), "command": shlex.join(["python", *sys.argv])}
    print(json.dumps({"threads": torch.get_num_threads(), "rows": rows, "run": run}, indent=2))


if __name__ == "__main__":
    main()
