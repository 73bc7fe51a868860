"""Speculation gives what `generate` gives without it, whatever drafts."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from transformers import (
    DynamicCache,
    LogitsProcessor,
    LogitsProcessorList,
    MaxLengthCriteria,
    StoppingCriteriaList,
    TextStreamer,
)

from hosts import HOSTS, Host
from hosts.host import PAD
from trol import depth, speculate
from trol.depth import attached, is_attached
from trol.host.names import CACHE
from trol.policies.planned import Planned

from .drafting import NEW, assert_equal, greedily, padded, settled
from .subjects import made, some_hosts

pytestmark = pytest.mark.usefixtures("no_grad")

SPECULATIVE = ("llama", "mistral", "gemma3", "gpt2", "opt", "llava", "qwen3_vl")
"""Plain, sliding, learned positions with and without an offset, images, positions in three axes."""

OWN = (None, "trol", "trol_all", "skip", "hole_answer")
"""What the model itself does: nothing, planes (of the prompt, of all), absent layers, holes."""

CASES = [
    pytest.param(HOSTS[host], name, id=f"{host}-{name}")
    for host in SPECULATIVE
    for name in (OWN if host in ("llama", "gemma3") else OWN[:2])
]


@pytest.mark.parametrize(("host", "name"), CASES)
def test_greedy_tokens_are_those_of_generate(host: Host, name: str | None) -> None:
    """Rows end at different times, and every row's logits are those it has without drafts."""
    model, inputs = settled(host, name), padded(host)
    free = greedily(model, inputs)
    ends = [int(free.sequences[row, -NEW:][3 + 3 * row]) for row in range(2)]
    wanted = greedily(model, inputs, eos_token_id=ends)
    assert (wanted.sequences[:, -1] == PAD).any() or wanted.sequences.shape[1] < NEW + 9
    for draft in ("exit@1", "0 3"):
        with speculate(model, draft, tokens=3) as stats:
            got = greedily(model, inputs, eos_token_id=ends)
        assert_equal(got, wanted, 2 * host.default_exact)
        assert 0 <= stats.accepted <= stats.drafted
    with speculate(model, "0 2-3", tokens=4):
        assert_equal(greedily(model, inputs), free, 2 * host.default_exact)
    assert is_attached(model) == (name is not None)


@pytest.mark.parametrize("host", some_hosts("llama", "gemma3", "llava"))
def test_many_prompts(host: Host) -> None:
    """Short and long prompts, small and large batches, all draft lengths."""
    model = settled(host, "trol")
    for seed in range(10):
        inputs = host.inputs(batch=1 + seed % 4, length=3 + seed % 11, seed=seed)
        run = partial(model.generate, **inputs, max_new_tokens=6 + seed % 7, do_sample=False)
        wanted = run()
        with speculate(model, ("exit@2", "0 3", "1-3")[seed % 3], tokens=1 + seed % 6):
            assert run().tolist() == wanted.tolist()


def test_two_hundred_prompts() -> None:
    host = HOSTS["llama"]
    model = settled(host, None)
    for seed in range(8):
        inputs = host.inputs(batch=25, length=3 + seed, seed=seed)
        run = partial(model.generate, **inputs, max_new_tokens=9, do_sample=False)
        wanted = run().tolist()
        with speculate(model, "0 2-3", tokens=3):
            assert run().tolist() == wanted


@pytest.mark.parametrize("name", [None, "trol", "trol_all", "hole_answer"])
def test_a_draft_that_is_the_model_is_always_right(name: str | None) -> None:
    """k + 1 tokens a round, in every row."""
    model, inputs = settled(HOSTS["llama"], name), HOSTS["llama"].inputs(batch=2)
    with speculate(model, made(name) if name else "all", tokens=3) as stats:
        model.generate(**inputs, max_new_tokens=13, do_sample=False)
    assert stats.acceptance == 1
    assert (stats.rounds, stats.tokens_per_round, stats.drafted) == (3, 4, 18)


def test_a_draft_that_is_always_wrong_costs_a_pass_for_each_token() -> None:
    """The draft's head is turned round: its best token is the model's worst."""
    model, inputs = settled(HOSTS["llama"], None), HOSTS["llama"].inputs()
    wanted = model.generate(**inputs, max_new_tokens=9, do_sample=False)
    with speculate(model, "exit@3", tokens=2) as stats:
        handle = model.lm_head.register_forward_hook(_turned(model))
        got = model.generate(**inputs, max_new_tokens=9, do_sample=False)
        handle.remove()
    assert got.tolist() == wanted.tolist()
    assert (stats.accepted, stats.rounds, stats.tokens_per_round) == (0, 8, 1)


def _turned(model: Any) -> Callable[..., Any]:
    _, stack = attached(model)

    def hook(_head: Any, _args: Any, out: torch.Tensor) -> torch.Tensor:
        drafting = stack.depth_policy_in_force() == Planned("exit@3")
        return -out if drafting else out

    return hook


@pytest.mark.parametrize("host", some_hosts("llama", "gemma3"))
@pytest.mark.parametrize(
    "settings",
    [
        {"repetition_penalty": 1.7},
        {"min_new_tokens": 9, "eos_token_id": list(range(3, 40))},
        {"no_repeat_ngram_size": 2, "bad_words_ids": [[7], [9, 11]]},
        {"prefill_chunk_size": 4},
        {"max_new_tokens": 1},
        {"max_new_tokens": 2},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_settings_of_generate(host: Host, settings: dict[str, Any]) -> None:
    """Each position's processors see the tokens before it, and those only."""
    model, inputs = settled(host, "trol"), padded(host)
    wanted = greedily(model, inputs, **settings)
    with speculate(model, "0 3", tokens=4):
        assert_equal(greedily(model, inputs, **settings), wanted, 2 * host.default_exact)


def test_processors_and_criteria_of_the_caller() -> None:
    """A criterion is asked once for each token given, in order, and may end single rows."""
    model, inputs = settled(HOSTS["llama"], None), padded(HOSTS["llama"])
    runs = []
    for drafted in (False, True):
        noted = _Noted()
        told = {"logits_processor": LogitsProcessorList([_Even()])}
        told["stopping_criteria"] = StoppingCriteriaList([noted, MaxLengthCriteria(19)])
        with speculate(model, "exit@3", tokens=3) if drafted else depth(model, "all"):
            tokens = model.generate(**inputs, max_new_tokens=30, do_sample=False, **told)
        runs.append((tokens.tolist(), noted.lengths))
    assert runs[0] == runs[1]
    assert len(runs[0][1]) == 10


class _Even(LogitsProcessor):
    """Forbids a token of the same parity as the last."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        same = torch.arange(scores.shape[1]) % 2 == input_ids[:, -1:] % 2
        return scores.masked_fill(same, -torch.inf)


class _Noted:
    """Notes the lengths it saw; row 1 is done after two tokens, but goes on until all are."""

    def __init__(self) -> None:
        self.lengths: list[int] = []

    def __call__(self, ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        self.lengths.append(ids.shape[1])
        done = torch.zeros(len(ids), dtype=torch.bool)
        done[1] = ids.shape[1] >= 11
        return done


@pytest.mark.parametrize("name", [None, "trol"])
@pytest.mark.parametrize("host", some_hosts("llama", "gemma3"))
def test_the_cache_goes_on(host: Host, name: str | None) -> None:
    """A second turn on the returned cache is a second turn on the cache of plain `generate`."""
    model, inputs = settled(host, name), host.inputs(batch=2)
    turns = []
    for draft in (None, "exit@2"):
        cache, ids = DynamicCache(config=model.config), inputs["input_ids"]
        for _ in range(2):
            run = partial(greedily, model, {"input_ids": ids}, **{CACHE: cache})
            if draft is None:
                out = run()
            else:
                with speculate(model, draft, tokens=3):
                    out = run()
            assert out[CACHE] is cache
            ids = torch.cat([out.sequences, inputs["input_ids"][:, :4]], 1)
        assert not any(getattr(slot, "record_past", False) for slot in cache.layers)
        turns.append(out)
    assert_equal(turns[1], turns[0], 2 * host.default_exact)


def test_confidence_ends_drafts_early() -> None:
    model, inputs = settled(HOSTS["llama"], "trol"), padded(HOSTS["llama"])
    wanted = greedily(model, inputs)
    counts = {}
    for confidence in (None, 0.0, 0.3, 0.99):
        with speculate(model, "0-2", tokens=5, confidence=confidence) as stats:
            assert_equal(greedily(model, inputs), wanted, 1e-4)
        counts[confidence] = stats.drafted / stats.rounds
    assert counts[None] == counts[0.0] > counts[0.3] >= counts[0.99]


def test_streams_the_same_text(capsys: pytest.CaptureFixture[str]) -> None:
    model, inputs = settled(HOSTS["llama"], None), HOSTS["llama"].inputs()
    said = []
    for draft in (None, "exit@2"):
        streamer: Any = TextStreamer(_Letters(), skip_prompt=True)  # type: ignore[arg-type]
        run = partial(model.generate, **inputs, max_new_tokens=9, do_sample=False)
        if draft is None:
            run(streamer=streamer)
        else:
            with speculate(model, draft):
                run(streamer=streamer)
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] != ""


class _Letters:
    def decode(self, tokens: Any, **_: Any) -> str:
        return " ".join(str(int(token)) for token in tokens) + " "


@pytest.mark.parametrize("chunk", [1, 4])
def test_samples_have_the_models_distribution(chunk: int) -> None:
    """Chi-square of the first three tokens, drafted badly, against the model's own chances."""
    model = settled(HOSTS["llama"], "trol")
    inputs = HOSTS["llama"].inputs(length=5)
    draw = {"do_sample": True, "top_k": 4, "temperature": 1.5, "max_new_tokens": 4}
    rows = 1500
    many = {name: value.repeat(rows, 1) for name, value in inputs.items()}
    torch.manual_seed(11)
    with speculate(model, "exit@2", tokens=chunk) as stats:
        drawn = model.generate(**many, **draw)[:, -4:-1]
    assert 0.02 < stats.acceptance < 0.98
    chances = _chances(model, inputs, 1.5, 4)
    statistic, cells = 0.0, 0
    found = dict.fromkeys(chances, 0)
    for row in drawn.tolist():
        found[tuple(row)] += 1  # KeyError: the model can never say this
    for said, chance in chances.items():
        if rows * chance >= 5:
            statistic += (found[said] - rows * chance) ** 2 / (rows * chance)
            cells += 1
    assert cells > 20
    assert statistic < cells + 3.5 * (2 * cells) ** 0.5  # 3.5 standard deviations


def _chances(model: Any, inputs: Any, temperature: float, top: int) -> dict[tuple[int, ...], float]:
    """The chance of each three tokens, from whole passes without a cache."""
    found: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(3):
        longer = {}
        for said, chance in found.items():
            ids = torch.cat([inputs["input_ids"], torch.tensor([said]).long()], 1)
            masks = torch.zeros_like(ids)
            masks[:, inputs["input_ids"].shape[1] :] = 1
            logits = model(input_ids=ids, assistant_masks=masks, use_cache=False).logits[0, -1]
            best = (logits / temperature).topk(top)
            for token, p in zip(
                best.indices.tolist(), best.values.softmax(0).tolist(), strict=True
            ):
                longer[(*said, token)] = chance * p
        found = longer
    return found


def test_samples_repeat_with_a_seed() -> None:
    model, inputs = settled(HOSTS["llama"], None), padded(HOSTS["llama"])
    drawn = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        with speculate(model, "exit@2"):
            out = model.generate(**inputs, do_sample=True, max_new_tokens=9, num_return_sequences=2)
        drawn.append(out.tolist())
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(drawn[0]) == 6


class Grammar(LogitsProcessor):
    """Which fifth of the words may follow hangs on all tokens that it was shown so far."""

    def __init__(self) -> None:
        self.seen, self.state = None, 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.seen = input_ids.shape[1] if self.seen is None else self.seen
        for column in range(self.seen, input_ids.shape[1]):
            self.state = (3 * self.state + 1 + int(input_ids[:, column].sum())) % 5
        self.seen = max(self.seen, input_ids.shape[1])
        barred = torch.arange(scores.shape[-1]) % 5 == self.state
        return scores.masked_fill(barred, float("-inf"))


def asks_grammar() -> dict[str, Any]:
    return {"logits_processor": [Grammar()]}


def asks_function() -> dict[str, Any]:
    calls: list[int] = []

    def allowed(row: int, ids: torch.Tensor) -> list[int]:
        calls.append(row)
        return [t for t in range(3, 60) if t % 4 != len(calls) % 4]

    return {"prefix_allowed_tokens_fn": allowed}


@pytest.mark.parametrize("asks", [asks_grammar, asks_function])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("name", [None, "trol", "skip"])
def test_processors_with_a_state_see_every_token_once(
    name: str | None, rows: int, asks: Callable[[], dict[str, Any]]
) -> None:
    """In order, and none that does not stand: in greedy decoding, where rows end apart as well."""
    host = HOSTS["llama"]
    model, ids = settled(host, name), host.inputs(batch=rows, length=9)["input_ids"]
    free = greedily(model, {"input_ids": ids}, **asks())
    ends = [int(row[-NEW + 2 + 2 * i]) for i, row in enumerate(free.sequences)]
    for end in (None, ends):
        wanted = greedily(model, {"input_ids": ids}, eos_token_id=end, **asks())
        for draft in ("0 2", "0 3"):
            with speculate(model, draft, tokens=3) as stats:
                got = greedily(model, {"input_ids": ids}, eos_token_id=end, **asks())
            assert got.sequences.tolist() == wanted.sequences.tolist()
            assert 0 <= stats.accepted <= stats.drafted
