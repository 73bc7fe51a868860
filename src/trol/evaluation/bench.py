"""Benchmark suites: each promises ratios, and shows beside them the bound that they must keep."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from transformers import CLIPVisionConfig

from trol.data.chat import IGNORED
from trol.depth import AbstractPolicy, attach, depth
from trol.depth.planes import cache_bytes
from trol.errors import unknown
from trol.evaluation.bench_rows import Row, llama, plain_row, row
from trol.evaluation.bench_skip import skip
from trol.evaluation.timing import Timing, interleaved, time_generate, time_step
from trol.family import InternLM2Config, TrolConfig, TrolForConditionalGeneration
from trol.policies.mixer import TrolMixer
from trol.policies.plain import Plain

PROMPTS = (32, 512)
BATCHES = (1, 4)
NEW_TOKENS = 16

OVERHEAD: dict[str, tuple[Callable[[], AbstractPolicy], dict[str, tuple[int, float]]]] = {
    "plain": (Plain, {"prefill": (1, 1.03), "decode": (1, 1.03)}),
    "question": (TrolMixer, {"prefill": (2, 2.05), "decode": (1, 1.05)}),
    "all": (lambda: TrolMixer(scope="all"), {"decode": (2, 2.1)}),
}
"""Attached policy -> phase -> (visits of each layer, largest ratio to the bare host)."""


def run(suite: str, *, rounds: int = 9) -> dict[str, Any]:
    """Runs one suite in this process: `{"suite", "rows"}`.

    Raises:
        UsageError: there is no such suite.
    """
    if suite not in SUITES:
        raise unknown("suite", suite, SUITES)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return {"suite": suite, "threads": 1, "rows": SUITES[suite](rounds)}
    finally:
        torch.set_num_threads(threads)


@torch.no_grad()
def overhead(rounds: int) -> list[Row]:
    """What attaching costs: a Llama of hidden size 512 and 8 layers, float32, sdpa."""
    bare = llama(hidden=512, layers=8)
    models = {name: attach(copy.deepcopy(bare), make()) for name, (make, _) in OVERHEAD.items()}
    rows: list[Row] = []
    for batch in BATCHES:
        for prompt in PROMPTS:
            rows += _overhead_rows(bare, models, batch, prompt, rounds)
    rows += _published_rows(rounds)
    rows.append(_memory_row(bare, models["question"]))
    rows.append(_exactness_row(models["all"]))
    return rows


def _overhead_rows(
    bare: Any, models: dict[str, Any], batch: int, prompt: int, rounds: int
) -> list[Row]:
    ids = torch.randint(3, bare.config.vocab_size, (batch, prompt))
    runs = {
        name: lambda model=model: time_generate(model, {"input_ids": ids}, NEW_TOKENS)
        for name, model in {"bare": bare, **models}.items()
    }
    times = interleaved(runs, rounds=rounds)
    rows = []
    for name, (_, bounds) in OVERHEAD.items():
        for phase, (visits, must) in bounds.items():
            bare_ms, measured_ms = ([getattr(t, phase) for t in times[n]] for n in ("bare", name))
            case = f"{name} {phase} b{batch} t{prompt}"
            rows.append(row(case, bare_ms, measured_ms, visits=visits, must=must))
    return rows


def train(rounds: int) -> list[Row]:
    """What a training step with a second visit for all tokens takes, to the same without."""
    bare = llama(hidden=512, layers=8).train()
    traversing = attach(copy.deepcopy(bare), TrolMixer())
    rows = []
    for batch, tokens in ((1, 512), (4, 256)):
        ids = torch.randint(3, bare.config.vocab_size, (batch, tokens))
        labels = ids.clone()
        labels[:, : tokens // 2] = IGNORED
        inputs = {"input_ids": ids, "labels": labels}
        times = interleaved(
            {
                "bare": lambda inputs=inputs: time_step(bare, inputs),
                "traversing": lambda inputs=inputs: time_step(traversing, inputs),
            },
            rounds=rounds,
        )
        case = f"all tokens b{batch} t{tokens}"
        rows.append(row(case, times["bare"], times["traversing"], visits=2, must=2.05))
    return rows


def _published_rows(rounds: int) -> list[Row]:
    """The released models' kind: partial LoRA, one gate, 256 image tokens in a prompt of 300.

    The bounds are what the official code takes of its own single pass, measured alike.
    """
    model = _published()
    image = torch.full((1, model.config.tokens_per_image), model.config.image_token_id)
    words = torch.randint(3, 2000, (1, 300 - image.shape[1]))
    side = model.config.vision_config.image_size
    inputs = {
        "input_ids": torch.cat([words[:, :8], image, words[:, 8:]], dim=1),
        "pixel_values": torch.randn(1, 3, side, side),
    }

    def bare() -> Timing:
        with depth(model, "all"):
            return time_generate(model, inputs, NEW_TOKENS)

    runs = {"bare": bare, "trol": lambda: time_generate(model, inputs, NEW_TOKENS)}
    times = interleaved(runs, rounds=rounds)
    rows = []
    for phase, visits, must in (("prefill", 2, 1.95), ("decode", 1, 1.0)):
        bare_ms, measured_ms = ([getattr(t, phase) for t in times[name]] for name in runs)
        case = f"published {phase} b1 t300"
        rows.append(row(case, bare_ms, measured_ms, visits=visits, must=must))
    return rows


def _published() -> TrolForConditionalGeneration:
    """InternLM2 of hidden size 512 and 8 layers behind a tower that costs next to nothing."""
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=1,
        image_size=64,
        patch_size=4,
    )
    text = InternLM2Config(
        vocab_size=2048,
        hidden_size=512,
        intermediate_size=512 * 8 // 3,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        eos_token_id=2,
    )
    depth_settings = {"policy": "trol_mixer", "sharing": "shared"}
    config = TrolConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=text.vocab_size,
        depth=depth_settings,
    )
    return TrolForConditionalGeneration(config).eval()


def _memory_row(bare: Any, model: Any) -> Row:
    """Keys and values held after the prefill inside `generate`, to those of the bare host."""
    held = [_bytes_after_prefill(one) for one in (bare, model)]
    return plain_row("question memory after prefill (bytes)", held[1] / held[0], must=1.0)


def _bytes_after_prefill(model: Any) -> int:
    caches: list[Any] = []
    stack = model.get_decoder()
    hook = stack.register_forward_hook(lambda _m, _a, out: caches.append(out.past_key_values))
    try:
        ids = torch.randint(3, model.config.vocab_size, (1, 64))
        time_generate(model, {"input_ids": ids}, 2)
    finally:
        hook.remove()
    return cache_bytes(caches[0])


def _exactness_row(model: Any) -> Row:
    """Scope all: tokens decoded with a cache that differ from recomputing everything."""
    ids = torch.randint(3, model.config.vocab_size, (2, 32))
    settings = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 0}
    mask = torch.ones_like(ids)
    cached = model.generate(ids, attention_mask=mask, **settings)
    recomputed = model.generate(ids, attention_mask=mask, use_cache=False, **settings)
    same = (cached == recomputed).float().mean().item()
    return plain_row("all: share of tokens equal to recomputing", same, must=1.0)


SUITES: dict[str, Callable[[int], list[Row]]] = {"overhead": overhead, "train": train, "skip": skip}
"""Suite name -> what measures it, given the number of rounds."""
