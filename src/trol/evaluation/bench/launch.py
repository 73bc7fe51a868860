"""A host so narrow that a pass is all launches and Python, as a batch of one is on a GPU.

Operators are what a device has to launch: those that torch dispatches, views left out, for each
layer and beside the bare host's; they and the looks at a tensor's values are exact. Times are
ratios to the bare host, whatever visits were made.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch

from trol.depth import AbstractPolicy, Answer, Bounds, Visit, attach, executor
from trol.evaluation.bench.hosts import host, twin
from trol.evaluation.bench.row import Row, figure_row, phase_of, row
from trol.evaluation.bench.setting import Setting, Size
from trol.evaluation.timing import generated, interleaved, time_forward
from trol.host.dispatch import Launches
from trol.policies.mixer import TrolMixer
from trol.policies.plain import Plain

NARROW = Size(
    "narrow", 64, 24, 24, 48, None, 200, intermediate=128, heads=2, kv_heads=1, new_tokens=24
)
"""The host, and the prompt that it reads, whatever size is asked for."""


class Drawn(AbstractPolicy):
    """A share of the tokens goes again, drawn once for each layer: choosing takes no time then."""

    name = "drawn"
    decides = True

    def __init__(self, share: float = 0.5) -> None:
        super().__init__()
        self.share = share
        self.chosen: dict[tuple[int, torch.Size], torch.Tensor] = {}

    def bounds(self, layer: int) -> Bounds:
        del layer
        return Bounds(1, 2)

    def again(self, visit: Visit) -> Answer:
        if visit.number == 0:
            return 1.0
        shape = visit.state.shape[:2]
        if (visit.layer, shape) not in self.chosen:
            source = torch.Generator().manual_seed(visit.layer)
            drawn = (torch.rand(shape, generator=source) < self.share).float()
            self.chosen[visit.layer, shape] = drawn.to(visit.state.device)
        return self.chosen[visit.layer, shape]

    def settings(self) -> dict[str, Any]:
        return {"share": self.share}


TOKENS = "half of the tokens again"

Case = tuple[Callable[[], AbstractPolicy | str], Mapping[str, float]]

CASES: dict[str, Case] = {
    "plain": (Plain, {"prefill": 1.02, "decode": 1.02}),
    "question": (TrolMixer, {"prefill": 2.20, "decode": 1.03}),
    "all": (lambda: TrolMixer(scope="all"), {"prefill": 2.20, "decode": 2.25}),
    "half of the layers": (lambda: "0-11", {"prefill": 0.60, "decode": 0.60}),
    TOKENS: (Drawn, {"prefill": 2.45}),
}
"""Case -> its policy, and the largest ratio of times to the bare host's in each phase."""

OPERATORS = {"plain": 1.0, "question": 2.13, "all": 2.13, "half of the layers": 0.5}
OPERATORS |= {TOKENS: 2.5}
"""Case -> the largest ratio of operators in a prompt's pass to the bare host's."""


@torch.no_grad()
def launch(setting: Setting, rounds: int) -> list[Row]:
    """Operators of one pass, looks at values, and times of a prompt and of a new token."""
    own = replace(setting, size=NARROW, rounds=None)
    rows = counted(own)
    bare = host(own)
    models = {name: attach(twin(bare), make()) for name, (make, _) in CASES.items()}
    ids = own.ids(1, NARROW.prompt)
    runs = {name: _pass(model, ids, name) for name, model in {"bare": bare, **models}.items()}
    times = {"prefill": interleaved(runs, rounds=2 * rounds, warmups=3)}
    several = {"bare": bare, **{n: m for n, m in models.items() if "decode" in CASES[n][1]}}
    made = generated(several, {"input_ids": ids}, NARROW.new_tokens, rounds=2 * rounds)
    times["decode"] = {name: phase_of(one, "decode") for name, one in made.items()}
    for name, (_, bounds) in CASES.items():
        for phase, bound in bounds.items():
            base, measured = times[phase]["bare"], times[phase][name]
            case, must = f"{name} {phase}, time", setting.must(bound)
            rows.append(row(case, base, measured, base, limit="the bare host", must=must))
    return rows


@torch.no_grad()
def counted(setting: Setting) -> list[Row]:
    """Operators of each layer in a prompt's pass to the bare host's, and looks in each layer."""
    setting = replace(setting, size=NARROW)
    bare, ids = host(setting), setting.ids(1, NARROW.prompt)
    fixed = _launches(attach(twin(bare), "exit@0"), ids).operators
    whole = _launches(bare, ids).operators - fixed
    rows = []
    for name, bound in OPERATORS.items():
        model = attach(twin(bare), CASES[name][0]())
        with _executor(name, model):
            found = _launches(model, ids)
        ratio, looks = (found.operators - fixed) / whole, found.looks / NARROW.layers
        once = float(name == TOKENS)
        rows += [
            figure_row(f"{name}, operators", ratio, limit="the bare host's operators", must=bound),
            figure_row(f"{name}, looks", looks, limit="looks in each layer", must=once),
        ]
    return rows


def _launches(model: Any, ids: torch.Tensor) -> Launches:
    """What one pass over a prompt [B, T] launches, once all that is done once is done."""
    decoder = model.get_decoder()
    decoder(ids, use_cache=True)
    with Launches() as seen:
        decoder(ids, use_cache=True)
    return seen


def _pass(model: Any, ids: torch.Tensor, name: str) -> Callable[[], float]:
    def run() -> float:
        with _executor(name, model):
            return time_forward(model, ids)

    return run


def _executor(name: str, model: Any) -> AbstractContextManager[None]:
    """Where only some tokens go: have those alone computed, which a narrow host would not pay."""
    return executor(model, "token-wise") if name == TOKENS else nullcontext()
