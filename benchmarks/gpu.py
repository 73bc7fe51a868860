"""What traversal takes on a GPU: one script of at most eight minutes, and one JSON.

python benchmarks/gpu.py --out benchmarks/results/gpu.json
python benchmarks/gpu.py --device cpu --size tiny --out benchmarks/results/gpu-tiny-cpu.json

The second only shows that it works. A random Llama of the released models' dimensions in bfloat16:
ratios to the bare host in the same rounds, of a prompt, of a new token (eager, and compiled on a
static cache), of memory and of a training step; in four bits; at 7B; and tokens and logits on every
family of tests/hosts against the CPU's. Parts are measured in this order until the seconds are
over; each is written as it ends.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import trol
from trol.bench.operators import Drawn
from trol.bench.setting import Setting, host, size_of, twin
from trol.cli.terminal import run_record
from trol.depth import AbstractPolicy, attach, detach, executor
from trol.errors import TrolError, UsageError
from trol.evaluation.timing import (
    generated,
    interleaved,
    ratio_and_spread,
    time_forward,
    time_generate,
    time_step,
)

ROUNDS = 5
Row = dict[str, Any]
Made = Callable[[], AbstractPolicy | str]


def policies(layers: int) -> dict[str, Made]:
    """Case -> its policy."""
    return {
        "plain": lambda: "all",
        "question": trol.TrolMixer,
        "all": lambda: trol.TrolMixer(scope="all"),
        "half of the layers": lambda: f"0-{layers // 2 - 1}",
    }


def shares() -> dict[str, Made]:
    """Shares of the tokens that go again."""
    return {f"{share:g} again": lambda share=share: Drawn(share) for share in (0.5, 0.25, 0.1, 0.0)}


def attached(bare: Any, made: dict[str, Made]) -> dict[str, Any]:
    """The bare host, and a twin of it under each policy."""
    return {"bare": bare, **{name: attach(twin(bare), make()) for name, make in made.items()}}


def compared(times: dict[str, list[float]], **told: Any) -> Row:
    """Ratios to the bare host, round by round."""
    found = {name: ratio_and_spread(times["bare"], one) for name, one in times.items()}
    bare = sorted(times["bare"])[len(times["bare"]) // 2]
    return {
        **told,
        "bare_ms": round(bare, 3),
        "ratio": {name: round(ratio, 3) for name, (ratio, _) in found.items() if name != "bare"},
        "spread": {name: round(spread, 3) for name, (_, spread) in found.items() if name != "bare"},
    }


@torch.no_grad()
def prompts(setting: Setting) -> Iterator[Row]:
    """One pass of the decoder over prompts of several shapes."""
    bare = host(setting)
    models = attached(bare, {**policies(setting.size.layers), **shares()})
    for rows, tokens in shapes(setting):
        ids = setting.ids(rows, tokens)
        runs = {
            name: lambda m=model, given=ids: time_forward(m, given)
            for name, model in models.items()
        }
        times = interleaved(runs, rounds=ROUNDS, warmups=2)
        yield compared(times, what="prefill", rows=rows, tokens=tokens)


def shapes(setting: Setting) -> list[tuple[int, int]]:
    """(rows, tokens) of the prompts."""
    whole = setting.size.prompt
    batches = (1, 8, 32) if setting.size.name == "1.8b" else (1,)
    return [(1, min(64, whole // 2)), *((rows, whole) for rows in batches)]


@torch.no_grad()
def decoding(setting: Setting) -> Iterator[Row]:
    """New tokens behind a prompt, and the most memory beside the weights."""
    models = attached(host(setting), policies(setting.size.layers))
    for rows, tokens in shapes(setting)[1:]:
        inputs = {"input_ids": setting.ids(rows, tokens)}
        made = generated(models, inputs, 17, rounds=3)
        times = {name: [one.mean_decode for one in runs] for name, runs in made.items()}
        yield compared(times, what="decode", rows=rows, tokens=tokens)
        peaks = {name: runs[-1].peak_bytes for name, runs in made.items()}
        if all(peaks.values()):
            yield {"what": "peak_bytes", "rows": rows, "tokens": tokens, "bytes": peaks}


@torch.no_grad()
def compiled(setting: Setting) -> Iterator[Row]:
    """New tokens on a static cache, whose decoding transformers compiles on a GPU."""
    models = attached(host(setting), policies(setting.size.layers))
    del models["all"]
    ids = setting.ids(1, min(512, setting.size.prompt))
    how = {"cache_implementation": "static"}
    seconds, times = {}, {}
    for name, model in models.items():
        torch.compiler.reset()
        began = time.perf_counter()
        time_generate(model, {"input_ids": ids, **how}, 8)
        seconds[name] = round(time.perf_counter() - began, 1)
        runs = [time_generate(model, {"input_ids": ids, **how}, 34) for _ in range(3)]
        times[name] = [one.decode for one in runs]
    told = {"what": "static compiled decode", "rows": 1, "tokens": ids.shape[1]}
    yield {**compared(times, **told), "first_seconds": seconds}


def training(setting: Setting) -> Iterator[Row]:
    """One loss and its gradients; in training all tokens are traversed."""
    bare = host(setting, training=True)
    models = attached(bare, {"question": trol.TrolMixer})
    ids = setting.ids(1, min(1024, setting.size.prompt))
    batch = {"input_ids": ids, "labels": ids}
    runs = {name: lambda m=model: time_step(m.train(), batch) for name, model in models.items()}
    yield compared(interleaved(runs, rounds=3), what="training step", rows=1, tokens=ids.shape[1])


def families(setting: Setting) -> Iterator[Row]:
    """Every family of the zoo: this device's tokens and logits to the CPU's, by both executors."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    from hosts import HOSTS  # noqa: PLC0415 - which are no part of the package

    torch.backends.cuda.matmul.allow_tf32 = False
    mixes: dict[str, Made] = {
        "question": trol.TrolMixer,
        "all": lambda: trol.TrolMixer(scope="all"),
        "tau": lambda: trol.TrolMixer(tau=0.5),
        "skip": lambda: "0 2-3",
        "exit": lambda: trol.EarlyExit("margin", 0.3),
        "controller": trol.Controller,
        "half": lambda: Drawn(0.5),
    }
    for name, one in HOSTS.items():
        model = one.build().eval()
        for mix, make in mixes.items():
            torch.manual_seed(0)
            attach(model.cpu(), make())
            found = {"cpu": _said(model, one.inputs(), "cpu", "dense")}
            for by in ("dense", "token-wise"):
                found[by] = _said(model.to(setting.device), one.inputs(), setting.device, by)
            detach(model)
            apart = max((found[by][1] - found["cpu"][1]).abs().max().item() for by in found)
            same = all(found[by][0] == found["cpu"][0] for by in found)
            yield {"what": "family", "family": name, "policy": mix, "same": same, "apart": apart}


@torch.no_grad()
def _said(model: Any, inputs: Any, device: str, by: str) -> tuple[Any, torch.Tensor]:
    inputs = {key: value.to(device) for key, value in inputs.items()}
    with executor(model, by):
        out = model.generate(
            **inputs,
            max_new_tokens=6,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
    return out.sequences.tolist(), torch.stack(out.logits, 1).float().cpu()


def parts(setting: Setting) -> dict[str, Callable[[], Iterator[Row]]]:
    """What is measured, in this order."""
    float32 = replace(setting, dtype="float32")
    found = {
        "families": lambda: families(float32),
        "prompts": lambda: prompts(setting),
        "decoding": lambda: decoding(setting),
        "compiled": lambda: compiled(setting),
        "training": lambda: training(setting),
    }
    if setting.device == "cuda":
        wide = replace(setting, size=size_of("7b"))
        found["four bits"] = lambda: prompts(replace(setting, dtype="nf4"))
        found["7b prompts"], found["7b decoding"] = lambda: prompts(wide), lambda: decoding(wide)
    return found


def main() -> int:
    """Measures part after part; exits 1 where one failed, 2 where nothing can be measured."""
    asked = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    asked.add_argument("--device", default="cuda", help="cuda, or cpu to see whether it works")
    asked.add_argument("--size", default="1.8b", help="of the host: tiny, small, 1.8b, 7b")
    asked.add_argument("--seconds", type=float, default=480, help="after which no part begins")
    asked.add_argument("--out", type=Path, required=True, help="the JSON that is written")
    given = asked.parse_args()
    try:
        setting = Setting(size_of(given.size), "bf16", given.device)
        setting.check()
        if given.out.is_dir() or not given.out.absolute().parent.is_dir():
            raise UsageError(f"--out is '{given.out}'; give a file in a folder that is there.")
        if given.seconds <= 0:
            raise UsageError(f"--seconds is {given.seconds:g}; give more than 0.")
    except TrolError as error:
        print(f"gpu.py: {error}", file=sys.stderr)
        return 2
    began, failed = time.monotonic(), []
    found: dict[str, Any] = {**setting.record(), "rows": [], "left_out": [], "run": run_record()}
    found["run"]["command"] = " ".join(["python", "benchmarks/gpu.py", *sys.argv[1:]])
    if setting.device == "cuda":
        found["gpu"] = torch.cuda.get_device_name()
    for name, part in parts(setting).items():
        if time.monotonic() - began > given.seconds:
            found["left_out"].append(name)
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                for row in part():
                    found["rows"].append({"part": name, **row})
                    print(json.dumps(found["rows"][-1]), flush=True)
                    if time.monotonic() - began > given.seconds:
                        break
        except Exception as error:  # a part that fails must not cost the others
            failed.append(name)
            found["rows"].append({"part": name, "failed": f"{type(error).__name__}: {error}"[:300]})
            print(json.dumps(found["rows"][-1]), flush=True)
        _write(given.out, found)
        if setting.device == "cuda":
            torch.cuda.empty_cache()
    return 1 if failed else 0


def _write(path: Path, found: dict[str, Any]) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


if __name__ == "__main__":
    sys.exit(main())
