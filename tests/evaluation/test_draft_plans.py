"""Choosing a draft: agreement is counted rightly, the choice is the best, the gain is measured."""

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from trol.depth import Plan, attach, attached, depth, is_attached, trace
from trol.errors import UsageError
from trol.evaluation import draft_search as draft_plans
from trol.evaluation.draft_search import Costs, DraftChoice, draft_plan, tokens_per_round
from trol.evaluation.items import Item
from trol.evaluation.plan_search import chosen_plan
from trol.evaluation.timing import measured_speed
from trol.family.presets import word_tokenizer
from trol.policies.planned import Planned
from trol.speculation import speculate

WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
ITEMS = [Item(None, f"{a} {b}", "ten", "count") for a, b in zip(WORDS, WORDS[3:], strict=False)]
IDLE = 2, 3
"""Layers of the model below that add next to nothing."""


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    made = word_tokenizer(WORDS)
    made.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    return made


@pytest.fixture
def model(tokenizer: Any) -> Any:
    """A Llama of five layers, two of which hardly change a state."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=5,
        num_attention_heads=4,
        max_position_embeddings=128,
        initializer_range=0.4,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=None,
    )
    made = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for layer in IDLE:
            made.model.layers[layer].self_attn.o_proj.weight.mul_(1e-4)
            made.model.layers[layer].mlp.down_proj.weight.mul_(1e-4)
    return made


def test_rounds_played_through() -> None:
    """Three right, one wrong, then four right: rounds of two drafts gain 3, 1, 3 and 1 tokens."""
    row = [True, True, True, False, True, True, True, True]
    assert tokens_per_round([row], 2) == 8 / 4
    assert tokens_per_round([[False, True, True]], 1) == 3 / 2
    assert tokens_per_round([[False] * 6], 4) == 1
    assert tokens_per_round([[True] * 12], 3) == 4


def test_speed_up_is_gain_over_cost() -> None:
    costs = Costs(shallow=0.1, layer=0.05, verifying={3: 1.3})
    assert costs.speedup([[True] * 12], 3, 3) == pytest.approx(4 / (3 * 0.2 + 1.3))


def test_layers_that_do_nothing_are_not_drafted_with(
    model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    fixed = Costs(0.2, 0.2, {k: 1.0 + 0.02 * k for k in range(1, draft_plans.MOST_TOKENS + 1)})
    monkeypatch.setattr(draft_plans, "costs_of", lambda *_: fixed)
    seen: list[tuple[int, int]] = []
    result = draft_plan(
        model, tokenizer, ITEMS, 0.6, new_tokens=12, progress=lambda *args: seen.append(args)
    )
    assert result.plan == Plan("0-1 4")
    assert result.agreement == 1
    assert result.predicted_speedup == max(
        fixed.speedup([[True] * 11], 3, k) for k in range(1, draft_plans.MOST_TOKENS + 1)
    )
    assert seen[-1] == (11, 11)  # the exit, the even layers, five of four layers, four of three
    assert not is_attached(model)


def test_agreement_is_what_speculation_accepts(model: Any, tokenizer: Any) -> None:
    """One draft a round: the draft is right exactly where it agrees."""
    attach(model, "plain")
    _, stack = attached(model)
    with torch.no_grad(), depth(model, "plain"):
        one = draft_plans.generate_answers(model, tokenizer, ITEMS[:1], 24)
        (row,) = draft_plans.Agreement(model, stack, [one]).of((0, 1, 2), (0, 1, 2))
    with speculate(model, "0-2", tokens=1) as stats:
        said = model.generate(one.ids[:, : one.prompt], max_new_tokens=24, do_sample=False)
    assert said.tolist() == one.ids.tolist()
    assert 0 < sum(row) < len(row)
    assert stats.steps == 23
    assert stats.tokens_per_round == pytest.approx(tokens_per_round([row], 1), rel=0.01)


def test_a_model_with_a_plan_drafts_with_fewer_of_its_layers(model: Any, tokenizer: Any) -> None:
    attach(model, Planned("0-1 3-4"))
    result = draft_plan(model, tokenizer, ITEMS[:2], new_tokens=6, rounds=1)
    assert result.plan.for_layers(5)[2] == 0
    assert isinstance(result, DraftChoice)
    assert 1 <= result.tokens <= draft_plans.MOST_TOKENS
    assert chosen_plan("draft", model, tokenizer, ITEMS[:2], 0.4).plan.for_layers(5).count(1) == 2


def test_answers_end_where_the_model_ends_them(model: Any, tokenizer: Any) -> None:
    attach(model, "plain")
    with torch.no_grad():
        free = draft_plans.generate_answers(model, tokenizer, ITEMS[:1], 8)
        model.generation_config.eos_token_id = int(free.ids[0, free.prompt + 3])
        ended = draft_plans.generate_answers(model, tokenizer, ITEMS[:2], 8)
    first = free.ids[0, free.prompt :].tolist().index(model.generation_config.eos_token_id)
    assert ended.counted[0].tolist() == [i < first for i in range(ended.counted.shape[1])]


def test_the_gain_is_measured(model: Any, tokenizer: Any) -> None:
    result = measured_speed(model, tokenizer, ITEMS[:2], "0-1 4", 3, new_tokens=9, rounds=2)
    assert result["identical"]
    assert result["acceptance"] == 1
    assert result["tokens_per_round"] > 3
    plain, drafted = (result["tokens_per_second"][name] for name in ("plain", "speculative"))
    assert result["ratio"] == pytest.approx(drafted / plain, rel=0.5)
    with trace(model) as seen:
        model.generate(torch.tensor([[4, 5]]), max_new_tokens=2, do_sample=False)
    assert set(seen.visits.flatten().tolist()) == {1}


def test_bad_requests_are_named(model: Any, tokenizer: Any) -> None:
    with pytest.raises(UsageError, match="got none"):
        draft_plan(model, tokenizer, [])
    with pytest.raises(UsageError, match="keep is 0"):
        draft_plan(model, tokenizer, ITEMS, 0)
    with pytest.raises(UsageError, match="single token"):
        draft_plan(model, tokenizer, ITEMS, new_tokens=1)
    with pytest.raises(UsageError, match="got none"):
        measured_speed(model, tokenizer, [], "exit@2", 2)
    with pytest.raises(UsageError, match="tokens is 0; give a whole number"):
        measured_speed(model, tokenizer, ITEMS, "exit@2", 0)
    assert not is_attached(model)
