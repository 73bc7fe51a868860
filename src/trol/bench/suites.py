"""What trol promises of time and memory, suite by suite: the cases, and the models that run them.

A case's limit is the host's own time for the layer visits that are made (`trol.bench.cases`),
unless the case says otherwise.
"""

import copy
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from transformers import DynamicCache

from trol.bench.cases import (
    Case,
    Row,
    Runs,
    Times,
    answered,
    answering,
    figure,
    measured,
    reading,
    visits,
)
from trol.bench.setting import (
    DTYPES,
    TINY,
    Setting,
    host,
    idle_host,
    released_kind,
    twin,
    working_layers,
)
from trol.depth import AbstractPolicy, Plan, attach, depth, executor
from trol.depth.planes import cache_bytes
from trol.depth.policy import Plain
from trol.depth.roles import IGNORED_LABEL
from trol.evaluation.timing import Timing, now, time_forward, time_generate, time_step
from trol.host.names import CACHE
from trol.policies.mixer import TrolMixer
from trol.policies.planned import Planned, static_plan
from trol.policies.random_tokens import RandomTokens
from trol.speculation import speculate as drafting


def attached(bare: Any, policies: Mapping[str, AbstractPolicy | str]) -> dict[str, Any]:
    """The bare host, and a twin of it under each policy."""
    return {"bare": bare, **{name: attach(twin(bare), one) for name, one in policies.items()}}


OVERHEAD = (
    Case("plain prefill", "plain prefill", "1 x the bare host", 1, 1.03),
    Case("plain decode", "plain decode", "1 x the bare host", 1, 1.03),
    Case("question prefill", "question prefill", "2 x the bare host", 2, 1.025),
    Case("question decode", "question decode", "1 x the bare host", 1, 1.05),
    Case("all decode", "all decode", "2 x the bare host", 2, 1.05),
)

OFFICIAL = (
    Case("published prefill", "trol prefill", "official code: 1.95 x its single pass", 1.95, 1.0),
    Case("published decode", "trol decode", "official code: 1 x its single pass", 1, 1.0),
)
"""The limit is what the official code takes with traversal, as a multiple of its single pass."""

IMAGE_TOKENS, TEXT_TOKENS = 256, 44


@torch.no_grad()
def overhead(setting: Setting, rounds: int) -> list[Row]:
    """What attaching costs: on a Llama, on the released models' kind, in memory; and exactness."""
    bare = host(setting)
    policies = {"plain": Plain(), "question": TrolMixer(), "all": TrolMixer(scope="all")}
    models = attached(bare, policies)
    rows = answered(models, OVERHEAD, setting, rounds, shapes=setting.shapes(4))
    if setting.size.short is not None and setting.dtype != "nf4":
        rows += _published(setting, rounds)
    held = [_bytes_after_prefill(one, setting) for one in (bare, models["question"])]
    case = "question memory after prefill (bytes)"
    rows.append(figure(case, held[1] / held[0], "the bare host's bytes", 1.0))
    if setting.dtype == "float32":  # narrower types round differently in passes of other lengths
        case = "all: share of tokens unlike recomputing"
        rows.append(figure(case, _unlike(models["all"], setting), "no token", 0.0))
    return rows


def _published(setting: Setting, rounds: int) -> list[Row]:
    """The released models' kind: partial LoRA, one gate, most of the prompt image tokens."""
    model: Any = released_kind(setting.size)
    model.to(setting.device, DTYPES[setting.dtype])
    image = torch.full((1, model.config.tokens_per_image), model.config.image_token_id)
    words = torch.randint(3, setting.size.vocabulary, (1, TEXT_TOKENS))
    side = model.config.vision_config.image_size
    ids = torch.cat([words[:, :8], image, words[:, 8:]], dim=1).to(setting.device)
    pixels = torch.randn(1, 3, side, side).to(setting.device, DTYPES[setting.dtype])
    traversed = answering({"trol": model}, setting, ids, pixel_values=pixels)["trol"]

    def bare() -> Timing:
        with depth(model, "all"):
            return traversed()

    times = measured({"bare": bare, "trol": traversed}, rounds)
    return [case.row(times, setting, (1, IMAGE_TOKENS + TEXT_TOKENS)) for case in OFFICIAL]


def _bytes_after_prefill(model: Any, setting: Setting) -> int:
    """Of the keys and values that `generate` holds."""
    caches: list[Any] = []
    hook = model.get_decoder().register_forward_hook(lambda _m, _a, out: caches.append(out[CACHE]))
    try:
        time_generate(model, {"input_ids": setting.ids(1, 64)}, 2)
    finally:
        hook.remove()
    return cache_bytes(caches[0])


def _unlike(model: Any, setting: Setting) -> float:
    """The share of tokens decoded with a cache that differ from recomputing everything."""
    ids = setting.ids(2, 32)
    settings = {"max_new_tokens": setting.size.new_tokens, "do_sample": False, "pad_token_id": 0}
    mask = torch.ones_like(ids)
    cached = model.generate(ids, attention_mask=mask, **settings)
    recomputed = model.generate(ids, attention_mask=mask, use_cache=False, **settings)
    return (cached != recomputed).float().mean().item()


@torch.no_grad()
def traverse(setting: Setting, rounds: int) -> list[Row]:
    """Traversal takes the time of its visits: two of a question's tokens, or of an answer's.

    A pass over a question makes 2 L layer visits with every token. `generate` reads nothing above
    the last token of the last layer's last visit, so that visit is made with one token. A policy by
    which no token ever goes again is held against the bare host.
    """
    layers, whole = setting.size.layers, setting.size.prompt
    policies = {"fixed": "exit@0", "plain": Plain(), "question": TrolMixer()}
    models = attached(host(setting), {**policies, "all": TrolMixer(scope="all")})
    twice, no_more = "two visits of every token", "the bare host"
    one_pass = Case(
        "question in one pass", "question pass", twice,
        visits("pass", {"pass": 2 * layers}, layers), 1.03,
    )  # fmt: skip
    one_less = visits("prefill", {"prefill": 2 * layers - 1, "decode": 1}, layers)
    every_visit = visits("decode", {"decode": 2 * layers}, layers)
    but_one = f"{twice}, the last one of one token"
    cases = [
        Case("never again prefill", "plain prefill", no_more, 1, 1.02, speed=True),
        Case("never again decode", "plain decode", no_more, 1, 1.02, speed=True),
        Case("question prefill", "question prefill", but_one, one_less, 1.03, speed=True),
        Case("answer decode", "all decode", twice, every_visit, 1.08, speed=True),
    ]
    read = {name: models[name] for name in ("bare", "fixed", "question")}
    times = measured(reading(read, setting.ids(1, whole), "pass"), rounds)
    shapes = [(batch, tokens) for batch, tokens in setting.shapes(1) if tokens == whole]
    return [
        one_pass.row(times, setting, (1, whole)),
        *answered(models, cases, setting, rounds, shapes=shapes, memory_of="question"),
    ]


@torch.no_grad()
def skip(setting: Setting, rounds: int) -> list[Row]:
    """Half of a Llama's layers skipped, evenly spaced.

    A layer that a whole batch skips takes no time: the limit is a host of the layers left. One that
    answers alone skip takes the time of their keys and values: with every layer skipped so, that is
    the fixed part.
    """
    layers = setting.size.deep
    half = static_plan("uniform", layers, 0.5)
    left = sum(half.for_layers(layers))
    policies = {
        "all": Planned(half),
        "answer": Planned(half, scope="answer"),
        "fixed": Planned("exit@0", scope="answer"),
    }
    models = attached(host(setting, layers=layers), policies)
    models["kept"] = host(setting, layers=left)
    fewer, fixed = "a bare host of the layers kept", visits("decode", {"decode": left}, layers)
    others = "fixed part, layers kept, keys and values of the others"
    cases = [
        Case("all prefill", "all prefill", fewer, "kept prefill", 1.05),
        Case("all decode", "all decode", fewer, "kept decode", 1.05),
        Case("answer decode", "answer decode", others, fixed, 1.1),
    ]
    return answered(models, cases, setting, rounds, shapes=setting.shapes(8))


ROWS = 8
"""Rows of the batch in which each row has a plan of its own."""


def row_plans(layers: int) -> list[Plan]:
    """A plan for each row, each keeping its own half of the layers."""
    return [static_plan("random", layers, 0.5, seed) for seed in range(ROWS)]


@torch.no_grad()
def rows(setting: Setting, rounds: int) -> list[Row]:
    """Eight rows by eight plans: each layer takes the time of the rows that visit it.

    The dense executor, which computes every row everywhere, is there for comparison.
    """
    layers, shape = setting.size.layers, (ROWS, setting.size.prompt)
    plans = row_plans(layers)
    counts = Counter(sum(one) for one in zip(*(p.for_layers(layers) for p in plans), strict=True))
    del counts[0]  # layers that no row visits take no time
    bare, dense = host(setting), "own plans, dense"
    models = attached(bare, {"own plans": Planned(plans), dense: Planned(plans)})
    fixed = attach(twin(bare), "exit@0")
    runs = answering({n: models[n] for n in ("own plans", dense)}, setting, setting.ids(*shape))
    for number in sorted({ROWS, *counts}):
        hosts = {f"bare {number}": bare, f"fixed {number}": fixed}
        runs |= answering(hosts, setting, setting.ids(number, setting.size.prompt))
    with executor(models[dense], "dense"):
        times = measured(runs, rounds)
    results, limit = [], "every layer for the rows that visit it"
    for phase in ("prefill", "decode"):
        baseline, by_rows = f"{ROWS} {phase}", {f"{n} {phase}": counts[n] for n in counts}
        limit_ms = visits(baseline, by_rows, layers)
        for name, must in (("own plans", 1.20), (dense, None)):
            case = Case(
                f"{name}, {phase}", f"{name} {phase}", limit, limit_ms, must, f"bare {baseline}"
            )
            results.append(case.row(times, setting, shape))
    return results


AGAIN = {0.5: 0.62, 0.25: 0.48}
"""Share of the tokens that go again -> the most extra time, as a share of all tokens' extra."""

SKIPPING: dict[Literal["project", "hole"], float] = {"hole": 1.15, "project": 1.30}
"""What skipped tokens leave in the cache -> the largest ratio, at half of the tokens."""

CROWDED, AS_DENSE = (0.9, 0.95), 1.05
"""Shares at which leaving tokens out may lose, and how much may be lost."""


@torch.no_grad()
def sparse(setting: Setting, rounds: int) -> list[Row]:
    """Tokens that choose: the time of a pass goes with how many of them visit a layer.

    A random share of the tokens makes a second visit, or any visit at all, another share in each
    layer. What a second visit of a share costs beyond the bare host is held against what it costs
    of all tokens. Where leaving tokens out would lose (nearly all go again, or the host is small),
    the executor that the model takes by itself is held against the dense one.
    """
    bare, tokens, layers = host(setting), setting.size.prompt, setting.size.layers
    counts = {share: round(share * tokens) for share in AGAIN}
    policies: dict[str, AbstractPolicy | str] = {"all again": "all:2"}
    policies |= {f"again {share:g}": RandomTokens(share, visit=2, scope="all") for share in AGAIN}
    policies |= {
        f"skip {left}": RandomTokens(0.5, visit=1, scope="all", skipped_kv=left)
        for left in SKIPPING
    }
    runs = reading(attached(bare, policies), setting.ids(1, tokens), tokens)
    hosts = attached(bare, {"fixed": "exit@0"})
    for number in (tokens, *counts.values()):
        runs |= reading(hosts, setting.ids(1, number), number)
    times = measured(runs, rounds)
    cases, at = [], f"b1 t{tokens}"
    free, extra = "visits made; keys and values of the others free", f"all again {tokens}"
    for share, number in counts.items():
        case, again = f"second visit of {share:.0%} {at}", f"again {share:g} {tokens}"
        limit_ms = visits(tokens, {tokens: layers, number: layers}, layers)
        cases += [
            Case(
                f"{case}, extra time",
                _beyond(again, f"bare {tokens}"),
                "extra time of a second visit of all",
                _beyond(extra, f"bare {tokens}"),
                AGAIN[share],
                f"bare {tokens}",
            ),
            Case(case, again, free, limit_ms),
        ]
    half = visits(tokens, {counts[0.5]: layers}, layers)
    cases += [
        Case(f"50% skipped, {left} {at}", f"skip {left} {tokens}", free, half, must)
        for left, must in SKIPPING.items()
    ]
    results = [case.row(times, setting) for case in cases]
    results += [_as_dense(bare, setting, share, rounds) for share in CROWDED]
    if setting.size.short is not None:
        small = replace(setting, size=TINY)
        # Passes of milliseconds: more rounds cost nothing, and one hiccup is more of each.
        row = _as_dense(host(small), small, 0.5, 5 * rounds)
        results.append({**row, "must": setting.must(AS_DENSE)})
    return results


def _beyond(run: str, plain: str) -> Callable[[Times], list[float]]:
    """What a run takes more than another."""
    return lambda times: [one - bare for one, bare in zip(times[run], times[plain], strict=True)]


def _as_dense(bare: Any, setting: Setting, share: float, rounds: int) -> Row:
    """The executor that the model takes by itself, to the dense one."""
    tokens = setting.size.prompt
    policies = {name: RandomTokens(share, visit=2, scope="all") for name in ("auto", "dense")}
    models = attached(bare, policies)
    with executor(models["dense"], "dense"):
        times = measured(reading(models, setting.ids(1, tokens), "pass"), rounds)
    name = f"second visit of {share:.0%} b1 t{tokens} h{setting.size.hidden}, as dense"
    return Case(name, "auto pass", "the dense executor", "dense pass", AS_DENSE).row(times, setting)


def train(setting: Setting, rounds: int) -> list[Row]:
    """A training step with a second visit for all tokens, to twice the step without."""
    models = attached(host(setting, training=True).train(), {"traversing": TrolMixer()})
    case = Case("all tokens", "traversing step", "2 x the bare step", 2, 1.025)
    whole, results = setting.size.prompt, []
    for shape in ((1, whole), (4, whole // 2)):
        ids = setting.ids(*shape)
        labels = ids.clone()
        labels[:, : shape[1] // 2] = IGNORED_LABEL
        inputs = {"input_ids": ids, "labels": labels}
        runs: Runs = {
            f"{name} step": lambda model=model, inputs=inputs: time_step(model, inputs)
            for name, model in models.items()
        }
        results.append(case.row(measured(runs, rounds), setting, shape))
    return results


DRAFTED = (2, 4, 6)
"""Tokens drafted in a round."""

NEW_TOKENS = 64
PROMPT = 32


@torch.no_grad()
def speculate(setting: Setting, rounds: int) -> list[Row]:
    """Drafts that are always right: how near the loop comes to the passes that it makes.

    The upper layers of the host do next to nothing, so that leaving before them drafts what the
    whole host answers. A round drafts k tokens and verifies them in one pass, which gives k + 1:

        limit = (t_prompt + (N - 1) (k t_draft + t_verify(k + 1)) / (k + 1)) / N

    milliseconds of each of an answer's N tokens, where t_draft is one decoding step of the host
    that leaves early, and t_prompt and t_verify(k + 1) are passes of the whole host, over the
    prompt and over k + 1 tokens behind it. Being faster than plain decoding is a row of its own.
    """
    model, early = idle_host(setting), f"exit@{working_layers(setting)}"
    draft, ids = attach(twin(model), early), setting.ids(1, PROMPT)
    answers: dict[int, torch.Tensor] = {}
    cache = DynamicCache(config=model.config)
    model(ids, **{CACHE: cache})

    def plain(drafted: int = 0) -> float:
        """Milliseconds of each token of one answer."""
        lengths = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS}
        began = now(ids.device)
        answers[drafted] = model.generate(ids, pad_token_id=0, do_sample=False, **lengths)
        return 1000 * (now(ids.device) - began) / NEW_TOKENS

    def speculative(tokens: int) -> float:
        with drafting(model, early, tokens=tokens):
            return plain(tokens)

    def verified(tokens: int) -> float:
        behind = setting.ids(1, tokens + 1)
        return time_forward(model, behind, copy.deepcopy(cache), head=True)

    runs: Runs = {
        "plain": plain,
        "draft": lambda: time_generate(draft, {"input_ids": ids}, 16).decode,
        "prompt": lambda: time_forward(model, ids, head=True),
    }
    cases: list[Case] = []
    for tokens in DRAFTED:
        run, case = f"{tokens}", f"{tokens} tokens a round"
        runs[run] = lambda tokens=tokens: speculative(tokens)
        runs[f"verify {tokens}"] = lambda tokens=tokens: verified(tokens)
        limit = f"{tokens} early exits and a pass over {tokens + 1}"
        cases += [
            Case(case, run, "plain decoding", 1, 1.0, "plain"),
            Case(f"{case}, passes", run, limit, _round_of_drafts(tokens), baseline="plain"),
        ]
    times = measured(runs, rounds)
    unlike = max((answers[0] != answers[k]).float().mean().item() for k in DRAFTED)
    # Narrower types round differently in passes of other lengths.
    exact = 0.0 if setting.dtype == "float32" else None
    identical = figure("share of tokens unlike plain decoding", unlike, "no token", exact)
    return [*(case.row(times, setting) for case in cases), identical]


def _round_of_drafts(tokens: int) -> Callable[[Times], list[float]]:
    """The limit of an answer that is drafted `tokens` tokens at a time."""

    def limits(times: Times) -> list[float]:
        parts = zip(times["prompt"], times["draft"], times[f"verify {tokens}"], strict=True)
        return [
            (prompt + (NEW_TOKENS - 1) * (tokens * draft + verify) / (tokens + 1)) / NEW_TOKENS
            for prompt, draft, verify in parts
        ]

    return limits
