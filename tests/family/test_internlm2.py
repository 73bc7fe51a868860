"""InternLM2's decoder: partial LoRA acts on image tokens, there alone, and else costs nothing."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForImageTextToText, LlamaConfig, LlamaForCausalLM

import trol
from family.small import TEXT, alone, batch, internlm2
from hosts.releases import OLDEST, WHOLE_PROMPTS
from trol.family import InternLM2Config, InternLM2Model
from trol.family.internlm2 import PartialLora
from trol.host.trainer import checkpoint_activations

IMAGES, WORDS = [1, 0, 2], [5, 4, 9]
CLOSE = {"atol": 5e-5, "rtol": 0}
NEW = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}


@pytest.fixture(scope="module")
def model():
    return internlm2()


def counted(model):
    """How often some A of the partial LoRA ran, as a list that grows, and the hooks."""
    runs = []
    downs = [m.image_down for m in model.modules() if isinstance(m, PartialLora)]
    return runs, [down.register_forward_hook(lambda *_: runs.append(1)) for down in downs]


def test_all_seven_linear_maps_have_it(model):
    maps = [name for name, m in model.named_modules() if isinstance(m, PartialLora)]
    assert len(maps) == 3 * 7


@torch.no_grad()
def test_a_text_is_read_as_by_llama_and_no_update_runs(model):
    twin = LlamaForCausalLM(LlamaConfig(**TEXT)).eval()
    prefix = "model.language_model."
    renamed = {
        name.removeprefix(prefix).replace(".base.", "."): value
        for name, value in model.state_dict().items()
        if name.startswith((prefix, "lm_head")) and "image_" not in name and ".depth." not in name
    }
    renamed["embed_tokens.weight"] = renamed["embed_tokens.weight"][: TEXT["vocab_size"]]
    head = {"lm_head.weight": renamed.pop("lm_head.weight")}
    twin.load_state_dict({f"model.{k}": v for k, v in renamed.items()} | head)
    runs, hooks = counted(model)
    inputs = batch(model, [0, 0], [7, 4])
    with trol.depth(model, "all"):
        torch.testing.assert_close(model(**inputs).logits, twin(**inputs).logits, **CLOSE)
    assert not runs
    for hook in hooks:
        hook.remove()


@torch.no_grad()
def test_the_update_runs_on_the_prompt_and_not_in_decoding(model):
    counts = []
    for new in (1, 5):
        runs, hooks = counted(model)
        model.generate(
            **batch(model, [1], [4]), **{**NEW, "max_new_tokens": new, "min_new_tokens": new}
        )
        counts.append(len(runs))
        for hook in hooks:
            hook.remove()
    assert counts[0] == counts[1] > 0


@torch.no_grad()
def test_only_image_tokens_are_updated(model):
    plora = model.model.language_model.layers[0].mlp.up_proj
    inputs = batch(model, [1], [4])
    mask = inputs["input_ids"] == model.config.image_token_id
    seen = {}

    def keep(module, args, out):
        seen["in"], seen["out"] = args[0], out

    hook = plora.register_forward_hook(keep)
    with trol.depth(model, "all"):
        model(**inputs)
    hook.remove()
    update = plora.scale * plora.image_up(plora.image_down(seen["in"]))
    expected = plora.base(seen["in"]) + mask[..., None] * update
    assert update[mask].abs().max() > 1e-2
    torch.testing.assert_close(seen["out"], expected, **CLOSE)


@pytest.mark.parametrize("how", [{}, {"num_beams": 3}, {"use_cache": False}])
def test_a_row_of_a_batch_is_the_row_alone(model, how):
    inputs = batch(model, IMAGES, WORDS)
    batched = model.generate(**inputs, **NEW, **how)[:, -5:]
    for row in range(len(IMAGES)):
        ids = model.generate(**alone(inputs, row, IMAGES), **NEW, **how)
        assert torch.equal(batched[row], ids[0, -5:])


@pytest.mark.skipif(OLDEST, reason=WHOLE_PROMPTS["chunked_prefill"])
def test_a_prompt_in_chunks_is_the_prompt_at_once(model):
    inputs = batch(model, IMAGES, WORDS)
    chunked = model.generate(**inputs, **NEW, prefill_chunk_size=4)
    assert torch.equal(chunked, model.generate(**inputs, **NEW))


def test_checkpointing_changes_nothing_and_the_update_learns(model):
    twin, losses, gradients = internlm2().train(), [], []
    inputs = batch(twin, IMAGES, WORDS)
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == TEXT["vocab_size"], -100)
    for checkpointed in (False, True):
        if checkpointed:
            checkpoint_activations(twin)
        twin.zero_grad()
        loss = twin(**inputs, labels=labels).loss
        loss.backward()
        losses.append(loss.detach())
        gradients.append({n: p.grad for n, p in twin.named_parameters() if p.grad is not None})
    torch.testing.assert_close(*losses, **CLOSE)
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], atol=1e-5, rtol=1e-4)
    updates = [g for n, g in gradients[0].items() if "image_down" in n or "image_up" in n]
    assert len(updates) == 2 * 3 * 7
    assert all(g.abs().max() > 0 for g in updates)


@torch.no_grad()
@pytest.mark.parametrize("images", [0, 1])
def test_predicted_flops_are_counted_flops(images):
    model = internlm2()
    model.set_attn_implementation("eager")  # torch counts the products of this one
    inputs = batch(model, [images], [6])
    hidden, layers = [], model.model.language_model.layers
    hook = layers[0].register_forward_pre_hook(
        lambda _m, args, kwargs: hidden.append((args, kwargs)), with_kwargs=True
    )
    with trol.depth(model, "all"), trol.trace(model) as seen:
        model(**inputs, use_cache=False)
    hook.remove()
    args, kwargs = hidden[0]
    with FlopCounterMode(display=False) as counter:
        layers[0](*args, **kwargs)
    counted = 3 * counter.get_total_flops()
    assert seen.cost.flops == counted


@torch.no_grad()
def test_saved_is_loaded(model, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    assert loaded.get_input_embeddings().num_embeddings == TEXT["vocab_size"] + 1
    assert loaded.lm_head.out_features == TEXT["vocab_size"]
    inputs = batch(model, IMAGES, WORDS)
    # Weights that are mapped from a file lie where they lie, and products round by that.
    torch.testing.assert_close(loaded(**inputs).logits, model(**inputs).logits, **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("visit", [1, 2])
def test_image_tokens_are_updated_where_some_tokens_are_computed_alone(model, visit):
    inputs = batch(model, IMAGES, WORDS)
    said = {}
    with trol.depth(model, trol.RandomTokens(0.5, visit=visit, scope="all")):
        for who in ("dense", "token-wise"):
            runs, hooks = counted(model)
            with trol.depth.executor(model, who), trol.trace(model) as seen:
                said[who] = model(**inputs, use_cache=False).logits
            for hook in hooks:
                hook.remove()
            assert runs
            said[f"{who} flops"] = seen.cost.flops
    torch.testing.assert_close(said["token-wise"], said["dense"], **CLOSE)
    assert said["token-wise flops"] < 0.9 * said["dense flops"]


def test_a_new_update_is_nothing():
    fresh = PartialLora(torch.nn.Linear(4, 4), 2, 2, 0.0)
    assert fresh.scale == 1
    made = InternLM2Model(InternLM2Config(**TEXT))
    ups = [m.image_up.weight for m in made.modules() if isinstance(m, PartialLora)]
    assert not any(up.any() for up in ups)
