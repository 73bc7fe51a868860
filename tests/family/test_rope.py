"""RoPE by a row's own length: factors that switch, bases that stretch, caches that start anew."""

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, Phi3ForCausalLM

import trol
from family.small import SWITCH, alone, batch, phi3
from hosts.releases import SWITCHES_ROPE
from trol.errors import DataError
from trol.family.generation import RowRotaryEmbedding
from trol.host.names import CACHE

CLOSE = {"atol": 5e-5, "rtol": 0}
NEW = {
    "max_new_tokens": 8,
    "min_new_tokens": 8,
    "do_sample": False,
    "output_logits": True,
    "return_dict_in_generate": True,
}
IMAGES, WORDS = [0, 2, 1], [13, 3, 9]
"""13, 11 and 13 tokens: each crosses 16 while it generates, not all at the same step."""


@pytest.fixture(scope="module", params=["shared", "per_layer"])
def model(request):
    return phi3(request.param)


def generated(model, inputs, **how):
    out = model.generate(**inputs, **{**NEW, **how})
    return out.sequences[:, -8:], torch.stack(out.logits, 1)


@torch.no_grad()
def test_rows_of_other_lengths_do_not_choose_a_rows_factors(model):
    images, words = [0, 3], [7, 12]
    inputs = batch(model, images, words)
    positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    batched = model(**inputs, position_ids=positions).logits
    for row in range(2):
        real = inputs["attention_mask"][row].bool()
        single = model(**alone(inputs, row, images)).logits[0]
        torch.testing.assert_close(batched[row, real], single, **CLOSE)


@pytest.mark.parametrize("images", [IMAGES, [0, 0, 0]])
def test_rows_that_switch_while_they_generate_are_as_alone_and_as_recomputed(model, images):
    inputs = batch(model, images, WORDS)
    ids, logits = generated(model, inputs)
    plain_ids, plain_logits = generated(model, inputs, use_cache=False)
    assert torch.equal(ids, plain_ids)
    torch.testing.assert_close(logits, plain_logits, **CLOSE)
    for row in range(3):
        own_ids, own_logits = generated(model, alone(inputs, row, images))
        assert torch.equal(ids[row], own_ids[0])
        torch.testing.assert_close(logits[row], own_logits[0], **CLOSE)


@pytest.mark.parametrize(
    ("words", "how"),
    [
        (30, {"prefill_chunk_size": 5}),
        (13, {"prefill_chunk_size": 5}),
        (13, {"cache_implementation": "static", "disable_compile": True}),
        (13, {"prompt_lookup_num_tokens": 2}),
    ],
)
def test_every_way_of_decoding_switches_alike(model, words, how):
    inputs = batch(model, [0], [words])
    ids, logits = generated(model, inputs, **how)
    plain_ids, plain_logits = generated(model, inputs)
    assert torch.equal(ids, plain_ids)
    torch.testing.assert_close(logits, plain_logits, **CLOSE)


def test_a_kept_cache_switches_where_all_tokens_are_given(model):
    inputs = batch(model, [0], [30])
    first = {name: value[:, :10] for name, value in inputs.items()}
    for how in ({}, {"prefill_chunk_size": 5}):
        cache = DynamicCache(config=model.config.text_config)
        with torch.no_grad():
            model(**first, **{CACHE: cache})
        ids, logits = generated(model, inputs, **{CACHE: cache}, **how)
        plain_ids, plain_logits = generated(model, inputs)
        assert torch.equal(ids, plain_ids)
        torch.testing.assert_close(logits, plain_logits, **CLOSE)


def test_a_kept_cache_and_only_new_tokens_are_refused_where_it_switches(model):
    inputs = batch(model, [0], [30])
    cache = DynamicCache(config=model.config.text_config)
    with torch.no_grad():
        model(**{name: value[:, :10] for name, value in inputs.items()}, **{CACHE: cache})
    inputs["input_ids"] = inputs["input_ids"][:, 10:]
    with pytest.raises(DataError, match="pass all of its tokens"):
        generated(model, inputs, **{CACHE: cache})


def test_beams_switch_as_they_do_without_a_cache(model):
    inputs = batch(model, IMAGES, WORDS)
    how = {**NEW, "num_beams": 3, "return_dict_in_generate": False, "output_logits": False}
    cached = model.generate(**inputs, **how)
    assert torch.equal(cached, model.generate(**inputs, **how, use_cache=False))


@torch.no_grad()
def test_from_embeddings_as_from_ids(model):
    inputs = batch(model, [0, 0], [13, 9])
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    mask = inputs["attention_mask"]
    ids, logits = generated(model, {"inputs_embeds": embeds, "attention_mask": mask})
    plain_ids, plain_logits = generated(model, inputs)
    assert torch.equal(ids, plain_ids)
    torch.testing.assert_close(logits, plain_logits, **CLOSE)


@pytest.mark.skipif(not SWITCHES_ROPE, reason="transformers' own goes on without its cache")
@torch.no_grad()
def test_one_row_alone_is_transformers_own_phi3(model):
    config = model.config.text_config
    twin = Phi3ForCausalLM(config).eval()
    state = model.model.language_model.state_dict()
    twin.model.load_state_dict({k: v for k, v in state.items() if ".depth." not in k})
    twin.lm_head.load_state_dict(model.lm_head.state_dict())
    inputs = batch(model, [0], [SWITCH - 3])
    with trol.depth(model, "all"):
        model.generation_config.suppress_tokens = None
        ids, logits = generated(model, inputs)
    own_ids, own_logits = generated(twin, inputs)
    assert torch.equal(ids, own_ids)
    torch.testing.assert_close(logits, own_logits, **CLOSE)


def test_a_stretched_base_depends_on_the_row_and_on_no_call_before():
    rope = RowRotaryEmbedding(
        LlamaConfig(
            hidden_size=32,
            num_attention_heads=2,
            max_position_embeddings=24,
            rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
        )
    )
    state, short, long = torch.zeros(1), torch.arange(20)[None], torch.arange(40)[None]
    before = rope(state, short)
    stretched = rope(state, long)
    after = rope(state, short)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert not torch.equal(stretched[0][:, :20], before[0])
    both = rope(state, torch.cat([torch.cat([short, short], 1) % 20, long]))
    assert torch.equal(both[0][1], stretched[0][0])
    assert torch.equal(both[0][0, :20], before[0][0])
