"""What attaching costs, on prompts of several lengths and batches of several rows.

The limit of a policy by which each layer is visited n times is n times the bare host's time. That
of the released models' kind is what the official code takes, as a multiple of its own single pass.

A host so narrow that a pass is all launches and Python, as a batch of one is on a GPU.

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
from transformers import CLIPVisionConfig

from trol.bench.setting import (
    DTYPES,
    Row,
    Setting,
    Size,
    figure_row,
    host,
    phase_of,
    row,
    scaled,
    twin,
)
from trol.depth import AbstractPolicy, Answer, Bounds, Visit, attach, depth, executor
from trol.depth.planes import cache_bytes
from trol.depth.policy import Plain
from trol.evaluation.timing import Timing, generated, interleaved, time_forward, time_generate
from trol.family import InternLM2Config, TrolConfig, TrolForConditionalGeneration
from trol.host.names import CACHE
from trol.host.torch_internals import Launches
from trol.policies.mixer import TrolMixer

POLICIES: dict[str, tuple[Callable[[], AbstractPolicy], dict[str, tuple[int, float]]]] = {
    "plain": (Plain, {"prefill": (1, 1.03), "decode": (1, 1.03)}),
    "question": (TrolMixer, {"prefill": (2, 1.025), "decode": (1, 1.05)}),
    "all": (lambda: TrolMixer(scope="all"), {"decode": (2, 1.05)}),
}
"""Attached policy -> phase -> (visits of each layer, largest ratio to so many bare visits)."""

OFFICIAL = {"prefill": 1.95, "decode": 1.0}
"""What the official code takes with traversal, as a multiple of its own single pass."""

IMAGE_TOKENS, TEXT_TOKENS = 256, 44


@torch.no_grad()
def overhead(setting: Setting, rounds: int) -> list[Row]:
    """Policies attached to a Llama; the released kind; memory; exactness."""
    bare = host(setting)
    models = {name: attach(twin(bare), make()) for name, (make, _) in POLICIES.items()}
    rows: list[Row] = []
    for batch, tokens in setting.shapes(4):
        rows += _attached(bare, models, setting, (batch, tokens), rounds)
    if setting.size.short is not None and setting.dtype != "nf4":
        rows += _published_rows(setting, rounds)
    rows.append(_memory(bare, models["question"], setting))
    if setting.dtype == "float32":  # narrower types round differently in passes of other lengths
        rows.append(_exactness(models["all"], setting))
    return rows


def _attached(
    bare: Any, models: dict[str, Any], setting: Setting, shape: tuple[int, int], rounds: int
) -> list[Row]:
    inputs, new_tokens = {"input_ids": setting.ids(*shape)}, setting.size.new_tokens
    times = generated({"bare": bare, **models}, inputs, new_tokens, rounds=rounds)
    rows = []
    for name, (_, bounds) in POLICIES.items():
        for phase, (visits, bound) in bounds.items():
            plain, measured = (phase_of(times[which], phase) for which in ("bare", name))
            rows.append(
                row(
                    f"{name} {phase} b{shape[0]} t{shape[1]}",
                    plain,
                    measured,
                    scaled(plain, visits),
                    limit=f"{visits} x the bare host",
                    must=setting.must(bound),
                )
            )
    return rows


def _published_rows(setting: Setting, rounds: int) -> list[Row]:
    """The released models' kind: partial LoRA, one gate, most of the prompt image tokens."""
    model: Any = released_kind(setting.size)
    model.to(setting.device, DTYPES[setting.dtype])
    image = torch.full((1, model.config.tokens_per_image), model.config.image_token_id)
    words = torch.randint(3, setting.size.vocabulary, (1, TEXT_TOKENS))
    side = model.config.vision_config.image_size
    inputs = {
        "input_ids": torch.cat([words[:, :8], image, words[:, 8:]], dim=1).to(setting.device),
        "pixel_values": torch.randn(1, 3, side, side).to(setting.device, DTYPES[setting.dtype]),
    }
    new_tokens = setting.size.new_tokens

    def bare() -> Timing:
        with depth(model, "all"):
            return time_generate(model, inputs, new_tokens)

    runs = {"bare": bare, "trol": lambda: time_generate(model, inputs, new_tokens)}
    times = interleaved(runs, rounds=rounds)
    rows = []
    for phase, official in OFFICIAL.items():
        plain, measured = (phase_of(times[name], phase) for name in runs)
        rows.append(
            row(
                f"published {phase} b1 t{IMAGE_TOKENS + TEXT_TOKENS}",
                plain,
                measured,
                scaled(plain, official),
                limit=f"official code: {official:g} x its single pass",
                must=setting.must(1.0),
            )
        )
    return rows


def released_kind(size: Size) -> TrolForConditionalGeneration:
    """An InternLM2 of this size behind a tower that costs next to nothing."""
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=1,
        image_size=64,
        patch_size=4,
    )
    heads = size.hidden // 64
    text = InternLM2Config(
        vocab_size=size.vocabulary,
        hidden_size=size.hidden,
        intermediate_size=size.width,
        num_hidden_layers=size.layers,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 2),
        eos_token_id=2,
    )
    config = TrolConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=text.vocab_size,
        depth={"policy": "trol_mixer", "sharing": "shared"},
    )
    return TrolForConditionalGeneration(config).eval()


def _memory(bare: Any, model: Any, setting: Setting) -> Row:
    """Keys and values held after the prefill inside `generate`, to those of the bare host."""
    held = [_bytes_after_prefill(one, setting) for one in (bare, model)]
    case = "question memory after prefill (bytes)"
    return figure_row(case, held[1] / held[0], limit="the bare host's bytes", must=1.0)


def _bytes_after_prefill(model: Any, setting: Setting) -> int:
    caches: list[Any] = []
    stack = model.get_decoder()
    hook = stack.register_forward_hook(lambda _m, _a, out: caches.append(out[CACHE]))
    try:
        time_generate(model, {"input_ids": setting.ids(1, 64)}, 2)
    finally:
        hook.remove()
    return cache_bytes(caches[0])


def _exactness(model: Any, setting: Setting) -> Row:
    """Scope all: tokens decoded with a cache that differ from recomputing everything."""
    ids = setting.ids(2, 32)
    settings = {"max_new_tokens": setting.size.new_tokens, "do_sample": False, "pad_token_id": 0}
    mask = torch.ones_like(ids)
    cached = model.generate(ids, attention_mask=mask, **settings)
    recomputed = model.generate(ids, attention_mask=mask, use_cache=False, **settings)
    unlike = (cached != recomputed).float().mean().item()
    case = "all: share of tokens unlike recomputing"
    return figure_row(case, unlike, limit="no token", must=0.0)


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
