"""Trains one random decoder with full, 8-bit and 4-bit weights, and compares losses and memory.

    python benchmarks/quantised_training.py > benchmarks/results/quantised_training.json

By default a Llama of 183M parameters learns names and first lines of documentation from
the standard library, TroL's second step (gates and low-rank updates), in 50 steps of 4. Every run
is a process of its own, so that its peak memory is its own.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import multiprocessing
import resource
import shlex
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from trol.cli.terminal import run_record
from trol.family import word_tokenizer
from trol.family.processing import CHAT_TEMPLATE
from trol.training import resolve, run
from trol.training.opening import opened

MODULES = ("os", "shutil", "json", "re", "random", "math", "statistics", "textwrap", "inspect",
           "itertools", "functools", "collections", "pathlib", "datetime", "socket", "threading",
           "subprocess", "logging", "argparse", "csv", "zipfile", "tarfile", "heapq",
           "bisect")  # fmt: skip


def documented() -> Iterator[tuple[str, str]]:
    """(name, first line of documentation) of what these modules offer."""
    for module in map(importlib.import_module, MODULES):
        for name, value in sorted(vars(module).items()):
            text = inspect.getdoc(value) if callable(value) and name[0] != "_" else None
            if text:
                yield f"what does {module.__name__} . {name} do ?", text.splitlines()[0]


def make(folder: Path, sizes: dict[str, Any]) -> int:
    """Writes the random decoder, its tokenizer and its chats; gives its number of parameters."""
    pairs = list(documented())
    rows = [
        {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]}
        for q, a in pairs
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "chat.jsonl").write_text(text, encoding="utf-8")
    tokenizer = word_tokenizer([text for pair in pairs for text in pair])
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), bos_token_id=1, eos_token_id=2, pad_token_id=0, **sizes
    )
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    return model.num_parameters()


def measure(folder: Path, bits: int, given: argparse.Namespace) -> dict[str, Any]:
    """Losses, seconds per step, megabytes of weights and the peak of this process."""
    rate = f"learning_rate={given.rate}"
    recipe = resolve(
        "any-llm",
        [
            f"host={folder}", f"bits={bits}", f"precision={given.precision}",
            "checkpointing=false", f"stages.step2.data={folder / 'chat.jsonl'}",
            f"stages.step2.steps={given.steps}", "stages.step2.epochs=0",
            f"stages.step2.batch={given.batch}", "stages.step2.accumulate=1",
            f"stages.step2.{rate}", "stages.step2.warmup_steps=5",
        ],
    )  # fmt: skip
    before = _peak()
    found = run(recipe, folder / f"out-{bits}", only=["step2"])
    peak = _peak()
    model, _ = opened(recipe, None)
    losses = found["losses"]["step2"]["losses"]
    tenth = max(1, len(losses) // 10)
    first, last = (sum(part) / tenth for part in (losses[:tenth], losses[-tenth:]))
    return {
        "bits": bits or (16 if given.precision == "bf16" else 32),
        "losses": losses,
        "fell": first - last,
        "seconds_per_step": found["seconds"]["step2"] / given.steps,
        "weights_mb": model.get_memory_footprint() / 2**20,
        "before_mb": before,
        "peak_mb": peak,
    }


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def in_a_process(folder: Path, bits: int, given: argparse.Namespace) -> dict[str, Any]:
    """`measure` in a new process, whose memory nothing else has touched."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(measure, (folder, bits, given))


def main() -> None:
    """Prints one JSON object with a row for each number of bits."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bits", nargs="+", type=int, choices=(0, 4, 8), default=[0, 8, 4])
    parser.add_argument("--layers", type=int, default=14)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="bf16")
    given = parser.parse_args()
    sizes = {
        "hidden_size": given.width,
        "intermediate_size": 11 * given.width // 4,
        "num_hidden_layers": given.layers,
        "num_attention_heads": given.width // 64,
        "num_key_value_heads": given.width // 64,
    }
    with tempfile.TemporaryDirectory() as folder:
        parameters = make(Path(folder), sizes)
        rows = [in_a_process(Path(folder), bits, given) for bits in given.bits]
    for row in rows:
        row["fell_ratio"] = row["fell"] / rows[0]["fell"]
    told = {"parameters": parameters, "steps": given.steps, "batch": given.batch, "rows": rows}
    command = {"command": shlex.join(["python", *sys.argv])}
    print(json.dumps({**told, "run": {**run_record(seed=0), **command}}, indent=2))


if __name__ == "__main__":
    main()
