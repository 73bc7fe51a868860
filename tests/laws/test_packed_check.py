"""Layers whose tokens cannot be packed are found out; what is found is remembered, not shared."""

import copy
import io
import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel, PreTrainedModel

from hosts import HOSTS, Host
from hosts.text import COMMON, GATED
from trol.depth import attach, attached, detach, executor, selection, sides, spared
from trol.depth.pace import Pace
from trol.host import layers
from trol.host.names import CACHE
from trol.policies.planned import Planned
from trol.policies.random_tokens import RandomTokens

from .subjects import attach_settled, gap, layers_of, made, some_hosts

pytestmark = pytest.mark.usefixtures("no_grad")

TWICE = RandomTokens(0.5)
SELF_MADE = {
    "gpt_neo": COMMON
    | {"num_layers": 4, "attention_types": [[["global", "local"], 2]], "window_size": 6}
    | {"resid_dropout": 0.0, "embed_dropout": 0.0, "attention_dropout": 0.0},
    "llama4_text": GATED
    | {"num_hidden_layers": 4, "head_dim": 8, "intermediate_size_mlp": 48, "num_local_experts": 2}
    | {"no_rope_layers": [1, 0, 1, 0], "attn_temperature_tuning": True, "floor_scale": 4},
}
"""Families that make masks or positions of their own; the second with its tuning in reach."""


def self_made(name: str) -> PreTrainedModel:
    config = AutoConfig.for_model(name, **SELF_MADE[name])
    model = AutoModel.from_config(config, attn_implementation="eager").eval()
    source = torch.Generator().manual_seed(0)
    for weight in model.parameters():
        weight.copy_(torch.randn(weight.shape, generator=source) * 1.2 / weight.shape[-1] ** 0.5)
    return model


def states(model: PreTrainedModel) -> Tensor:
    """What two rows of 12 tokens leave the decoder as. Shape: [2, 12, D]."""
    return model(**HOSTS["llama"].inputs(batch=2, length=12)).last_hidden_state


def entered(model: PreTrainedModel) -> list[int]:
    """Notes how many tokens enter layer 1 by each call."""
    counts: list[int] = []
    last = getattr(layers_of(model)[1], "mlp", None) or layers_of(model)[1].feed_forward
    last.register_forward_pre_hook(lambda _m, args: counts.append(args[0].numel() // 32))
    return counts


@pytest.fixture
def no_table(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Families whose table does not say that they must stay dense."""
    for name in SELF_MADE:
        quirk = replace(layers.QUIRKS[name], dense="")
        monkeypatch.setitem(layers.QUIRKS, name, quirk)
    return


@pytest.mark.parametrize("name", SELF_MADE)
def test_a_family_of_the_table_stays_dense(name: str) -> None:
    model = attach(self_made(name), TWICE)
    with executor(model, "dense"):
        expected = states(model)
    counts = entered(model)
    with executor(model, "packed"):
        assert torch.equal(states(model), expected)
    assert counts == [24, 24]
    assert not attached(model)[1].depth_verdicts


@pytest.mark.parametrize("name", SELF_MADE)
def test_a_family_that_the_table_lacks_is_found_out(name: str, no_table: None) -> None:
    """It warns once, by name; the numbers are the dense executor's from the first call on.

    In both, only every other layer goes wrong, and they are of one class.
    """
    model = attach(self_made(name), TWICE)
    layer = type(layers_of(model)[0]).__name__
    with executor(model, "dense"):
        expected = states(model)
    with executor(model, "packed"):
        with pytest.warns(UserWarning, match=f"some tokens of {layer} alone give other") as said:
            assert gap(states(model), expected) <= 5e-5
        assert len(said) == 1
        counts = entered(model)
        assert gap(states(model), expected) <= 5e-5
        assert counts == [24, 24]


def test_verdicts_end_with_the_attachment(no_table: None) -> None:
    """Whoever changes a layer attaches again, and it is looked at again."""
    model = attach(self_made("gpt_neo"), TWICE)
    with executor(model, "packed"), pytest.warns(UserWarning, match="GPTNeoBlock"):
        states(model)
    assert False in attached(model)[1].depth_verdicts.values()
    detach(model)
    assert not hasattr(model, "depth_verdicts")
    attach(model, TWICE)
    assert not attached(model)[1].depth_verdicts
    with executor(model, "packed"), pytest.warns(UserWarning, match="GPTNeoBlock"):
        states(model)


def test_each_layer_is_compared_once_for_each_kind_of_call() -> None:
    """One comparison for tokens without a mask, and one with."""
    model = attach(HOSTS["llama"].build("sdpa"), TWICE)
    verdicts = attached(model)[1].depth_verdicts
    alone, padded = HOSTS["llama"].inputs(), HOSTS["llama"].left_padded().batch
    with executor(model, "packed"):
        for inputs in (alone, alone, padded, padded):
            model(**inputs, use_cache=False)
    kinds = [(kind[0], *kind[3:]) for kind in verdicts if isinstance(kind, tuple)]
    assert sorted(kinds) == [(i, True, alone) for i in range(4) for alone in (False, True)]


@pytest.mark.parametrize("hidden", [[0], [0, 1], [0, 1, 2]])
def test_padding_does_not_speak_in_a_comparison(hidden: list[int]) -> None:
    """With all its keys masked it averages whatever is there, which packing leaves out."""
    host = HOSTS["llama"]
    model = attach(host.build("eager"), RandomTokens(0.6, visit=1, skipped_kv="hole"))
    inputs = host.inputs(batch=2)
    inputs["attention_mask"][1, hidden] = 0
    real = inputs["attention_mask"].bool()
    with executor(model, "dense"):
        expected = model(**inputs).logits[real]
    with executor(model, "packed"):  # a warning would be an error
        for _ in range(2):
            assert gap(model(**inputs).logits[real], expected) <= host.default_exact
    assert set(attached(model)[1].depth_verdicts.values()) == {True}


def test_a_model_in_training_mode_is_not_compared() -> None:
    """Dropout draws for all tokens of a call: fewer tokens, other numbers."""
    model = HOSTS["gpt2"].build()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.2
    model = attach(model.train(), TWICE)
    inputs, logits = HOSTS["gpt2"].inputs(), []
    for who in ("dense", "packed"):
        torch.manual_seed(0)
        with executor(model, who):
            logits.append(model(**inputs).logits)
    assert torch.equal(*logits)
    assert not attached(model)[1].depth_verdicts


def test_a_model_that_has_packed_is_copied_and_pickled() -> None:
    host = HOSTS["llama"]
    model, inputs = attach(host.build(), TWICE), host.inputs(batch=2)
    with executor(model, "packed"):
        expected = model(**inputs).logits
    assert attached(model)[1].depth_verdicts
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for twin in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        with executor(twin, "packed"):
            assert gap(twin(**inputs).logits, expected) <= host.default_exact


def test_queries_of_those_who_leave_keys_are_not_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where that saves time: their product is zeros, other callers' is not."""
    monkeypatch.setattr("trol.depth.packed.pace_of", lambda *_: Pace(1.0, 0.0))
    host = HOSTS["llama"]
    model, inputs = attach_settled(host.build(), made("some_skip")), host.inputs(batch=2)
    queries: list[Tensor] = []
    attention = layers_of(model)[2].self_attn
    own = attention.q_proj.forward
    attention.q_proj.forward = lambda x: (
        own(x) + 0 * torch.nn.functional.linear(x, weight=attention.q_proj.weight)
    )
    attention.q_proj.register_forward_hook(lambda _m, _a, out: queries.append(out))
    with executor(model, "dense"):
        expected = model(**inputs).logits
    with executor(model, "packed"):
        model(**inputs)
        queries.clear()
        assert gap(model(**inputs).logits, expected) <= host.default_exact
    assert sorted(bool(made.any()) for made in queries) == [False, True]


def test_threads_with_other_executors_do_not_mix() -> None:
    """Two threads on one model: each has its own executor, and both the same numbers."""
    host = HOSTS["llama"]
    model, inputs = attach(host.build(), TWICE), host.inputs(batch=2)
    with executor(model, "packed"):
        expected = model(**inputs, use_cache=False).logits
    counts: dict[str, set[int]] = {"dense": set(), "packed": set()}
    apart: list[float] = []
    mine = threading.local()
    layers_of(model)[1].mlp.register_forward_pre_hook(
        lambda _m, args: counts[mine.who].add(args[0].shape[:2].numel())
    )
    meeting = threading.Barrier(2)

    def work(who: str) -> None:
        mine.who = who
        with torch.no_grad(), executor(model, who):  # type: ignore[arg-type]
            for _ in range(20):
                meeting.wait(60)
                apart.append(gap(model(**inputs, use_cache=False).logits, expected))

    threads = [threading.Thread(target=work, args=(who,)) for who in counts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(apart) == 40
    assert max(apart) <= host.default_exact
    assert counts["dense"] == {18}
    assert len(counts["packed"]) == 2
    assert min(counts["packed"]) < 18


def test_executors_nest_and_end() -> None:
    host = HOSTS["llama"]
    model, inputs = attach(host.build(), Planned(["0 1", "2 3"])), host.inputs(batch=2)
    counts = entered(model)
    with executor(model, "packed"):
        model(**inputs, use_cache=False)
        counts.clear()
        with executor(model, "dense"):
            model(**inputs, use_cache=False)
        model(**inputs, use_cache=False)
    model(**inputs, use_cache=False)
    assert counts == [18, 9, 18]


@pytest.mark.parametrize("host", some_hosts("llama", "gpt2", "phi3", "qwen3_moe", "gemma3"))
def test_queries_attend_within_their_reach(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """In stretches of tokens, of which none sees keys behind its last position; in chunks too."""
    own, seen = spared._in_stretches, []

    def noted(query: Tensor, key: Tensor, value: Tensor, **named: Any) -> Tensor:
        seen.append(named["attn_mask"].reach)
        return own(query, key, value, **named)

    monkeypatch.setattr(spared, "_in_stretches", noted)
    for room in (selection, spared):
        monkeypatch.setattr(room, "STRETCH", 4)
    monkeypatch.setattr(sides, "pace_of", lambda *_: Pace(1.0, 0.0))
    model = attach(host.build("sdpa"), RandomTokens(0.7, scope="all"))
    ids, more = (host.inputs(length=n, seed=n)["input_ids"] for n in (5, 40))
    said = []
    for which in ("dense", "packed"):
        with executor(model, which):
            out = model(input_ids=more)
            late = model(input_ids=ids, **{CACHE: out[CACHE]})
            said.append(torch.cat([out.logits, late.logits], dim=1))
    assert gap(*said) <= host.default_exact
    assert all(list(reach) == sorted(reach) and reach[-1] <= 40 for reach in seen)
    assert seen
