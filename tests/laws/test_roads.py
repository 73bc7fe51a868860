"""Roles arrive by every road: processors that call a model, wrappers, classifiers."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from peft import get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from torch import Tensor, nn
from transformers import (
    LlamaConfig,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
    LogitsProcessor,
)

from hosts import HOSTS, Host
from trol import trace
from trol.depth import attach, attached, detach
from trol.errors import HostError
from trol.policies.controller import Controller
from trol.policies.mixer import TrolMixer
from trol.policies.planned import Planned

from .subjects import attach_settled, made, some_hosts

NAMES = ("trol", "skip_answer", "skip_question", "trol_answer", "trol_all")


def greedy_ids(model: Any, inputs: dict[str, Tensor], **settings: Any) -> list[list[int]]:
    with torch.no_grad():
        return model.generate(**inputs, max_new_tokens=4, do_sample=False, **settings).tolist()


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("host", some_hosts("llama", "gemma3", "qwen2"))
def test_both_branches_of_guidance(host: Host, name: str, *, cached: bool) -> None:
    """In each, the prompt is question and the same new tokens are answer."""
    model = attach_settled(host.build(), made(name))
    asked, avoided = (host.inputs(length=n)["input_ids"] for n in (9, 6))
    wanted = _guided_by_hand(model, asked, avoided, 2.5)
    said = greedy_ids(
        model,
        {"input_ids": asked},
        negative_prompt_ids=avoided,
        guidance_scale=2.5,
        use_cache=cached,
        eos_token_id=None,
    )
    assert said == wanted


@torch.no_grad()
def _guided_by_hand(model: Any, asked: Tensor, avoided: Tensor, scale: float) -> list[list[int]]:
    new = asked[:, :0]
    for _ in range(4):
        scores = []
        for prompt in (asked, avoided):
            ids = torch.cat([prompt, new], 1)
            masks = torch.zeros_like(ids)
            masks[:, prompt.shape[1] :] = 1
            logits = model(ids, assistant_masks=masks, use_cache=False).logits
            scores.append(logits[:, -1].log_softmax(-1))
        with_it, without = scores
        best = (scale * (with_it - without) + without).argmax(-1, keepdim=True)
        new = torch.cat([new, best], 1)
    return torch.cat([asked, new], 1).tolist()


class Asks(LogitsProcessor):
    """Calls a model on what `reads` makes of the ids, and notes its logits."""

    def __init__(self, model: Any, reads: Any) -> None:
        self.model, self.reads = model, reads
        self.seen: list[tuple[Tensor, Tensor]] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        ids = self.reads(input_ids)
        self.seen.append((input_ids, self.model(ids, use_cache=False).logits))
        return scores


READS = {
    "all ids": lambda ids: ids,
    "a candidate behind them": lambda ids: torch.cat([ids, ids[:, :1]], 1),
    "the last three": lambda ids: ids[:, -3:],
}


@pytest.mark.parametrize("which", ["this", "another"])
@pytest.mark.parametrize("reads", READS)
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_a_processor_that_calls_a_model(name: str, reads: str, which: str) -> None:
    host = HOSTS["llama"]
    model = attach_settled(host.build(), made(name))
    called = model if which == "this" else attach_settled(host.build(seed=3), made(name))
    inputs = {"input_ids": host.inputs(length=8)["input_ids"]}
    asks = Asks(called, READS[reads])
    greedy_ids(model, inputs, logits_processor=[asks], eos_token_id=None)
    for ids, logits in asks.seen:
        answer = torch.arange(ids.shape[1]) >= 8
        whole = torch.cat([answer, torch.tensor([True])])
        masks = READS[reads](whole[None])[0] if reads != "a candidate behind them" else whole
        masks = masks[: ids.shape[1]] if reads == "all ids" else masks
        if reads == "the last three":
            masks = answer[-3:]
        told = called(
            READS[reads](ids), assistant_masks=masks.expand(len(ids), -1), use_cache=False
        )
        assert torch.allclose(logits, told.logits, atol=1e-5)


@torch.no_grad()
def test_a_processor_that_reads_something_else_is_refused_or_tells() -> None:
    """Words of its own, once something was said: nobody could tell whose they are."""
    host = HOSTS["llama"]
    model = attach_settled(host.build(), made("trol"))
    inputs = {"input_ids": host.inputs(length=8)["input_ids"]}
    asks = Asks(model, lambda ids: ids.flip(1))
    with pytest.raises(HostError, match="pass assistant_masks"):
        greedy_ids(model, inputs, logits_processor=[asks])

    class Tells(Asks):
        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            other = input_ids.flip(1)
            self.model(other, assistant_masks=torch.zeros_like(other))
            return scores

    greedy_ids(model, inputs, logits_processor=[Tells(model, None)])


PEFT_SETTINGS: dict[str, dict[str, Any]] = {
    "ADALORA": {"total_step": 10},
    "C3A": {"block_size": 8},
    "FOURIERFT": {"n_frequency": 16},
    "WAVEFT": {"n_frequency": 16},
    "MISS": {"r": 4},
    "SHIRA": {"r": 2},
    "PSOFT": {"r": 4},
    "ROAD": {"group_size": 4},
    "VBLORA": {"vector_length": 8},
    "ADAPTION_PROMPT": {"adapter_len": 3, "adapter_layers": 2},
    "PROMPT_TUNING": {"num_virtual_tokens": 3},
    "P_TUNING": {"num_virtual_tokens": 3},
    "PREFIX_TUNING": {"num_virtual_tokens": 3},
}
"""What a method needs to be told on so small a host."""

SLOW = ("ADAMSS", "DEFT", "DELORA", "FROD", "GLORA", "GRALORA", "HIRA")
"""They take seconds to set up, and change linear maps as LoRA does."""


def wrapped(kind: Any, model: Any) -> Any:
    """A host under this method; skipped where the method does not take a bare one on."""
    settings = PEFT_SETTINGS.get(kind.name, {})
    torch.manual_seed(5)
    try:
        config = PEFT_TYPE_TO_CONFIG_MAPPING[kind](task_type="CAUSAL_LM", **settings)
        learner = get_peft_model(model, config).eval()
        with torch.no_grad():
            learner(input_ids=torch.tensor([[5, 6, 7]]))
    except (ValueError, TypeError, RuntimeError, AssertionError, ImportError) as error:
        pytest.skip(f"a bare host does not take it: {error}")
    for parameter in learner.parameters():  # LoRA begins with zeros
        if parameter.requires_grad:
            parameter.data.normal_(0, 0.2)
    return learner


@pytest.mark.parametrize("kind", [k for k in PEFT_TYPE_TO_CONFIG_MAPPING if k.name not in SLOW])
@pytest.mark.filterwarnings("ignore")
@pytest.mark.deprecated_elsewhere
def test_a_method_of_peft(kind: Any) -> None:
    """Attached before and after it is the same; cached is uncached where the bare host's is."""
    host = HOSTS["llama"]
    inputs = host.inputs(length=8)
    bare = wrapped(kind, host.build())
    plain = [_tried(bare, inputs, use_cache=use) for use in (True, False)]
    for name in ("trol", "skip_answer"):
        first = wrapped(kind, attach_settled(host.build(), made(name)))
        try:
            after = attach_settled(wrapped(kind, host.build()), made(name))
        except HostError:  # it has put layers of its own in the place of the host's
            continue
        assert after is not attached(after)[0]
        said = [
            _tried(model, inputs, use_cache=use)
            for use in (True, False)
            for model in (first, after)
        ]
        assert said[0] == said[1]
        assert said[2] == said[3]
        if plain[0] == plain[1] and isinstance(plain[0], list):
            assert said[0] == said[2]
            assert isinstance(said[0], list)
        detach(after)
        assert [_tried(after, inputs, use_cache=use) for use in (True, False)] == plain


def _tried(model: Any, inputs: dict[str, Tensor], **settings: Any) -> Any:
    """Ids; or what a method cannot do on this release, with trol as without."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return greedy_ids(model, inputs, **settings)
    except (RuntimeError, ValueError, HostError, TypeError) as error:
        return type(error).__name__


@pytest.mark.filterwarnings("ignore")
@pytest.mark.deprecated_elsewhere
def test_virtual_tokens_in_the_middle_of_a_text_are_refused_or_never_put() -> None:
    """PEFT that does not see the cache puts them before every token: not silently."""
    host = HOSTS["llama"]
    kind = next(k for k in PEFT_TYPE_TO_CONFIG_MAPPING if k.name == "PROMPT_TUNING")
    bare, ours = (wrapped(kind, m) for m in (host.build(), attach(host.build(), "plain")))
    inputs = host.inputs(length=8)
    same = greedy_ids(bare, inputs) == greedy_ids(bare, inputs, use_cache=False)
    if same:
        assert greedy_ids(ours, inputs) == greedy_ids(bare, inputs)
    else:
        with pytest.raises(HostError, match="use_cache=False"):
            greedy_ids(ours, inputs)


def _small(labels: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        num_hidden_layers=2,
        num_labels=labels,
        pad_token_id=0,
    )


CLASSIFIERS = {
    "classes [B]": (LlamaForSequenceClassification, 3, torch.tensor([0, 2])),
    "rewards [B]": (LlamaForSequenceClassification, 1, torch.tensor([0.3, 0.7])),
    "several [B, n]": (LlamaForSequenceClassification, 9, torch.ones(2, 9)),
    "of tokens [B, T]": (LlamaForTokenClassification, 3, torch.ones(2, 9, dtype=torch.long)),
}


@pytest.mark.parametrize("case", CLASSIFIERS)
@pytest.mark.parametrize("name", ["trol", "trol_answer", "skip_answer"])
def test_labels_of_a_classifier_are_no_roles(case: str, name: str) -> None:
    """All that it reads is question, with labels and without."""
    kind, count, labels = CLASSIFIERS[case]
    torch.manual_seed(0)
    model = kind(_small(count)).eval()
    ids = torch.randint(3, 97, (2, 9))
    attach_settled(model, Planned("1", scope="answer") if name == "skip_answer" else made(name))
    with_labels, without = model(ids, labels=labels), model(ids)
    assert torch.equal(with_labels.logits, without.logits)
    with_labels.loss.backward()
    with trace(model) as seen:
        model(ids)
    wanted = 2 if name == "trol" else 1
    assert (seen.visits == wanted).all()


def test_a_penalty_joins_the_loss_of_a_classifier() -> None:
    """Its labels are no roles; what its policy asks for is in its loss all the same."""
    torch.manual_seed(0)
    config = _small(3)
    config.num_hidden_layers = 4
    model = attach(
        LlamaForSequenceClassification(config), Controller(scope="all", training_scope="all")
    ).train()
    model(torch.randint(3, 97, (2, 9)), labels=torch.tensor([0, 2])).loss.backward()
    gates = [p for name, p in model.named_parameters() if ".depth." in name]
    assert all(p.grad is not None for p in gates)
    with torch.no_grad():
        stack = attached(model)[1]
        penalty = type(stack.depth_policy).penalty
        try:
            type(stack.depth_policy).penalty = lambda *_: torch.tensor(100.0)
            assert model(torch.ones(2, 5, dtype=torch.long), labels=torch.tensor([0, 2])).loss > 90
        finally:
            type(stack.depth_policy).penalty = penalty


class Valued(nn.Module):
    """A head of somebody's own around a model, as a reinforcement learner puts one."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.pretrained_model, self.value = model, nn.Linear(32, 1)

    def forward(self, **inputs: Any) -> Any:
        return self.pretrained_model(**inputs)

    def generate(self, **inputs: Any) -> Any:
        return self.pretrained_model.generate(**inputs)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", ["trol", "skip_answer"])
def test_a_wrapper_has_the_policy_on_the_model_inside(name: str) -> None:
    host = HOSTS["llama"]
    inputs = host.inputs(length=8)
    wanted = greedy_ids(attach_settled(host.build(), made(name)), inputs)
    for wrap in (Valued, torch.compile):
        model: Any = attach_settled(wrap(host.build()), made(name))
        assert greedy_ids(model, inputs) == wanted
        detach(model)


def test_a_wrapper_that_knows_its_parameters_already_is_refused() -> None:
    with pytest.raises(HostError, match="attach the policy first"):
        attach(nn.DataParallel(HOSTS["llama"].build()), TrolMixer())
