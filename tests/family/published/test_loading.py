"""Published checkpoints open as TroL models: names, values, gates, settings."""

import json

import pytest
import torch
from safetensors import safe_open

from family.published.folders import FAMILIES, published_folder, write_json
from family.published.shapes import HEADS, HIDDEN, KV_HEADS, LAYERS, PATCH, RANK, VISION_HIDDEN
from trol.depth import attached
from trol.errors import HostError
from trol.family import TrolForConditionalGeneration
from trol.family.loading import load_model
from trol.family.published.files import Checkpoint
from trol.family.published.layouts import resize_position_table
from trol.family.published.opening import find_published, open_published


def opened(folder, **settings):
    return open_published(TrolForConditionalGeneration, folder, **settings)


def raw(folder):
    """All tensors of the folder's safetensors files, by their published names."""
    tensors = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as held:
            tensors |= {name: held.get_tensor(name) for name in held.keys()}  # noqa: SIM118
    return tensors


def changed(folder, change):
    config = json.loads((folder / "config.json").read_text())
    change(config)
    write_json(folder / "config.json", config)
    return folder


def image_inputs(model):
    config = model.config
    ids = [1, 5, 6, *[config.image_token_id] * config.tokens_per_image, 9]
    side = config.vision_config.image_size
    side = side if isinstance(side, int) else side[0]
    return {"input_ids": torch.tensor([ids]), "pixel_values": torch.randn(1, 3, side, side)}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("gating_file", [True, False])
@pytest.mark.parametrize(("weights", "shards"), [("safetensors", 1), ("bin", 1), ("bin", 3)])
def test_all_kinds_of_folders_give_the_same_model(tmp_path, family, weights, shards, gating_file):
    first = opened(published_folder(tmp_path / "first", family))
    folder = published_folder(
        tmp_path / "other", family, weights=weights, shards=shards, gating_file=gating_file
    )
    other, report = opened(folder, output_loading_info=True)
    assert not any(report.values())
    assert not other.training
    wanted = first.state_dict()
    assert all(torch.equal(wanted[name], held) for name, held in other.state_dict().items())
    with torch.no_grad():
        assert other(**image_inputs(other)).logits.isfinite().all()


@pytest.mark.parametrize("family", FAMILIES)
def test_from_pretrained_opens_them_too(tmp_path, family):
    folder = published_folder(tmp_path / "it", family)
    model = TrolForConditionalGeneration.from_pretrained(folder)
    wanted = opened(folder).state_dict()
    assert all(torch.equal(wanted[name], held) for name, held in model.state_dict().items())
    assert model.name_or_path == str(folder)


def test_internlm2_maps_are_split_row_by_row(tmp_path):
    folder = published_folder(tmp_path / "it", "internlm2")
    state, held, size = opened(folder).state_dict(), raw(folder), HIDDEN // HEADS
    for layer in range(LAYERS):
        old, new = f"model.layers.{layer}.attention", f"model.language_model.layers.{layer}"
        for kind, made in (("ffn", "base"), ("lora_B", "image_up")):
            rows = list(held[f"{old}.wqkv.{kind}.weight"].split(size))
            parts = {"q": [], "k": [], "v": []}
            for _ in range(KV_HEADS):
                parts["q"] += [rows.pop(0) for _ in range(HEADS // KV_HEADS)]
                parts["k"].append(rows.pop(0))
                parts["v"].append(rows.pop(0))
            for name, blocks in parts.items():
                block_rows = state[f"{new}.self_attn.{name}_proj.{made}.weight"]
                assert torch.equal(block_rows, torch.cat(blocks))
        down = [state[f"{new}.self_attn.{name}_proj.image_down.weight"] for name in "qkv"]
        assert all(torch.equal(held[f"{old}.wqkv.lora_A.weight"], one) for one in down)
        assert len({one.data_ptr() for one in down}) == 3, "each trains its own copy"
        w2 = held[f"model.layers.{layer}.feed_forward.w2.ffn.weight"]
        assert torch.equal(state[f"{new}.mlp.down_proj.base.weight"], w2)
    assert state["model.language_model.layers.0.mlp.up_proj.image_down.weight"].shape[0] == RANK


def test_phi3_keeps_its_maps_and_its_tower_is_split(tmp_path):
    folder = published_folder(tmp_path / "it", "phi3")
    state, held = opened(folder).state_dict(), raw(folder)
    name = "layers.2.self_attn.qkv_proj.weight"
    assert torch.equal(state[f"model.language_model.{name}"], held[f"language_model.model.{name}"])
    fused = held["vision_model.encoder.layers.1.attn.qkv.weight"]
    for number, kind in enumerate("qkv"):
        rows = fused[number * VISION_HIDDEN : (number + 1) * VISION_HIDDEN]
        new = f"model.vision_tower.encoder.layer.1.attention.{kind}_proj.weight"
        assert torch.equal(state[new], rows)
    assert torch.equal(state["model.projector.norm.weight"], held["vision_proj.0.weight"])


@pytest.mark.parametrize("family", FAMILIES)
def test_equal_gates_are_one_and_others_are_reported(tmp_path, family):
    shared = opened(published_folder(tmp_path / "shared", family))
    gates = [layer.depth for layer in attached(shared)[1].layers]
    assert len({gate.weight.data_ptr() for gate in gates}) == 1
    folder = published_folder(tmp_path / "own", family, sharing="per_layer")
    says = r"layers 1, 2 are not layer 0's \(by up to 0\.\d+\).*number 2, in all layers"
    with pytest.warns(UserWarning, match=says) as warned:
        own = opened(folder)
    assert [warning.filename for warning in warned] == [__file__], "who called trol"
    entries = torch.load(folder / "trol_gating.pt", weights_only=True)
    for number, layer in enumerate(attached(own)[1].layers):
        assert torch.equal(layer.depth.weight, entries[f"{number}.weight"])
        assert torch.equal(layer.depth.bias, entries[f"{number}.bias"])


def test_a_model_and_its_processor_are_recognised_once(tmp_path):
    folder = published_folder(tmp_path / "own", "phi3", sharing="per_layer")
    with pytest.warns(UserWarning, match="differ") as warned:
        model, processor = load_model(folder)
    assert [warning.filename for warning in warned] == [__file__]
    assert processor.tokens_per_image == model.config.tokens_per_image


def test_the_file_of_the_gates_counts_more_than_the_weights(tmp_path):
    folder = published_folder(tmp_path / "it", "phi3", gating_file=False)
    other = published_folder(tmp_path / "other", "phi3", seed=1)
    (other / "trol_gating.pt").rename(folder / "trol_gating.pt")
    entries = torch.load(folder / "trol_gating.pt", weights_only=True)
    gate = attached(opened(folder))[1].layers[0].depth
    assert torch.equal(gate.weight, entries["0.weight"])


def test_types(tmp_path):
    folder = published_folder(tmp_path / "it", "internlm2", dtype=torch.bfloat16)
    assert {p.dtype for p in opened(folder).parameters()} == {torch.bfloat16}
    assert {p.dtype for p in opened(folder, dtype=torch.float32).parameters()} == {torch.float32}


@pytest.mark.parametrize("weights", ["safetensors", "bin"])
def test_training_leaves_the_files_alone(tmp_path, weights):
    """Weights lie in the file's memory; what is written there is the model's own."""
    folder = published_folder(tmp_path / "it", "phi3", weights=weights)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    model = opened(folder)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    del model
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


def test_nothing_is_read_before_its_turn(tmp_path, monkeypatch):
    folder, read = published_folder(tmp_path / "it", "internlm2"), []
    before = Checkpoint.read
    monkeypatch.setattr(Checkpoint, "read", lambda s, n: read.append(n) or before(s, n))
    weights = find_published(folder).weights
    assert read == ["output.weight"], "whose type is the model's"
    name = "model.language_model.layers.1.self_attn.k_proj.base.weight"
    assert weights[name][...].shape == (HIDDEN // 2, HIDDEN)
    assert read[1:] == ["model.layers.1.attention.wqkv.ffn.weight"]


def test_internlm2_settings(tmp_path):
    folder = published_folder(tmp_path / "it", "internlm2")
    config = find_published(folder).config
    text = config.text_config
    assert config.image_token_id == text.vocab_size
    assert (text.image_lora_rank, text.image_lora_alpha, text.image_rows) == (RANK, RANK, 1)
    assert text.rope_parameters["rope_type"] == "dynamic"
    assert text.rope_parameters["rope_theta"] == 1e6
    assert config.vision_config.image_size == 5 * PATCH  # config.json's, not the table's
    assert config.tokens_per_image == 25
    silent = changed(folder, lambda c: (c.pop("img_size"), c.update(rope_scaling=None)))
    config = find_published(silent).config
    assert config.tokens_per_image == 16
    assert config.text_config.rope_parameters["rope_type"] == "default"


@pytest.mark.parametrize(("kind", "factor"), [("su", None), ("longrope", None), ("yarn", 1.13863)])
def test_phi3_settings(tmp_path, kind, factor):
    folder = published_folder(tmp_path / "it", "phi3")
    changed(folder, lambda c: c["llm_config"]["rope_scaling"].update(type=kind))
    config = find_published(folder).config
    rope = config.text_config.rope_parameters
    assert rope["rope_type"] == "longrope"
    assert rope.get("attention_factor") == pytest.approx(factor, abs=1e-5)
    assert rope["long_factor"][0] == 1.5
    assert config.text_config.sliding_window is None, "it is longer than any text"
    assert (config.downsample_ratio, config.tokens_per_image) == (0.5, 4)
    assert config.projector_norm


@pytest.mark.parametrize("left", ["tokenizer.json", "tokenizer_config.json", "added_tokens.json"])
def test_the_image_token_is_read_from_any_tokenizer_file(tmp_path, left):
    folder = published_folder(tmp_path / "it", "phi3")
    wanted = json.loads((folder / "added_tokens.json").read_text())["<IMG_CONTEXT>"]
    for name in {"tokenizer.json", "tokenizer_config.json", "added_tokens.json"} - {left}:
        (folder / name).unlink()
    assert find_published(folder).config.image_token_id == wanted
    changed(folder, lambda c: c.update(img_context_token_id=7))
    assert find_published(folder).config.image_token_id == 7


def test_answers_end_where_any_of_the_files_says(tmp_path):
    folder = published_folder(tmp_path / "internlm2", "internlm2")
    assert opened(folder).generation_config.eos_token_id == 2
    folder = published_folder(tmp_path / "phi3", "phi3")
    turn = json.loads((folder / "added_tokens.json").read_text())["<|end|>"]
    assert opened(folder).generation_config.eos_token_id == [2, turn]
    write_json(folder / "generation_config.json", {"eos_token_id": [5], "do_sample": True})
    generation = opened(folder).generation_config
    assert generation.eos_token_id == [5, 2, turn]
    assert not generation.do_sample


def test_position_tables_are_resized_by_cubic_convolution():
    table = torch.randn(1 + 16, 3)
    assert resize_position_table(table, 4) is table
    resized = resize_position_table(table, 5)
    assert torch.equal(resized[0], table[0])
    square = table[1:].reshape(4, 4, 3)
    across = torch.einsum("ij,jkd,lk->ild", cubic(4, 5), square, cubic(4, 5))
    torch.testing.assert_close(resized[1:], across.reshape(25, 3))
    assert resize_position_table(table.half()[None], 3).shape == (1, 10, 3)


def cubic(before, after):
    """Interpolation weights [after, before]: Keys's kernel, a = -0.75, edges repeated."""
    weights = torch.zeros(after, before)
    for row in range(after):
        place = (row + 0.5) * before / after - 0.5
        for column in range(int(place // 1) - 1, int(place // 1) + 3):
            x = abs(place - column)
            near = 1.25 * x**3 - 2.25 * x**2 + 1
            far = -0.75 * (x**3 - 5 * x**2 + 8 * x - 4)
            weights[row, min(max(column, 0), before - 1)] += near if x <= 1 else far
    return weights


def test_other_folders_are_left_to_transformers(tmp_path):
    assert find_published(tmp_path) is None
    write_json(tmp_path / "config.json", {"model_type": "llama"})
    assert find_published(tmp_path) is None
    assert opened(None) is None


def test_without_a_network_a_folder_is_asked_for():
    with pytest.raises(HostError, match=r"'nobody/nothing' is no folder here.*give the folder"):
        opened("nobody/nothing")
