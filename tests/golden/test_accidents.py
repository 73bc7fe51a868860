"""What the official code does by accident, and what trol does instead.

The numbers of the golden sets hold these accidents, the same by name in each; the checker compares
trol with what a row, a prompt or a call must give by itself. Each test here shows the accident on a
small model, by doing what upstream does, and that trol is free of it.
"""

import pytest
import torch
from transformers import LlamaConfig, Phi3ForCausalLM
from transformers.utils.chat_template_utils import render_jinja_template

import trol
from family.samples import enlarged
from family.small import SWITCH, alone, batch, internlm2, phi3
from golden.instructions import INSTRUCTIONS, user_message
from trol.depth.planes import drop_planes
from trol.family import TrolForConditionalGeneration
from trol.family.generation import RowRotaryEmbedding
from trol.family.published.processors import MARKS, chat_template
from trol.host.names import CACHE

from .folder import publish
from .made import make_set
from .sets import GoldenSet

CLOSE = {"atol": 5e-5, "rtol": 0}
FAR = 1e-2
"""What an accident moves logits by is far above rounding."""


@pytest.fixture(scope="module")
def model():
    return internlm2()


@pytest.fixture(scope="module")
def switching():
    return phi3()


def distance(a, b):
    return float((a - b).abs().max())


def positions_of(mask):
    return (mask.cumsum(-1) - 1).clamp(min=0)


@torch.no_grad()
def test_a_question_of_one_token_is_traversed(model):
    """Upstream asks for seq_len > 1 where it means "this is the question".

    So a question of one token passes as a decoded one would. trol knows who asks.
    """
    question = batch(model, [0], [1])
    with trol.trace(model) as trace:
        traversed = model(**question).logits
    assert (trace.visits == 2).all()
    with trol.depth(model, "all"):
        upstream = model(**question).logits
    assert distance(traversed, upstream) > FAR


@torch.no_grad()
def test_a_prompt_cut_in_two_is_the_same_prompt(model):
    """Upstream caches the keys and values of first visits only.

    The second visits of a second chunk then see other keys of the first chunk than they would in
    one go, and the answer depends on where the prompt was cut (its InternLM2 file; in its Phi-3
    file they see nothing of the first chunk). trol keeps second visits' keys while a question may
    go on.
    """
    ids = batch(model, [0], [12])["input_ids"]
    whole = model(ids).logits[:, 7:]
    first = model(ids[:, :7], use_cache=True)[CACHE]
    chunked = model(ids[:, 7:], **{CACHE: first}).logits
    torch.testing.assert_close(chunked, whole, **CLOSE)
    first = model(ids[:, :7], use_cache=True)[CACHE]
    drop_planes(first)
    assert distance(model(ids[:, 7:], **{CACHE: first}).logits, whole) > FAR


@torch.no_grad()
def test_padding_stays_padding_after_the_prompt(model):
    """Upstream's InternLM2 rebuilds the mask as all ones when it decodes beside images.

    The shorter rows of a batch then attend to padding, at positions that jump. In trol each row
    is what it is alone.
    """
    images = [1, 1]
    inputs = batch(model, images, [4, 9])
    mask, single = inputs["attention_mask"], alone(inputs, 0, images)
    step = torch.tensor([[7], [7]])

    def decoded(now, positions):
        past = model(**inputs, position_ids=positions_of(mask), use_cache=True)[CACHE]
        return model(
            step,
            attention_mask=now,
            position_ids=positions,
            **{CACHE: past},
            assistant_masks=torch.ones_like(step),
        ).logits[0]

    past = model(**single, use_cache=True)[CACHE]
    own = model(step[:1], **{CACHE: past}, assistant_masks=torch.ones(1, 1)).logits[0]
    grown = torch.cat([mask, torch.ones_like(step)], dim=1)
    torch.testing.assert_close(decoded(grown, grown.sum(-1, keepdim=True) - 1), own, **CLOSE)
    forgotten = decoded(torch.ones_like(grown), torch.full_like(step, mask.shape[1]))
    assert distance(forgotten, own) > FAR
    how = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    batched, apart = model.generate(**inputs, **how), model.generate(**single, **how)
    assert torch.equal(batched[0, -6:], apart[0, -6:])


@torch.no_grad()
def test_a_rows_rope_factors_are_its_own(switching):
    """Upstream takes the longest row of the batch for the length that chooses the factors.

    transformers' own Phi-3 does so too: a short row's result depends on its batch mates.
    """
    rows = [0, 0]
    inputs = batch(switching, rows, [SWITCH - 4, SWITCH + 4])
    inputs_with_positions = {**inputs, "position_ids": positions_of(inputs["attention_mask"])}
    single, real = alone(inputs, 0, rows), inputs["attention_mask"][0].bool()
    own = switching(**single).logits[0]
    torch.testing.assert_close(switching(**inputs_with_positions).logits[0, real], own, **CLOSE)
    twin = enlarged(Phi3ForCausalLM(switching.config.text_config))
    assert distance(twin(**inputs_with_positions).logits[0, real], twin(**single).logits[0]) > FAR


@torch.no_grad()
def test_keys_are_made_anew_where_the_factors_switch(switching):
    """Upstream goes on with keys that the short factors rotated, under long-factor queries.

    trol generates as without a cache: where a row outgrows its short factors, all its keys are
    made again.
    """
    inputs = batch(switching, [0], [SWITCH])
    how = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
    how |= {"output_logits": True, "return_dict_in_generate": True}
    cached = switching.generate(**inputs, **how)
    plain = switching.generate(**inputs, **how, use_cache=False)
    assert torch.equal(cached.sequences, plain.sequences)
    torch.testing.assert_close(cached.logits[1], plain.logits[1], **CLOSE)
    past = switching(**inputs, use_cache=True)[CACHE]
    step = cached.sequences[:, SWITCH : SWITCH + 1]
    mixed = switching(step, **{CACHE: past}, assistant_masks=torch.ones(1, 1)).logits[:, -1]
    assert distance(mixed, plain.logits[1]) > FAR


@torch.no_grad()
def test_each_beam_gets_the_images_of_its_row(model):
    """Upstream repeats a row's images one by one for its beams, but consumes them in order.

    Two beams of a row with the images a, b then see a, a and b, b. In trol both see a, b.
    """
    images = [2, 0]
    inputs = batch(model, images, [5, 3])
    how = {"num_beams": 2, "max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    batched = model.generate(**inputs, **how)
    for row in range(2):
        apart = model.generate(**alone(inputs, row, images), **how)
        assert torch.equal(batched[row, -4:], apart[0, -4:])
    single = alone(inputs, 0, images)
    beams = single["input_ids"].repeat(2, 1)
    upstream = model(beams, pixel_values=single["pixel_values"].repeat_interleave(2, 0)).logits
    assert distance(upstream, model(**single).logits) > FAR


def test_a_stretched_rope_forgets_the_calls_before():
    """Upstream's dynamic NTK keeps the base of the longest call: later, shorter ones change."""
    settings = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    rope = RowRotaryEmbedding(
        LlamaConfig(head_dim=16, max_position_embeddings=24, rope_parameters=settings)
    )
    short, long = torch.arange(20)[None], torch.arange(40)[None]
    before, stretched, after = (rope(torch.zeros(1), n)[0] for n in (short, long, short))
    assert torch.equal(before, after)
    assert distance(stretched[:, :20], before) > FAR


@pytest.mark.parametrize("family", MARKS)
def test_a_benchmarks_question_shows_its_picture_once(family):
    """Upstream's evaluation puts one <image> in front, its instruction another.

    There are then twice as many image tokens as features, and generation breaks; a row without a
    picture gets image tokens too. trol writes one where there is a picture, and none where not.
    """

    def asked(benchmark, *, image):
        messages = [user_message("<image>\nIs it red?", benchmark, image=image)]
        return render_jinja_template([messages], chat_template=chat_template(family))[0][0]

    for benchmark in INSTRUCTIONS:
        assert asked(benchmark, image=True).count("<image>\nIs it red?") == 1
        assert asked(benchmark, image=True).count("<image>") == 1
        assert "<image>" not in asked(benchmark, image=False)


def test_each_layer_gets_the_gate_that_was_saved_for_it(tmp_path):
    """Upstream holds one gate L times in a list, so that the last of L saved gates is everywhere.

    Where a file holds L that differ, trol gives each layer its own.
    """
    made, folder = tmp_path / "set", tmp_path / "published"
    for new in (made, folder):
        new.mkdir()
    make_set(made, "internlm2")
    golden = GoldenSet(made)
    publish(golden, folder)
    with pytest.warns(UserWarning, match="the gates in .* differ"):
        opened = TrolForConditionalGeneration.from_pretrained(folder)
    for number, layer in enumerate(opened.model.language_model.layers):
        assert torch.equal(layer.depth.weight, golden.weights[f"model.trol_gating.{number}.weight"])
