"""However a conversation is cut into calls, it computes the same."""

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, StaticCache

from hosts import HOSTS, Host
from hosts.checks import greedy
from hosts.host import Inputs
from trol import depth
from trol.depth import executor
from trol.depth.call import Executor
from trol.depth.planes import HOLES
from trol.host.names import CACHE

from .subjects import (
    answer_masks,
    assert_same,
    attach_settled,
    cuts,
    gap,
    key_cases,
    made,
    policy_cases,
    recomputed,
    some_hosts,
    spoken,
)

pytestmark = pytest.mark.usefixtures("no_grad")


@pytest.mark.parametrize(("host", "attn", "name"), key_cases())
def test_cached_is_uncached_at_every_step(host: Host, attn: str, name: str) -> None:
    """Whether `generate` may drop planes, must keep them for its caller, or has no cache."""
    model, inputs = host.build(attn), host.inputs()
    bare = greedy(model, inputs)[1]
    attach_settled(model, made(name))
    expected = recomputed(host, model, inputs)
    assert gap(bare, expected[1]) > 1e-2  # the policy matters
    assert_same(greedy(model, inputs), expected, host.default_exact)
    assert_same(spoken(model, inputs), expected, host.default_exact)
    assert_same(spoken(model, inputs, use_cache=False), expected, host.default_exact)


@pytest.mark.parametrize(
    ("host", "name"), policy_cases("llama", "gemma3", "qwen3_next", "qwen3_vl")
)
def test_every_policy_cached_is_uncached(host: Host, name: str) -> None:
    model, inputs = attach_settled(host.build(), made(name)), host.inputs(batch=2)
    expected = recomputed(host, model, inputs)
    assert_same(greedy(model, inputs), expected, host.default_exact)
    assert_same(spoken(model, inputs), expected, host.default_exact)


@pytest.mark.parametrize(("host", "attn", "name"), key_cases())
def test_pieces_are_one_shot(host: Host, attn: str, name: str) -> None:
    """Question and answer take turns; the row is read at once, in pieces, token by token."""
    model, inputs = attach_settled(host.build(attn), made(name)), host.inputs(length=12)
    roles = turns(inputs, from_column=inputs["input_ids"].shape[1] - 5)
    whole = model(**inputs, assistant_masks=roles, use_cache=False).logits
    untold = model(**inputs, use_cache=False).logits
    assert gap(whole, untold) > 1e-2 or name in ("trol_all", "skip_first")  # roles matter
    masked = "masked_chunks" not in host.cannot
    first = 0 if host.kind == "text" else inputs["input_ids"].shape[1] - 5
    for size in (1, 3):
        pieces = in_pieces(model, inputs, roles, first=first or size, size=size, masked=masked)
        assert gap(pieces, whole) <= host.default_exact


@pytest.mark.parametrize(("host", "name"), policy_cases("llama", "mistral", "gemma2", "falcon_h1"))
def test_every_policy_in_pieces(host: Host, name: str) -> None:
    model, inputs = attach_settled(host.build(), made(name)), host.inputs(batch=2, length=12)
    roles = torch.stack([turns(inputs, from_column=c)[0] for c in (1, 3)])
    whole = model(**inputs, assistant_masks=roles, use_cache=False).logits
    for size in (2, 5):
        pieces = in_pieces(model, inputs, roles, first=size, size=size, masked=size != 2)
        assert gap(pieces, whole) <= host.default_exact


@pytest.mark.parametrize("host", some_hosts("llama", "mistral", "gemma3", "gpt2"))
@pytest.mark.parametrize("name", ["trol", "trol_answer", "skip_answer", "repeat"])
def test_pieces_on_a_static_cache(host: Host, name: str) -> None:
    """Its layers write in place: a plane must be a copy."""
    model, inputs = attach_settled(host.build(), made(name)), host.inputs(length=12)
    roles = turns(inputs, from_column=4)
    whole = model(**inputs, assistant_masks=roles, use_cache=False).logits
    cache = StaticCache(model.config, max_cache_len=20)
    pieces = in_pieces(model, inputs, roles, first=3, size=2, masked=True, cache=cache)
    assert gap(pieces, whole) <= host.default_exact


@pytest.mark.parametrize(("host", "attn", "name"), key_cases(every_attn=False))
def test_several_turns_are_one_conversation(host: Host, attn: str, name: str) -> None:
    """`generate` again and again on one kept cache == the whole conversation without a cache.

    A rule that took "more than one token in this call" for "question" would fail at turn two.
    """
    model, inputs = attach_settled(host.build(attn), made(name)), host.inputs()
    talk, roles = inputs, torch.zeros_like(inputs["input_ids"])
    cache = None
    for turn in range(3):
        if turn:
            asked = torch.tensor([[10 + turn, 30, 50 + turn]])[:, : 2 + turn % 2]
            talk = host.extend(talk, asked)
            roles = torch.cat([roles, torch.zeros_like(asked)], 1)
        kept = {} if cache is None else {CACHE: cache}
        said = model.generate(
            **(talk if cache is None else unseen(talk, host)),
            **kept,
            assistant_masks=roles,
            max_new_tokens=3,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        cache = said[CACHE]
        new = said.sequences[:, talk["input_ids"].shape[1] :]
        expected = conversation(host, model, talk, roles, new)
        assert gap(torch.stack(said.logits, 1), expected) <= host.default_exact
        talk = host.extend(talk, new)
        roles = torch.cat([roles, torch.ones_like(new)], 1)


@pytest.mark.parametrize("host", some_hosts("llama", "gpt2", "gemma3", "qwen3_next"))
@pytest.mark.parametrize("name", ["trol", "trol_all", "skip_question", "skip"])
def test_one_token_prompts(host: Host, name: str) -> None:
    """A prompt of one token is question; a rule that counts tokens would call it answer."""
    model, inputs = host.build(), host.inputs(length=1)
    bare = greedy(model, inputs)[1]
    attach_settled(model, made(name))
    expected = recomputed(host, model, inputs)
    assert gap(expected[1][:, 0], bare[:, 0]) > 1e-2
    assert_same(greedy(model, inputs), expected, host.default_exact)


@pytest.mark.parametrize("host", some_hosts("llama", "mistral", "gpt_neox"))
def test_a_prompt_of_embeddings(host: Host) -> None:
    model, inputs = attach_settled(host.build(), made("trol")), host.inputs()
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    said = model.generate(
        inputs_embeds=embeds,
        attention_mask=inputs["attention_mask"],
        max_new_tokens=3,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    assert_same(
        (said.sequences, torch.stack(said.logits, 1)), recomputed(host, model, inputs), 5e-5
    )


def test_another_policy_takes_over_a_cache() -> None:
    """Planes of an earlier policy go on being right when the next one makes no second visit."""
    host = HOSTS["llama"]
    model, inputs = attach_settled(host.build(), made("trol_all")), host.inputs(length=12)
    ids = inputs["input_ids"]
    whole = model(ids, assistant_masks=answer_masks({"input_ids": ids[:, :6]}, inputs)).logits
    cache = DynamicCache(config=model.config)
    first = model(ids[:, :6], **{CACHE: cache}).logits
    with depth(model, "all"):
        model(ids[:, 6:8], **{CACHE: cache})
    last = model(ids[:, 8:], **{CACHE: cache}).logits
    assert gap(first, whole[:, :6]) <= 5e-5
    assert gap(last, whole[:, 8:]) > 1e-2  # two tokens visited once
    cache = DynamicCache(config=model.config)
    trol = attach_settled(host.build(), made("trol"))
    roles = torch.zeros_like(ids)
    roles[:, 6:8] = 1
    trol(ids[:, :6], **{CACHE: cache})
    with depth(trol, "all"):
        trol(ids[:, 6:8], **{CACHE: cache})
    assert (
        gap(
            trol(ids[:, 8:], **{CACHE: cache}).logits,
            trol(ids, assistant_masks=roles, use_cache=False).logits[:, 8:],
        )
        <= 5e-5
    )


def turns(inputs: Inputs, *, from_column: int) -> Tensor:
    """Assistant masks: question up to a column, then answer, answer, question by turns."""
    roles = torch.zeros_like(inputs["input_ids"])
    for column in range(from_column, roles.shape[1]):
        roles[:, column] = (column - from_column) % 3 != 2
    return roles


def in_pieces(
    model: PreTrainedModel,
    inputs: Inputs,
    roles: Tensor,
    *,
    first: int,
    size: int,
    masked: bool,
    cache: DynamicCache | StaticCache | None = None,
) -> Tensor:
    """Logits of forwards on one cache: `first` columns with the images, then `size` at a time."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    cache = DynamicCache(config=model.config) if cache is None else cache
    opening = {k: v[:, :first] if v.shape == ids.shape else v for k, v in inputs.items()}
    out = [model(**opening, assistant_masks=roles[:, :first], **{CACHE: cache}).logits]
    for cut in cuts(ids.shape[1] - first, size):
        here = slice(cut.start + first, cut.stop + first)
        seen = {"attention_mask": mask[:, : here.stop]} if masked else {}
        piece = {"input_ids": ids[:, here], "assistant_masks": roles[:, here]}
        out.append(model(**piece, **seen, **{CACHE: cache}).logits)
    return torch.cat(out, 1)


def unseen(talk: Inputs, host: Host) -> Inputs:
    """What a later turn gives to `generate`: the whole text, the images no more."""
    return talk if host.kind == "text" else {k: talk[k] for k in ("input_ids", "attention_mask")}


def conversation(
    host: Host, model: PreTrainedModel, talk: Inputs, roles: Tensor, new: Tensor
) -> Tensor:
    """Logits of the tokens `new` after `talk`, from one forward without a cache."""
    whole = host.extend(talk, new)
    masks = torch.cat([roles, torch.ones_like(new)], 1)
    logits = model(**whole, assistant_masks=masks, use_cache=False).logits
    return logits[:, -new.shape[1] - 1 : -1]


@pytest.mark.parametrize("which", ["dense", "token-wise"])
@pytest.mark.parametrize("host", some_hosts("llama", "gemma3", "qwen3_vl"))
def test_holes_stay_hidden_from_another_policy(host: Host, which: Executor) -> None:
    """Whatever lies in the cache where a token left nothing: nobody reads it."""
    model, inputs = attach_settled(host.build(), made("hole_some")), host.inputs(length=5)
    more = {"input_ids": HOSTS["llama"].inputs(length=3, seed=1)["input_ids"]}
    said = []
    for garbage in (0.0, 9.0):
        with executor(model, which):
            cache = model(**inputs, use_cache=True)[CACHE]
            for layer, slot in enumerate(cache.layers):
                holes = cache.planes[layer, HOLES].values[:, None, -slot.keys.shape[2] :, None]
                slot.keys.masked_fill_(holes, garbage)
                slot.values.masked_fill_(holes, garbage)
            with depth(model, "0-1:2 2-3"):
                said.append(model(**more, **{CACHE: cache}).logits)
    assert gap(*said) <= host.default_exact
