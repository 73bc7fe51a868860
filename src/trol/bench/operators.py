"""Operators: how many a pass launches (the suite `launch`), and where the time of a pass goes."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

from trol.bench.cases import Case, Row, answering, figure, measured, reading
from trol.bench.setting import Setting, Size, host, twin
from trol.bench.suites import ROWS, attached, row_plans
from trol.depth import AbstractPolicy, Answer, Bounds, Visit, attach, executor
from trol.depth.policy import Plain
from trol.errors import unknown
from trol.evaluation.timing import time_forward
from trol.host.torch_internals import Launches
from trol.policies.mixer import TrolMixer
from trol.policies.planned import Planned, static_plan
from trol.policies.random_tokens import RandomTokens

NARROW = Size(
    "narrow", 64, 24, 24, 48, None, 200, intermediate=128, heads=2, kv_heads=1, new_tokens=24
)
"""The host of `launch`, and the prompt that it reads, whatever size is asked for."""


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

LAUNCH: dict[str, tuple[Callable[[], AbstractPolicy | str], dict[str, float]]] = {
    "plain": (Plain, {"operators": 1.0, "prefill": 1.02, "decode": 1.02}),
    "question": (TrolMixer, {"operators": 2.13, "prefill": 2.20, "decode": 1.03}),
    "all": (lambda: TrolMixer(scope="all"), {"operators": 2.13, "prefill": 2.20, "decode": 2.25}),
    "half of the layers": (lambda: "0-11", {"operators": 0.5, "prefill": 0.60, "decode": 0.60}),
    TOKENS: (Drawn, {"operators": 2.5, "prefill": 2.45}),
}
"""Case -> its policy, and the largest ratios to the bare host: of operators, and of times."""


@torch.no_grad()
def launch(setting: Setting, rounds: int) -> list[Row]:
    """A host so narrow that a pass is all launches and Python, as a batch of one is on a GPU.

    Operators are those that torch dispatches, views left out, in one pass over a prompt; looks are
    reads of a tensor's values. Both are exact. Times are ratios to the bare host, whatever visits
    are made.
    """
    own = replace(setting, size=NARROW)
    models = attached(host(own), {name: policy() for name, (policy, _) in LAUNCH.items()})
    decoding = {name: model for name, model in models.items() if name != TOKENS}
    ids = own.ids(1, NARROW.prompt)
    results = counted(setting)
    with executor(models[TOKENS], "token-wise"):  # which so narrow a host would not take by itself
        times = measured(reading(models, ids, "prefill"), 2 * rounds, warmups=3)
    decoded = measured(answering(decoding, own, ids), 2 * rounds)
    times |= {run: one for run, one in decoded.items() if run.endswith(" decode")}
    cases = [
        Case(f"{name} {phase}, time", f"{name} {phase}", "the bare host", 1, must)
        for name, (_, bounds) in LAUNCH.items()
        for phase, must in bounds.items()
        if phase != "operators"
    ]
    return results + [case.row(times, setting) for case in cases]


@torch.no_grad()
def counted(setting: Setting) -> list[Row]:
    """Operators of each layer in a prompt's pass to the bare host's, and looks in each layer."""
    setting = replace(setting, size=NARROW)
    bare, ids = host(setting), setting.ids(1, NARROW.prompt)
    fixed = _launches(attach(twin(bare), "exit@0"), ids).operators
    whole = _launches(bare, ids).operators - fixed
    results = []
    for name, (policy, bounds) in LAUNCH.items():
        model = attach(twin(bare), policy())
        with executor(model, "token-wise" if name == TOKENS else "auto"):
            launches = _launches(model, ids)
        ratio, looks = (launches.operators - fixed) / whole, launches.looks / NARROW.layers
        limit, once = "the bare host's operators", float(name == TOKENS)
        results += [
            figure(f"{name}, operators", ratio, limit, bounds["operators"]),
            figure(f"{name}, looks", looks, "looks in each layer", once),
        ]
    return results


def _launches(model: Any, ids: torch.Tensor) -> Launches:
    """What one pass over a prompt [B, T] launches, after a first one."""
    decoder = model.get_decoder()
    decoder(ids, use_cache=True)
    with Launches() as launches:
        decoder(ids, use_cache=True)
    return launches


PROFILED: dict[str, tuple[int, Callable[[int], AbstractPolicy]]] = {
    "overhead": (1, lambda _: Plain()),
    "traverse": (1, lambda _: TrolMixer()),
    "skip": (1, lambda layers: Planned(static_plan("uniform", layers, 0.5))),
    "rows": (ROWS, lambda layers: Planned(row_plans(layers))),
    "sparse": (1, lambda _: RandomTokens(0.5)),
}
"""Suite -> rows of the prompt, and the policy of its pass for a number of layers."""


class Operator(NamedTuple):
    """What one operator took in one pass, without the operators that it called."""

    name: str
    calls: int
    ms: float
    bare_calls: int
    bare_ms: float


@torch.no_grad()
def profiled(suite: str, setting: Setting) -> list[Operator]:
    """The operators of one pass over a whole prompt, those first that took the most time.

    Raises:
        UsageError: the suite has no pass of its own.
    """
    if suite not in PROFILED:
        raise unknown("suite with a profile", suite, PROFILED)
    setting.check()
    rows, policy = PROFILED[suite]
    bare, ids = host(setting), setting.ids(rows, setting.size.prompt)
    own = _times_of_operators(attach(twin(bare), policy(setting.size.layers)), ids)
    plain = _times_of_operators(bare, ids)
    operators = [Operator(name, *own[name], *plain.get(name, (0, 0.0))) for name in own]
    return sorted(operators, key=lambda one: -one.ms)


def _times_of_operators(model: Any, ids: torch.Tensor) -> dict[str, tuple[int, float]]:
    """Operator -> calls and milliseconds, on the GPU where there is one; after a first pass."""
    time_forward(model, ids)
    gpu = ids.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]
    with profile(activities=activities) as events:
        time_forward(model, ids)
    which = "self_device_time_total" if gpu else "self_cpu_time_total"
    return {one.key: (one.count, getattr(one, which) / 1000) for one in events.key_averages()}
