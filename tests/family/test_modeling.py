"""TrolForConditionalGeneration: rows, images, parts, saving, training."""

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    GPT2Config,
    OPTConfig,
    Qwen3Config,
)

from family.samples import enlarged, picture, question, rows
from trol.depth import attach, detach
from trol.depth.policy import from_settings
from trol.errors import DataError
from trol.family import TrolConfig, TrolForConditionalGeneration, TrolModel, tiny
from trol.host.trainer import checkpoint_activations

CLOSE = {"atol": 5e-5, "rtol": 0}


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_row_of_a_batch_is_the_row_alone(model, encode, side):
    with torch.no_grad():
        batch = encode(rows(), side)
        together = model(**batch).logits
        for number, row in enumerate(rows()):
            inputs = encode(row)
            alone = model(**inputs).logits[0]
            real = batch["attention_mask"][number].bool()
            torch.testing.assert_close(together[number, real], alone, **CLOSE)


def test_images_matter_and_their_order_too(model, encode):
    with torch.no_grad():
        first, second = (
            model(**encode(question("what is this", *pictures))).logits
            for pictures in ((picture(1), picture(2)), (picture(2), picture(1)))
        )
    assert (first - second).abs().max() > 1e-2


def test_the_tower_does_not_run_without_images(model, encode):
    runs = []
    hook = model.model.vision_tower.register_forward_hook(lambda *_: runs.append(1))
    with torch.no_grad():
        model(**encode([question("what"), question("count them")]))
        assert not runs
        model(**encode(rows()))
    hook.remove()
    assert len(runs) == 1


def test_features_go_where_the_placeholders_are(model, encode):
    batch = encode(rows())
    with torch.no_grad():
        encoded = model.get_image_features(batch["pixel_values"])
        features = encoded.pooler_output.flatten(0, 1)
        mask = batch["input_ids"] == model.config.image_token_id
        embeds = model.get_input_embeddings()(batch["input_ids"])
        embeds[mask] = features
        by_hand = model(inputs_embeds=embeds, attention_mask=batch["attention_mask"])
        outputs = model(**batch)
        from_embeds = model(
            inputs_embeds=model.get_input_embeddings()(batch["input_ids"]),
            attention_mask=batch["attention_mask"],
            pixel_values=batch["pixel_values"],
        )
    assert torch.equal(outputs.image_hidden_states, features)
    torch.testing.assert_close(by_hand.logits, outputs.logits, **CLOSE)
    torch.testing.assert_close(from_embeds.logits, outputs.logits, **CLOSE)


def test_counts_that_differ_are_refused(model, encode):
    batch = encode(rows())
    with pytest.raises(DataError, match=r"got 27 image tokens .*\[9, 0, 18\].* expected 18"):
        model(**{**batch, "pixel_values": batch["pixel_values"][:2]})
    pixels = batch.pop("pixel_values")
    with pytest.raises(DataError, match=r"got 27 image tokens .* expected 0"):
        model(**batch)
    with pytest.raises(DataError, match="images in the batch, 3, height, width"):
        model(**batch, pixel_values=pixels[0])
    with pytest.raises(DataError, match="input_ids or inputs_embeds"):
        model()


def test_saved_is_loaded(model, encode, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert isinstance(loaded, TrolForConditionalGeneration)
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    batch = encode(rows())
    with torch.no_grad():
        torch.testing.assert_close(loaded.eval()(**batch).logits, model(**batch).logits, **CLOSE)
        base = AutoModel.from_pretrained(tmp_path)
    assert isinstance(base, TrolModel)


@pytest.mark.parametrize("sharing", ["per_layer", "shared"])
def test_gates_start_as_asked_and_are_saved(processor, tmp_path, sharing):
    depth = {"policy": "trol_mixer", "sharing": sharing, "initial_gate": 0.01}
    model = TrolForConditionalGeneration(tiny(len(processor.tokenizer), depth=depth))
    layers = model.get_decoder().layers
    assert torch.allclose(torch.sigmoid(2 * layers[3].depth.bias), torch.tensor(0.01))
    with torch.no_grad():
        layers[3].depth.weight.normal_()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path)
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    gates = [layer.depth.weight for layer in loaded.get_decoder().layers]
    assert (gates[0] is gates[3]) == (sharing == "shared")


def test_what_is_saved_names_the_policy_that_is_attached(processor, tmp_path):
    """A detached model used to name its old policy; loaded again, it got gates at random."""
    model = TrolForConditionalGeneration(tiny(len(processor.tokenizer)))
    detach(model).save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).depth == {"policy": "plain"}
    attach(model, from_settings({"policy": "trol_mixer", "passes": 3})).save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).depth["passes"] == 3


def parts(name: str) -> dict:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = CLIPVisionConfig(**sizes, intermediate_size=64, image_size=48, patch_size=16)
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    if name == "gpt2":
        text = GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=40, **special)
    elif name == "opt":
        text = OPTConfig(**sizes, ffn_dim=64, word_embed_proj_dim=32, vocab_size=40, **special)
    else:
        text = Qwen3Config(
            **sizes,
            intermediate_size=64,
            num_key_value_heads=1,
            head_dim=16,
            vocab_size=40,
            tie_word_embeddings=True,
            **special,
        )
    return {"vision_config": vision, "text_config": text}


@pytest.mark.parametrize("name", ["gpt2", "opt", "qwen3"])
def test_any_decoder_with_a_tower_that_has_a_class_token(name, encode, tmp_path):
    model = enlarged(TrolForConditionalGeneration(TrolConfig(**parts(name), image_token_id=4)))
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert model.get_decoder() is model.model.language_model.get_decoder()
    batch = encode(rows())
    with torch.no_grad():
        logits = model(**batch).logits
        encoded = model.get_image_features(batch["pixel_values"])
        assert encoded.last_hidden_state.shape[1] == 9
        assert encoded.pooler_output[0].shape == (9, 32)
        tower = model.model.vision_tower(batch["pixel_values"]).last_hidden_state[:, 1:]
        torch.testing.assert_close(encoded.pooler_output, model.model.projector(tower), **CLOSE)
        model.save_pretrained(tmp_path)
        loaded = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
        assert loaded.lm_head.weight is loaded.get_input_embeddings().weight
        torch.testing.assert_close(loaded(**batch).logits, logits, **CLOSE)


def test_a_chosen_hidden_state_is_read(encode):
    config = TrolConfig(**parts("qwen3"), image_token_id=4, vision_feature_layer=-2)
    model = enlarged(TrolForConditionalGeneration(config))
    pixels = encode(rows())["pixel_values"]
    with torch.no_grad():
        states = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states
        assert torch.equal(model.get_image_features(pixels).last_hidden_state, states[-2][:, -9:])


def test_an_image_token_outside_the_vocabulary(encode):
    config = TrolConfig(**parts("qwen3"), image_token_id=40)
    inside = TrolConfig(**parts("qwen3"), image_token_id=4)
    model = enlarged(TrolForConditionalGeneration(config))
    twin = TrolForConditionalGeneration(inside).eval()
    twin.load_state_dict(model.state_dict())
    batch = encode(rows())
    outside = {**batch, "input_ids": batch["input_ids"].masked_fill(batch["input_ids"] == 4, 40)}
    with torch.no_grad():
        assert torch.equal(model(**outside).logits, twin(**batch).logits)


def test_loss_is_the_mean_over_labelled_tokens(model, encode):
    batch = encode(rows())
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    labels[labels == model.config.image_token_id] = -100
    with torch.no_grad():
        outputs = model(**batch, labels=labels)
        expected = cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(outputs.loss, expected)


def test_ids_as_labels_count_no_image_token(encode):
    """Neither where the image token's id lies within the vocabulary nor where it does not."""
    for token in (4, 40):
        config = TrolConfig(**parts("qwen3"), image_token_id=token)
        model = enlarged(TrolForConditionalGeneration(config)).train()  # where all are in scope
        batch = encode(rows())
        ids = batch["input_ids"].masked_fill(batch["input_ids"] == 4, token)
        batch["input_ids"] = ids
        with torch.no_grad():
            whole = model(**batch, labels=ids).loss
            masked = model(**batch, labels=ids.masked_fill(ids == token, -100)).loss
        assert torch.equal(whole, masked)


def test_logits_are_kept_where_asked(model, encode):
    batch = encode(rows())
    with torch.no_grad():
        logits = model(**batch).logits
        last = model(**batch, logits_to_keep=2).logits
        some = model(**batch, logits_to_keep=torch.tensor([3, 5])).logits
    torch.testing.assert_close(last, logits[:, -2:], **CLOSE)
    torch.testing.assert_close(some, logits[:, [3, 5]], **CLOSE)


def test_tuples_hidden_states_and_attentions(model, encode):
    batch = encode(rows())
    with torch.no_grad():
        outputs = model(**batch, output_hidden_states=True)
        as_tuple = model(**batch, return_dict=False)
    assert len(outputs.hidden_states) == model.config.text_config.num_hidden_layers + 1
    assert torch.equal(as_tuple[0], outputs.logits)


def test_gradient_checkpointing_changes_nothing_and_all_parts_learn(encode, processor):
    torch.manual_seed(0)
    model = enlarged(TrolForConditionalGeneration(tiny(len(processor.tokenizer)))).train()
    batch = encode(rows())
    gradients = []
    for checkpointed in (False, True):
        if checkpointed:
            checkpoint_activations(model)
        model.zero_grad()
        model(**batch, labels=batch["input_ids"], use_cache=False).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, plain in gradients[0].items():
        assert plain is not None, name
        assert plain.isfinite().all(), name
        torch.testing.assert_close(gradients[1][name], plain, **CLOSE)
    assert gradients[0]["model.vision_tower.embeddings.patch_embedding.weight"].abs().sum() > 0
    assert gradients[0]["model.projector.positions.weight"].abs().sum() > 0


def test_the_vocabulary_can_grow(processor, encode):
    model = TrolForConditionalGeneration(tiny(len(processor.tokenizer))).eval()
    model.resize_token_embeddings(64)
    assert model.config.text_config.vocab_size == 64
    with torch.no_grad():
        assert model(**encode(rows())).logits.shape[-1] == 64
