"""Sparse traversal on trained models: which second visits the answers can do without, and the time.

    trol train tiny-deep --out runs/tiny-deep
    python benchmarks/sparse_traversal.py trol-tiny runs/tiny-deep

For each model `answers` calibrates the thresholds on validation boards and then asks test boards:
under them, under as many visits of random tokens, with whole layers left out, and at common
thresholds. `times` reads prompts, alone and 32 at once. What a file has already is not run again.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trol.cli.models import open_model
from trol.cli.terminal import run_record
from trol.depth import AbstractPolicy, Answer, Bounds, Visit, depth, executor
from trol.evaluation.answers import answers, scores
from trol.evaluation.calibration import calibrate_gates, mixer_of
from trol.evaluation.gates import GateRecord, Thresholds, at, record_gates
from trol.evaluation.items import Item
from trol.evaluation.tasks import TASKS, task_of
from trol.evaluation.timing import time_prefills
from trol.policies.mixer import TrolMixer

RESULTS = Path(__file__).parent / "results" / "sparse_traversal.json"
TASK, NEW_TOKENS = "boards", TASKS["boards"].new_tokens
QUALITY, CONFIDENCE = 0.99, 0.9
CALIBRATED, ASKED, RECORDED = 3000, 1800, 256
COMMON = (0.01, 0.1, 0.3, 0.5, 0.7, 0.9)
SEEDS = (0, 1, 2)
ROUNDS = 21


class RandomVisits(AbstractPolicy):
    """The mixer with its own gates, but a random share of tokens, layer by layer, goes again."""

    name = "random_visits"

    def __init__(self, mixer: TrolMixer, shares: Sequence[float], seed: int) -> None:
        super().__init__(scope=mixer.scope, training_scope=mixer.training_scope)
        self.mixer, self.shares, self.seed = at(mixer, (0.0,)), list(shares), seed

    def bounds(self, layer: int) -> Bounds:
        return Bounds(1, self.mixer.passes if self.shares[layer] else 1)

    def again(self, visit: Visit) -> Answer:
        answer = self.mixer.again(visit)
        if not isinstance(answer, Tensor):
            return answer
        source = torch.Generator().manual_seed(self.seed * 1000 + visit.layer)
        drawn = torch.rand(answer.shape, generator=source).to(answer.device)
        return torch.where(drawn < self.shares[visit.layer], answer, 0.0)

    def settings(self) -> dict[str, Any]:
        return {"mixer": self.mixer.settings(), "shares": self.shares, "seed": self.seed}


class Questions:
    """The test questions, what full traversal answers, and how much of it another policy keeps."""

    def __init__(self, model: Any, processor: Any, mixer: TrolMixer) -> None:
        self.given = model, processor
        self.items: list[Item] = task_of(TASK).items(ASKED, 0)
        self.full = self.answers(at(mixer, (0.0,)))

    def answers(self, policy: AbstractPolicy | str) -> list[str]:
        with depth(self.given[0], policy):
            return answers(*self.given, self.items, new_tokens=NEW_TOKENS)

    def row(self, policy: AbstractPolicy | str) -> dict[str, float]:
        """Share of answers as under full traversal, and accuracy."""
        said = self.answers(policy)
        kept = [float(a == b) for a, b in zip(said, self.full, strict=True)]
        right = scores("exact", said, self.items)
        return {"kept": sum(kept) / len(kept), "accuracy": sum(right) / len(right)}


def answered(model: Any, processor: Any) -> dict[str, Any]:
    """The calibrated thresholds, and what they and their controls keep on test questions."""
    began, mixer = time.perf_counter(), mixer_of(model)
    items = task_of(TASK).items(CALIBRATED, 0, "validation")
    found = calibrate_gates(
        model, processor, items, new_tokens=NEW_TOKENS, quality=QUALITY, confidence=CONFIDENCE
    )
    seconds = time.perf_counter() - began
    record = record_gates(model, processor, items[:RECORDED], mixer, new_tokens=NEW_TOKENS)
    layers = len(record.visit)
    taus: Thresholds = tuple(found.policy.threshold(layer) for layer in range(layers))
    asked = Questions(model, processor, mixer)

    def row(taus: Thresholds) -> dict[str, Any]:
        shares = record.shares(taus)
        at_random = [
            asked.row(RandomVisits(mixer, shares, seed))["kept"]
            for seed in SEEDS
            if any(0 < share < 1 for share in shares)
        ]
        return {
            "cost": record.cost(taus),
            "shares": shares,
            **asked.row(at(mixer, taus)),
            "kept_at_random": at_random,
        }

    return {
        "calibration": {key: value for key, value in found.json().items() if key != "prefill"},
        "seconds": seconds,
        "gates": gate_table(record),
        "full": asked.row(at(mixer, (0.0,))),
        "plain": asked.row("plain"),
        "sparse": row(taus),
        "common": {str(tau): row((tau,) * layers) for tau in COMMON},
        "without": {
            " ".join(map(str, gone)): asked.row(at(mixer, without(layers, gone)))
            for gone in left_out(record)
        },
    }


def gate_table(record: GateRecord) -> list[dict[str, float]]:
    """Mean and percentiles of each layer's gates."""
    gates = record.least[:, 0]
    cuts = gates.quantile(torch.tensor([0.05, 0.5, 0.95]), dim=1)
    return [
        {"mean": float(mean), "low": float(low), "median": float(middle), "high": float(high)}
        for mean, (low, middle, high) in zip(gates.mean(1), cuts.T, strict=True)
    ]


def left_out(record: GateRecord) -> list[list[int]]:
    """Each layer alone, then the layers of the smallest mean gates together: 2, 3, ... of them."""
    order = record.least[:, 0].mean(-1).argsort().tolist()
    return [[layer] for layer in sorted(order)] + [
        sorted(order[:count]) for count in range(2, len(order))
    ]


def without(layers: int, gone: Sequence[int]) -> Thresholds:
    """Full traversal of all layers but some."""
    return tuple(None if layer in gone else 0.0 for layer in range(layers))


def timed(model: Any, processor: Any, settings: dict[str, Any]) -> dict[str, Any]:
    """Prompts under no, full and calibrated traversal, by executor."""
    mixer = mixer_of(model)
    sparse = TrolMixer(**settings)
    policies = {"plain": "plain", "full": at(mixer, (0.0,)), "sparse": sparse}
    items = task_of(TASK).items(64, 0)
    found = {}
    for name in ("auto", "token-wise", "dense"):
        with executor(model, name):
            read = time_prefills(model, processor, items, policies, rounds=ROUNDS)
        found[name] = [one.json() for one in read]
    return found


def main() -> None:
    """Writes one JSON object, after every part."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--parts", nargs="+", default=["answers", "times"])
    parser.add_argument("--again", action="store_true", help="run what the file has already")
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    found = json.loads(given.out.read_text()) if given.out.exists() else {"models": {}}
    for name in given.models:
        rows = found["models"].setdefault(Path(name).name, {})
        model, processor = open_model(name)
        for part in given.parts:
            if part in rows and not given.again:
                continue
            if part == "answers":
                rows[part] = answered(model, processor)
            else:
                settings = rows["answers"]["calibration"]["policy"]
                rows[part] = timed(model, processor, settings)
            found["run"] = {**run_record(), "command": shlex.join(["python", *sys.argv])}
            partial = given.out.with_name(given.out.name + ".partial")
            partial.write_text(json.dumps(found, indent=2) + "\n")
            partial.replace(given.out)


if __name__ == "__main__":
    main()
