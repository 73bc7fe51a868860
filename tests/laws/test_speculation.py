"""Speculation gives what `generate` gives without it, whatever drafts."""

import threading
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
    StaticCache,
    StoppingCriteriaList,
    TextStreamer,
)

from hosts import HOSTS, Host
from hosts.host import PAD
from trol import depth, speculate
from trol.depth import Plan, attached, detach, is_attached, trace
from trol.errors import HostError, UsageError
from trol.family import TrolForConditionalGeneration, tiny
from trol.policies.mixer import TrolMixer
from trol.policies.planned import Planned

from .subjects import attach_settled, gap, made, some_hosts

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
NEW = 10


def settled(host: Host, name: str | None) -> Any:
    """The host with the policy of this name, or bare."""
    return attach_settled(host.build(), made(name)) if name else host.build()


def greedily(model: Any, inputs: Any, **settings: Any) -> Any:
    """Greedy `generate` with everything that it returns."""
    told = {"max_new_tokens": NEW, "do_sample": False, "return_dict_in_generate": True}
    told |= {"output_logits": True, "output_scores": True}
    return model.generate(**inputs, **told | settings)


def padded(host: Host) -> dict[str, Any]:
    """Three rows of different lengths; positions are left to `generate`."""
    batch = host.left_padded().batch
    return {name: value for name, value in batch.items() if name != "position_ids"}


def assert_equal(got: Any, wanted: Any, exact: float) -> None:
    """The same tokens, logits and scores, and a cache of the same length."""
    assert got.sequences.tolist() == wanted.sequences.tolist()
    for name in ("logits", "scores"):
        given, expected = (torch.stack(getattr(out, name), 1) for out in (got, wanted))
        finite = expected > -torch.inf
        assert gap(given[finite], expected[finite]) <= exact
    lengths = [int(out.past_key_values.get_seq_length()) for out in (got, wanted)]
    assert lengths[0] == lengths[1]


@pytest.mark.parametrize(("host", "name"), CASES)
def test_greedy_tokens_are_those_of_generate(host: Host, name: str | None) -> None:
    """Rows end at different times, and every row's logits are those it has without drafts."""
    model, inputs = settled(host, name), padded(host)
    free = greedily(model, inputs)
    ends = [int(free.sequences[row, -NEW:][3 + 3 * row]) for row in range(2)]
    wanted = greedily(model, inputs, eos_token_id=ends)
    assert (wanted.sequences[:, -1] == PAD).any() or wanted.sequences.shape[1] < NEW + 9
    for draft in ("exit@1", "0 3"):
        with speculate(model, draft, tokens=3) as spoken:
            got = greedily(model, inputs, eos_token_id=ends)
        assert_equal(got, wanted, 2 * host.default_exact)
        assert 0 <= spoken.accepted <= spoken.drafted
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
    with speculate(model, made(name) if name else "all", tokens=3) as spoken:
        model.generate(**inputs, max_new_tokens=13, do_sample=False)
    assert spoken.acceptance == 1
    assert (spoken.rounds, spoken.tokens_per_round, spoken.drafted) == (3, 4, 18)


def test_a_draft_that_is_always_wrong_costs_a_pass_for_each_token() -> None:
    """The draft's head is turned round: its best token is the model's worst."""
    model, inputs = settled(HOSTS["llama"], None), HOSTS["llama"].inputs()
    wanted = model.generate(**inputs, max_new_tokens=9, do_sample=False)
    with speculate(model, "exit@3", tokens=2) as spoken:
        handle = model.lm_head.register_forward_hook(_turned(model))
        got = model.generate(**inputs, max_new_tokens=9, do_sample=False)
        handle.remove()
    assert got.tolist() == wanted.tolist()
    assert (spoken.accepted, spoken.rounds, spoken.tokens_per_round) == (0, 8, 1)


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
            run = partial(greedily, model, {"input_ids": ids}, past_key_values=cache)
            if draft is None:
                out = run()
            else:
                with speculate(model, draft, tokens=3):
                    out = run()
            assert out.past_key_values is cache
            ids = torch.cat([out.sequences, inputs["input_ids"][:, :4]], 1)
        assert not any(getattr(slot, "record_past", False) for slot in cache.layers)
        turns.append(out)
    assert_equal(turns[1], turns[0], 2 * host.default_exact)


def test_confidence_ends_drafts_early() -> None:
    model, inputs = settled(HOSTS["llama"], "trol"), padded(HOSTS["llama"])
    wanted = greedily(model, inputs)
    counts = {}
    for confidence in (None, 0.0, 0.3, 0.99):
        with speculate(model, "0-2", tokens=5, confidence=confidence) as spoken:
            assert_equal(greedily(model, inputs), wanted, 1e-4)
        counts[confidence] = spoken.drafted / spoken.rounds
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
    with speculate(model, "exit@2", tokens=chunk) as spoken:
        drawn = model.generate(**many, **draw)[:, -4:-1]
    assert 0.02 < spoken.acceptance < 0.98
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


def test_the_trol_family() -> None:
    """Images in the prompt, the family's own gates, an early exit as the draft."""
    torch.manual_seed(0)
    config = tiny(60, hidden_size=32, layers=4)
    model: Any = TrolForConditionalGeneration(config).eval()
    side = config.vision_config.image_size
    marks = [config.image_token_id] * config.tokens_per_image
    ids = torch.tensor([[5, 6, *marks, 7, 8], [9, 10, *marks, 11, 12]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    inputs["attention_mask"][1, 0] = 0
    inputs["pixel_values"] = torch.randn(2, 3, side, side)
    run = partial(model.generate, **inputs, max_new_tokens=10, do_sample=False, pad_token_id=0)
    wanted = run()
    for draft in ("exit@2", "0 2", TrolMixer()):
        with speculate(model, draft, tokens=3) as spoken:
            assert run().tolist() == wanted.tolist()
        assert spoken.rounds


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_rope_that_changes_with_the_length(kind: str) -> None:
    """Rounds keep clear of the length at which plain steps would rotate otherwise."""
    host = HOSTS["phi3" if kind == "longrope" else "llama"]
    config: Any = host.config()
    rope: dict[str, Any] = {"rope_type": kind, "rope_theta": 10000.0}
    if kind == "longrope":
        config.original_max_position_embeddings = 16
        rope |= {"short_factor": [1.0] * 4, "long_factor": [3.0] * 4}
        rope["original_max_position_embeddings"] = 16
    else:
        config.max_position_embeddings = 16
        rope["factor"] = 4.0
    config.rope_parameters = rope
    model = type(host.build())(config).eval()
    model.load_state_dict(host.build().state_dict())
    model.generation_config.pad_token_id = PAD
    model.generation_config.eos_token_id = None
    inputs = host.inputs()
    run = partial(greedily, model, inputs, max_new_tokens=20)
    wanted = run()
    with speculate(model, "all", tokens=4) as spoken:
        assert_equal(run(), wanted, 1e-4)
    assert 0 < spoken.drafted < 4 * spoken.rounds


def test_another_policy_for_a_while() -> None:
    """`trol.depth` inside the block changes what verifies, not what drafts; traces see both."""
    model, inputs = settled(HOSTS["llama"], "trol"), HOSTS["llama"].inputs()
    with depth(model, "0-2"):
        wanted = greedily(model, inputs)
    with speculate(model, "exit@1", tokens=2), depth(model, "0-2"), trace(model) as seen:
        got = greedily(model, inputs)
    assert_equal(got, wanted, 1e-4)
    visited = seen.visits.sum(-1).squeeze()
    assert visited[0] > visited[1] == visited[2] > visited[3] == 0


def test_threads_draft_for_themselves() -> None:
    model, inputs = settled(HOSTS["llama"], "trol"), HOSTS["llama"].inputs(length=12)
    wanted = model.generate(**inputs, max_new_tokens=8, do_sample=False).tolist()
    wrong, rounds, start = [], [], threading.Barrier(3)

    def work(draft: str | None) -> None:
        torch.set_grad_enabled(False)
        start.wait()
        for _ in range(8):
            with speculate(model, draft or "all") as spoken:
                if model.generate(**inputs, max_new_tokens=8, do_sample=False).tolist() != wanted:
                    wrong.append(draft)
            rounds.append(spoken.rounds)

    drafts = ("exit@1", "0 3", "all")
    threads = [threading.Thread(target=work, args=(draft,)) for draft in drafts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert len(rounds) == 24
    assert len(set(rounds)) > 1


def test_an_exception_leaves_the_model_as_it_was() -> None:
    model, inputs = settled(HOSTS["llama"], "trol"), HOSTS["llama"].inputs()
    wanted = greedily(model, inputs)
    bare = HOSTS["llama"].build()
    for one in (model, bare):
        with pytest.raises(ZeroDivisionError), speculate(one, "exit@1"):
            one.generate(**inputs, max_new_tokens=9, stopping_criteria=[_Failing()])
    assert not is_attached(bare)
    assert_equal(greedily(model, inputs), wanted, 0)
    assert is_attached(detach(model)) is False


class _Failing:
    def __call__(self, ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        return torch.tensor([ids.shape[1] / (13 - ids.shape[1]) < 0])


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "beams": ({"num_beams": 2}, "num_beams=1"),
    "no_cache": ({"use_cache": False}, "use_cache"),
    "static": ({"cache_implementation": "static"}, "dynamic cache"),
    "states": ({"output_hidden_states": True, "return_dict_in_generate": True}, "hidden_states"),
    "lookup": ({"prompt_lookup_num_tokens": 2}, "assisted"),
    "strings": ({"stop_strings": "x"}, "StopStringCriteria"),
    "another": ({"custom_generate": print}, "drop one"),
    "guidance": ({"guidance_scale": 2.0}, "exactly once"),
    "synced": ({"synced_gpus": True}, "ranks"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_drafted_is_refused(case: str) -> None:
    model, inputs = HOSTS["llama"].build(), HOSTS["llama"].inputs()
    settings, told = REFUSED[case]
    with (
        speculate(model, "exit@1") as spoken,
        pytest.raises((UsageError, HostError), match=told),
    ):
        model.generate(**inputs, max_new_tokens=4, **settings)
    assert spoken.rounds == 0


@pytest.mark.parametrize(
    ("draft", "settings", "told"),
    [
        ("exit@9", {}, "4 layers"),
        (Plan([1] * 6), {}, "4 layers"),
        ("exit@1", {"tokens": 0}, "at least 1"),
        ("exit@1", {"tokens": 1.5}, "tokens is 1.5; draft a whole number"),
        ("exit@1", {"confidence": 1.5}, "confidence"),
        ("trol_mixer", {}, "parameters"),
        ("nothing", {}, "unknown policy"),
    ],
)
def test_a_draft_that_does_not_fit_is_refused(
    draft: Any, settings: dict[str, Any], told: str
) -> None:
    model = HOSTS["llama"].build()
    with pytest.raises(UsageError, match=told), speculate(model, draft, **settings):
        pass
    assert not is_attached(model)


def test_layers_that_the_model_never_runs_cannot_draft() -> None:
    model, inputs = settled(HOSTS["llama"], "skip"), HOSTS["llama"].inputs()
    with speculate(model, "exit@2"), pytest.raises(UsageError, match=r"visits layers \[1\]"):
        model.generate(**inputs, max_new_tokens=4)


@pytest.mark.parametrize("host", some_hosts("qwen3_next", "falcon_h1"))
def test_recurrent_hosts_are_refused(host: Host) -> None:
    model = host.build()
    with pytest.raises(HostError, match="recurrent state"), speculate(model, "exit@1"):
        pass
    assert not is_attached(model)


def test_a_cache_that_cannot_be_cut_is_refused() -> None:
    model, inputs = HOSTS["llama"].build(), HOSTS["llama"].inputs()
    static = StaticCache(config=model.config, max_cache_len=40)
    with speculate(model, "exit@1"), pytest.raises(HostError, match="StaticCache"):
        model.generate(**inputs, max_new_tokens=4, past_key_values=static)
