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
process; the spread is half their interquartile range. In the suites of `trol bench` the ratio
is measured time to limit, and the limit is what the host itself takes for the layer visits that
were made ([docs/benchmarks.md](../docs/benchmarks.md)). `?` marks a row whose spread is above 5 %,
`!` one above its bound."""

SUITES = {
    "overhead": """What attaching costs. The `published` rows are a model of the released kind
(partial LoRA, one gate, 256 image tokens in a prompt of 300); their limits are what the official
code takes, as a multiple of its own single pass.""",
    "traverse": """Two visits of a question's tokens, or of an answer's, and none.""",
    "skip": """Half of the layers skipped by plan: by all tokens, or by those of the answer alone,
which leave their keys and values.""",
    "rows": """Eight rows of a batch, each with a plan of its own that keeps half of the layers.""",
    "sparse": """A random share of the tokens makes a second visit, or any at all, another share in
each layer; one pass over a prompt. `extra time` is that beyond the bare host's. `as dense`: where
leaving tokens out would lose, the executor taken by itself against the dense one.""",
    "launch": """A Llama of hidden size 64 and 24 layers, 48 tokens: a pass is all launches and
Python, as one prompt is on a GPU. Operators that a device would have to launch, and times, to the
bare host's, whatever visits are made; looks at a tensor's values in each layer.""",
    "speculate": """Drafts that are always right, because the upper three quarters of the layers do
next to nothing: milliseconds of each of 64 tokens, against plain decoding and against the passes
that a round makes.""",
    "train": """One loss and its gradients with a second visit for all tokens, to twice the same
without.""",
    "load": """Opening a checkpoint in the published layout, and a host with its adapter. Memory:
what the process held of its own meanwhile.""",
}
"""Suite of `trol bench` -> what it measures."""

FIGURES = ("rougeL", "loss", "visits")


def main() -> None:
    """Reads every result that is there and writes the page."""
    parts = [INTRO]
    for title, render in SECTIONS.items():
        for file in _files(title):
            found = json.loads(file.read_text(encoding="utf-8"))
            parts.append(f"## {file.stem}\n\n{_origin(found)}\n\n{render(title, found)}")
    (HERE / "RESULTS.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def _files(title: str) -> list[Path]:
    """The results of one section: of a suite also those at other settings, as `skip-1.8b-bf16`."""
    several = title in SUITES or title == "gpu"
    others = (HERE / "results").glob(f"{title}-*.json") if several else []
    return [
        file for file in (HERE / "results" / f"{title}.json", *sorted(others)) if file.is_file()
    ]


def _origin(found: dict[str, Any]) -> str:
    run = found["run"]
    packages = ", ".join(f"{name} {run['versions'][name]}" for name in ("torch", "transformers"))
    origin = f"{run['machine']}, {packages}, commit {run['commit']}."
    origin += f" {found['note']}" if "note" in found else ""
    return f"    {run['command']}\n\n{origin}"


def _suite(name: str, found: dict[str, Any]) -> str:
    speeds = any("tokens_per_s" in row for row in found["rows"])
    heads = ["case", "bare ms", "measured ms", "limit ms", "limit", "ratio", "spread"]
    heads += ["must be at most", "tokens/s"] if speeds else ["must be at most"]
    rows = []
    for row in found["rows"]:
        cells = [
            row["case"],
            *(_amount(row, key) for key in ("baseline", "measured", "limit")),
            row.get("limit", ""),
            f"{row['ratio']:.3f}{_mark(row)}",
            f"± {row['spread']:.3f}",
            "" if row["must"] is None else f"{row['must']:.4g}",
        ]
        rows.append([*cells, _number(row.get("tokens_per_s"))] if speeds else cells)
    return f"{SUITES[name]}{_measured_at(found)}\n\n{_table(heads, rows)}"


def _measured_at(found: dict[str, Any]) -> str:
    if "size" not in found:  # of before suites had settings
        return ""
    threads = f"{found['threads']} thread" + ("s" if found["threads"] > 1 else "")
    at = f"Size {found['size']}, {found['dtype']}, {found['device']}, {threads}"
    return f" {at}, {found['rounds']} rounds."


def _amount(row: dict[str, Any], key: str) -> str:
    if f"{key}_bytes" in row:
        return f"{row[f'{key}_bytes'] / 2**30:.2f} GiB"
    return _number(row[f"{key}_ms"])


def _mark(row: dict[str, Any]) -> str:
    above = row["must"] is not None and row["ratio"] > row["must"]
    return (" !" if above else "") + (" ?" if row.get("noisy") else "")


def _gpu(_: str, found: dict[str, Any]) -> str:
    names = list(dict.fromkeys(n for row in found["rows"] for n in row.get("ratio", ())))
    rows = [
        [
            f"{row['what']} {row['rows']} x {row['tokens']}",
            _number(row["bare_ms"]),
            *(f"{row['ratio'][n]:.2f}" if n in row["ratio"] else "" for n in names),
        ]
        for row in found["rows"]
        if "ratio" in row
    ]
    told = [
        f"{found.get('gpu', found['device'])}, size {found['size']}, {found['dtype']}. "
        "Ratios to the bare host in the same rounds; `again`: that share of the tokens makes a "
        "second visit."
    ]
    families = [row for row in found["rows"] if row.get("what") == "family"]
    if families:
        same = sum(row["same"] for row in families)
        apart = max(row["apart"] for row in families)
        told.append(
            f"{same} of {len(families)} cases (families x policies) give the CPU's tokens, by "
            f"either executor; the largest difference of a logit is {apart:.1g}."
        )
    peaks = [row for row in found["rows"] if row.get("what") == "peak_bytes"]
    for row in peaks:
        held = ", ".join(f"{name} {held / 2**20:,.0f}" for name, held in row["bytes"].items())
        beside = " beside the weights" if row.get("beside_the_weights") else ""
        told.append(f"Peak MiB{beside}, {row['rows']} x {row['tokens']}: {held}.")
    if found["left_out"]:
        told.append(f"Left out for want of time: {', '.join(found['left_out'])}.")
    return f"{chr(10).join(told)}\n\n{_table(['work', 'bare ms', *names], rows)}"


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


def _sparse_traversal(_: str, found: dict[str, Any]) -> str:
    rows = [
        [name, *_thresholds(one, kind)]
        for name, one in found["models"].items()
        for kind in ("full", "sparse", "plain")
    ]
    heads = ["model", "tau of each layer", "FLOPs / plain", "answers kept", "accuracy"]
    heads += [f"prefill / plain, {count} at once" for count in (1, 32)]
    told = """What `trol calibrate` finds on validation boards at quality .99, asked 1,800 test
questions: the share of answers that are, word for word, those of full traversal, and the time of
reading the prompts. LAB.md has the controls (random tokens, whole layers)."""
    return f"{told}\n\n{_table(heads, rows)}"


def _thresholds(one: dict[str, Any], kind: str) -> list[str]:
    """One model under full traversal, the calibrated thresholds, or none."""
    said, taus = one["answers"][kind], one["answers"]["calibration"]["policy"]["tau"]
    told = {
        "full": ("0 everywhere", 2.0),
        "sparse": (
            ", ".join("none" if tau is None else f"{tau:g}" for tau in taus),
            said.get("cost"),
        ),
        "plain": ("none anywhere", 1.0),
    }
    again, cost = told[kind]
    times = [
        f"{t['ratio'][kind]:.2f} ± {t['spread'][kind]:.2f} ({t['milliseconds'][kind]:.1f} ms)"
        for t in one["times"]["auto"]
    ]
    return [again, f"{cost:.2f}", f"{said['kept']:.4f}", f"{said['accuracy']:.3f}", *times]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def _table(heads: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


SECTIONS: dict[str, Callable[[str, dict[str, Any]], str]] = {
    "gpu": _gpu,
    **dict.fromkeys(SUITES, _suite),
    "published": _published,
    "quantised_training": _quantised,
    "sparse_traversal": _sparse_traversal,
    "speculation": _speculation,
    "depth_selection": _selection,
}
"""File in benchmarks/results -> what makes its section."""


if __name__ == "__main__":
    main()
