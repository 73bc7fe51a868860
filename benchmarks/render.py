"""Writes benchmarks/RESULTS.md from the files in benchmarks/results.

python benchmarks/render.py
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
INTRO = """# Benchmark results

Written by `python benchmarks/render.py` from `benchmarks/results/*.json`; each section names the
command that measured it. Ratios are medians of the rounds' ratios, rounds interleaved in one
process; the spread is half their interquartile range. No GPU was at hand: a CPU ran all of it."""

SUITES = {
    "overhead": """A Llama of hidden size 512 and 8 layers, float32, sdpa, one thread. The
`published` rows are a model of the released kind (partial LoRA, one gate, 256 image tokens in a
prompt of 300); their bounds are what the official code takes of its own single pass. Rows without
times are shares that must be 1.""",
    "train": """One loss and its gradients with a second visit for all tokens, to the same
without, on the same Llama.""",
    "skip": """A Llama of hidden size 512 and 12 layers, of which a plan keeps six. The ratio is to
half of the host's time and half of the time without any layers (for `answer`, where tokens of the
answer alone skip: of the time in which they leave keys and values in every layer, no more).""",
}

FIGURES = ("rougeL", "loss", "visits")


def main() -> None:
    """Reads every result that is there and writes the page."""
    parts = [INTRO]
    for title, render in SECTIONS.items():
        file = HERE / "results" / f"{title}.json"
        found = json.loads(file.read_text(encoding="utf-8"))
        run = found["run"]
        packages = ", ".join(
            f"{name} {run['versions'][name]}" for name in ("torch", "transformers")
        )
        origin = f"{run['machine']}, {packages}, commit {run['commit']}."
        origin += f" {found['note']}" if "note" in found else ""
        parts.append(f"## {title}\n\n    {run['command']}\n\n{origin}\n\n{render(title, found)}")
    (HERE / "RESULTS.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def _suite(name: str, found: dict[str, Any]) -> str:
    rows = [
        [
            row["case"],
            _number(row["baseline_ms"]),
            _number(row["measured_ms"]),
            f"{row['ratio']:.3f}",
            f"± {row['spread']:.3f}",
            f"{row['must']:.2f}",
        ]
        for row in found["rows"]
    ]
    heads = ["case", "bare ms", "measured ms", "ratio", "spread", "must be at most"]
    return f"{SUITES[name]}\n\n{_table(heads, rows)}"


def _published(_: str, found: dict[str, Any]) -> str:
    rows = [
        [
            row["model"],
            row["bits"],
            f"{row['load_s']:.1f}",
            f"{row['peak_anonymous_gb']:.2f}",
            f"{row['plain_prefill_s']:.1f}",
            f"{row['prefill_ratio']:.2f} ± {row['spread']:.2f}",
            f"{row['traversed_tokens_per_s']:.1f}",
        ]
        for row in found["rows"]
    ]
    heads = [
        "model",
        "bits",
        "load s",
        "peak GiB",
        "plain prefill s",
        "traversed / plain",
        "tokens/s",
    ]
    told = f"""Random weights of the released dimensions in the published layout, opened as they
lie, {found["threads"]} threads. Peak: anonymous memory while loading, above what the process had
before (16 bits are mapped from the file and read when they are used). Prompt: one picture and 40
words, {found["rows"][0]["prompt_tokens"]} tokens; tokens/s: decoding after it, one visit each."""
    return f"{told}\n\n{_table(heads, rows)}"


def _quantised(_: str, found: dict[str, Any]) -> str:
    rows = [
        [
            row["bits"],
            f"{row['fell']:.3f}",
            f"{row['fell_ratio']:.3f}",
            f"{row['weights_mb']:.0f}",
            f"{row['peak_mb']:.0f}",
        ]
        for row in found["rows"]
    ]
    heads = ["bits", "loss fell by", "to 16 bits", "weights MB", "peak MB"]
    told = f"""TroL's second step on a random Llama of {found["parameters"] / 1e6:.0f} M parameters,
{found["steps"]} steps of {found["batch"]} rows. The quantised kernels take more memory on a CPU
than the smaller weights save at this size."""
    return f"{told}\n\n{_table(heads, rows)}"


def _speculation(_: str, found: dict[str, Any]) -> str:
    rows = []
    for row in found["rows"]:
        for name in ("batch 1", "batch 8"):
            speed = row[name]
            rows.append(
                [
                    row["model"],
                    f"`{row['plan']}`, {row['tokens']} tokens",
                    name.removeprefix("batch "),
                    f"{speed['acceptance']:.2f}",
                    f"{speed['tokens_per_round']:.2f}",
                    f"{speed['tokens_per_second']['plain']:.0f}",
                    f"{speed['tokens_per_second']['speculative']:.0f}",
                    f"{speed['ratio']:.2f} ± {speed['spread']:.2f}",
                    "yes" if speed["identical"] else "NO",
                ]
            )
    heads = ["model", "draft", "batch", "accepted", "tokens a round", "plain tokens/s"]
    heads += ["drafted tokens/s", "speed-up", "identical"]
    told = """The draft that `trol plan --method draft` finds on 32 validation questions, measured
on 200 test questions about docstrings: decoders of 12 layers and hidden size 64, one thread."""
    gains = ", ".join(
        f"{one['ratio']:.2f} ± {one['spread']:.2f} with {one['tokens']}" for one in found["ceiling"]
    )
    ceiling = f"""Where drafts of a quarter of the layers are always right (a Llama of hidden size
512 and 12 layers, nine of them idle), the loop is this many times as fast as plain decoding, one
prompt at a time: {gains} tokens a round; all tokens identical."""
    return f"{told}\n\n{_table(heads, rows)}\n\n{ceiling}"


def _selection(_: str, found: dict[str, Any]) -> str:
    rows = []
    for part in ("skip_against_exit", "controllers"):
        for arm, figures in found["summary"][part].items():
            told = [f"{figures[name]['mean']:.3f} ± {figures[name]['sd']:.3f}" for name in FIGURES]
            rows.append([arm, *told])
    heads = ["answers keep", "ROUGE-L", "loss", "layers visited"]
    seeds = [found["seeds"][seed]["oracle"] for seed in found["seeds"]]
    shares = ", ".join(f"{one['equal_budget']['share']:.1%}" for one in seeds)
    told = f"""Decoders of 12 layers trained on the docstring set (`recipes/glavas-tiny-*.yaml`),
500 test questions, mean and sample standard deviation over {len(seeds)} seeds; `tuned` and the
controllers were trained on from each seed's full model. The oracle equals the full model at
{shares} of the layers (seed by seed); LAB.md has its controls."""
    return f"{told}\n\n{_table(heads, rows)}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def _table(heads: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


SECTIONS: dict[str, Callable[[str, dict[str, Any]], str]] = {
    "overhead": _suite,
    "train": _suite,
    "published": _published,
    "quantised_training": _quantised,
    "skip": _suite,
    "speculation": _speculation,
    "depth_selection": _selection,
}
"""File in benchmarks/results -> what makes its section."""


if __name__ == "__main__":
    main()
