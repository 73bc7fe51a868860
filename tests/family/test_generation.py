"""generate and pipeline: every way of decoding, with images, batches and text alone."""

import pytest
import torch
from transformers import pipeline

from family.samples import picture, question, rows
from trol.errors import DataError

NEW = {"max_new_tokens": 6, "min_new_tokens": 6}


def greedy(model, inputs, **kwargs):
    ids = model.generate(**inputs, do_sample=False, **NEW, **kwargs)
    return ids[:, inputs["input_ids"].shape[1] :]


@pytest.mark.parametrize("beams", [1, 3])
def test_a_row_of_a_batch_is_generated_as_alone(model, encode, beams):
    batched = greedy(model, encode(rows()), num_beams=beams)
    for number, row in enumerate(rows()):
        assert torch.equal(batched[number], greedy(model, encode(row), num_beams=beams)[0])


def test_raw_pixels_follow_their_row_when_rows_are_repeated(model, encode):
    """Image-wise repetition gave the copies of a row (a, a) and (b, b) instead of (a, b) twice."""
    inputs = encode(rows())
    ids, kwargs = model._expand_inputs_for_generation(
        expand_size=2, input_ids=inputs["input_ids"], pixel_values=inputs["pixel_values"]
    )
    assert torch.equal(kwargs["pixel_values"], inputs["pixel_values"][[0, 0, 1, 2, 1, 2]])
    assert torch.equal(ids, inputs["input_ids"].repeat_interleave(2, 0))


def test_cached_is_uncached_and_a_plain_loop(model, encode):
    inputs = encode(rows())
    cached = greedy(model, inputs)
    assert torch.equal(cached, greedy(model, inputs, use_cache=False))
    ids, mask, said = inputs["input_ids"], inputs["attention_mask"], inputs["attention_mask"] * 0
    for step in range(6):
        now = {"input_ids": ids, "attention_mask": mask, "assistant_masks": said}
        logits = model(**now, pixel_values=inputs["pixel_values"]).logits[:, -1]
        logits[:, [model.config.image_token_id, model.config.text_config.eos_token_id]] = -1e9
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
        mask, said = (torch.cat([old, old.new_ones(3, 1)], 1) for old in (mask, said))
        assert torch.equal(ids[:, -1], cached[:, step])


def test_the_tower_runs_once_for_a_generation(model, encode):
    runs = []
    hook = model.model.vision_tower.register_forward_hook(lambda *_: runs.append(1))
    greedy(model, encode(rows()), num_beams=2)
    hook.remove()
    assert len(runs) == 1


def test_sampling_repeats_with_its_seed_and_never_makes_an_image_token(model, encode):
    inputs, runs = encode(rows()), []
    for _ in range(2):
        torch.manual_seed(3)
        runs.append(
            model.generate(
                **inputs, do_sample=True, temperature=9.0, max_new_tokens=40, num_return_sequences=2
            )
        )
    assert torch.equal(*runs)
    made = runs[0][:, inputs["input_ids"].shape[1] :]
    assert not (made == model.config.image_token_id).any()


def test_prompt_lookup_and_static_cache_agree_with_greedy(model, encode):
    inputs = encode(rows()[2])
    expected = greedy(model, inputs)
    assert torch.equal(greedy(model, inputs, prompt_lookup_num_tokens=3), expected)
    assert torch.equal(greedy(model, inputs, cache_implementation="static"), expected)


def test_text_alone_is_generated_without_pixels(model, encode):
    alone = greedy(model, encode(question("count them")))
    assert torch.equal(greedy(model, encode(rows()))[1], alone[0])


def test_generating_with_a_forgotten_image_is_refused(model, encode):
    inputs = encode(rows())
    inputs.pop("pixel_values")
    with pytest.raises(DataError, match="expected 0"):
        greedy(model, inputs)


def test_pipeline(model, processor, encode):
    pipe = pipeline("image-text-to-text", model=model, processor=processor)
    said = pipe(rows()[2], generate_kwargs={**NEW, "do_sample": False})[0]["generated_text"][-1]
    expected = processor.decode(greedy(model, encode(rows()[2]))[0], skip_special_tokens=True)
    assert said["role"] == "assistant"
    assert said["content"].strip() == expected
    plain = pipe(images=picture(0), text="<image> what digit", generate_kwargs=NEW)
    assert isinstance(plain[0]["generated_text"], str)
