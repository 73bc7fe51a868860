"""Damaged or foreign folders: one error that names file, tensor, found, expected and cure."""

import json
import os
import pickle

import pytest
import torch

from family.published.folders import drawn_gates, published_folder, write_json, write_weights
from family.published.shapes import HIDDEN, internlm2_shapes, phi3_shapes
from trol.errors import DataError, HostError, TrolError
from trol.family import TrolForConditionalGeneration
from trol.family.loading import load_model
from trol.family.published.opening import open_published

FIRST, SECOND = (f"model-0000{number}-of-00002.safetensors" for number in (1, 2))


@pytest.fixture
def internlm2(tmp_path):
    return published_folder(tmp_path / "it", "internlm2")


@pytest.fixture
def phi3(tmp_path):
    return published_folder(tmp_path / "it", "phi3")


def refused(folder, *says, error=DataError):
    """Opening the folder raises one error that says all of these."""
    with pytest.raises(error) as caught:
        open_published(TrolForConditionalGeneration, folder)
    for part in says:
        assert part in str(caught.value), str(caught.value)
    with pytest.raises(TrolError):
        load_model(folder)


def rewritten(folder, shapes, change):
    """The folder with one whole weight file, after `change` to the tensors' dict."""
    for file in [*folder.glob("*.safetensors"), *folder.glob("*.index.json")]:
        file.unlink()
    tensors = {name: torch.zeros(shape) for name, shape in shapes.items()}
    change(tensors)
    write_weights(folder, tensors, "safetensors", 1)


def vocabulary(folder, *keys):
    value = json.loads((folder / "config.json").read_text())
    for key in keys:
        value = value[key]
    return value


def test_a_missing_file(internlm2):
    (internlm2 / SECOND).unlink()
    refused(internlm2, SECOND, "is missing", "tensors there, such as 'model.layers.", "download")


@pytest.mark.parametrize("file", [FIRST, SECOND])
def test_a_truncated_file(internlm2, file):
    os.truncate(internlm2 / file, 20_000)
    refused(internlm2, file, "20000 bytes", "no whole safetensors file", "download")


def test_a_truncated_bin(tmp_path):
    folder = published_folder(tmp_path / "it", "phi3", weights="bin", shards=1)
    os.truncate(folder / "pytorch_model.bin", 20_000)
    refused(folder, "pytorch_model.bin", "20000 bytes that are no whole file of tensors; download")


def test_no_weights_at_all(internlm2):
    for file in [*internlm2.glob("*.safetensors"), *internlm2.glob("*.index.json")]:
        file.unlink()
    refused(internlm2, "no weight files", "model*.safetensors")


def test_an_index_of_other_files(internlm2):
    index = internlm2 / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.norm.weight"] = FIRST
    content["weight_map"]["model.layers.9.new.weight"] = FIRST
    write_json(index, content)
    refused(internlm2, index.name, FIRST, "does not hold it")
    index.write_text("{")
    refused(internlm2, index.name, "JSON")


def test_an_index_left_over_from_another_kind(internlm2):
    index = {"weight_map": {"x": "pytorch_model-00001-of-00001.bin"}}
    write_json(internlm2 / "pytorch_model.bin.index.json", index)
    assert open_published(TrolForConditionalGeneration, internlm2) is not None


def test_a_missing_tensor(internlm2):
    name = "model.layers.1.attention.wo.ffn.weight"
    shapes = internlm2_shapes(vocabulary(internlm2, "vocab_size"))
    rewritten(internlm2, shapes, lambda tensors: tensors.pop(name))
    refused(internlm2, repr(name), "lacks 1 of", "model.safetensors", "download")


def test_a_tensor_too_many(phi3):
    name = "language_model.model.layers.0.self_attn.extra.weight"
    shapes = phi3_shapes(vocabulary(phi3, "llm_config", "vocab_size"))
    rewritten(phi3, shapes, lambda tensors: tensors.update({name: torch.zeros(1)}))
    refused(phi3, repr(name), "model.safetensors", "one of 1 tensors", "config.json")


def test_what_old_checkpoints_carry_is_no_tensor_too_many(internlm2):
    name = "model.layers.0.attention.rotary_emb.inv_freq"
    shapes = internlm2_shapes(vocabulary(internlm2, "vocab_size"))
    rewritten(internlm2, shapes, lambda tensors: tensors.update({name: torch.zeros(4)}))
    assert open_published(TrolForConditionalGeneration, internlm2) is not None


def test_another_shape(phi3):
    name = "language_model.model.layers.2.mlp.down_proj.weight"
    shapes = phi3_shapes(vocabulary(phi3, "llm_config", "vocab_size"))
    rewritten(phi3, shapes, lambda tensors: tensors.update({name: torch.zeros(HIDDEN, 8)}))
    refused(phi3, "model.safetensors", repr(name), "[64, 8]", "expected [64, 128]", "download")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"num_attention_heads": None}, "does not state 'num_attention_heads'"),
        ({"num_attention_heads": 7}, "do not divide into 7"),
        ({"hidden_size": 100}, "states hidden_size 100, but the tensors are made for 64"),
        ({"num_hidden_layers": 4}, "states num_hidden_layers 4, but the tensors are made for 3"),
        ({"rope_scaling": {"type": "yarn"}}, "RoPE scaling 'yarn'"),
        ({"rope_scaling": {"type": "dynamic"}}, "rope_scaling does not state 'factor'"),
        ({"rope_scaling": "dynamic"}, "rope_scaling is 'dynamic', not an object"),
    ],
)
def test_a_configuration_that_does_not_fit(internlm2, change, says):
    config = vocabulary(internlm2)
    write_json(internlm2 / "config.json", config | change)
    refused(internlm2, "config.json" if "divide" not in says else FIRST, says)


def test_gates_of_another_width(internlm2):
    gates = {name: tensor[..., :7] for name, tensor in drawn_gates("shared", GENERATOR).items()}
    torch.save(gates, internlm2 / "trol_gating.pt")
    refused(internlm2, "trol_gating.pt", "'0.weight'", "[1, 7]", "expected [1, 64]", "take the")


def test_gates_for_another_number_of_layers(phi3):
    gates = drawn_gates("shared", GENERATOR)
    del gates["2.weight"], gates["2.bias"]
    torch.save(gates, phi3 / "trol_gating.pt")
    refused(phi3, "trol_gating.pt", "2 layers", "has 3", "missing 2.bias, 2.weight")


def test_a_gate_without_its_bias(phi3):
    gates = drawn_gates("per_layer", GENERATOR)
    del gates["1.bias"]
    torch.save(gates, phi3 / "trol_gating.pt")
    refused(phi3, "trol_gating.pt", "2.5 layers", "missing 1.bias, surplus none")


def test_a_gating_file_that_is_something_else(phi3):
    torch.save({"0.weight": "a string"}, phi3 / "trol_gating.pt")
    refused(phi3, "trol_gating.pt", "other things than tensors")
    (phi3 / "trol_gating.pt").write_bytes(b"not a checkpoint")
    refused(phi3, "trol_gating.pt", "download")


def test_an_empty_gating_file(phi3):
    (phi3 / "trol_gating.pt").write_bytes(b"")
    refused(phi3, "trol_gating.pt is damaged: 0 bytes that are no whole file of tensors; download")


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_gates_that_are_no_numbers(phi3, value):
    gates = drawn_gates("shared", GENERATOR)
    gates["1.bias"][:] = float(value)
    torch.save(gates, phi3 / "trol_gating.pt")
    refused(phi3, "trol_gating.pt", "'1.bias' has values that are infinite or no numbers")


def test_no_configuration(internlm2):
    (internlm2 / "config.json").unlink()
    refused(internlm2, "config.json is missing; download")


def test_no_gates(internlm2):
    (internlm2 / "trol_gating.pt").unlink()
    refused(internlm2, "is no TroL checkpoint", "trol_gating.pt", "model.trol_gating.0.weight")


GENERATOR = torch.Generator().manual_seed(0)


class Code:
    """Runs when it is unpickled, as any Python may."""

    def __reduce__(self):
        return (os.mkdir, ("opened-by-a-pickle",))


@pytest.mark.parametrize("name", ["trol_gating.pt", "pytorch_model.bin"])
def test_code_in_a_pickle_is_not_run(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    folder = published_folder(tmp_path / "it", "internlm2", weights="bin", shards=1)
    torch.save({"0.weight": Code()}, folder / name)
    refused(folder, name, "holds other objects, or code, and was not opened; download")
    (folder / name).write_bytes(pickle.dumps(Code(), protocol=2))
    refused(folder, name)
    assert not (tmp_path / "opened-by-a-pickle").exists()


def test_a_tokenizer_without_the_image_token(phi3):
    for name in ("tokenizer.json", "added_tokens.json", "tokenizer_config.json"):
        (phi3 / name).unlink()
    refused(phi3, "tokenizer", "'<IMG_CONTEXT>'", "the id None", "put the checkpoint's own")


def test_gates_beside_another_model(internlm2):
    def another(tensors):
        tensors.clear()
        tensors["model.embed_tokens.weight"] = torch.zeros(8, 4)

    rewritten(internlm2, {}, another)
    refused(internlm2, "trol_gating.pt", "'model.embed_tokens.weight'", "of no published TroL")


def test_a_model_of_an_unknown_kind_is_no_business_of_ours(internlm2):
    (internlm2 / "trol_gating.pt").unlink()
    rewritten(internlm2, {}, lambda tensors: tensors.update(x=torch.zeros(2)))
    assert open_published(TrolForConditionalGeneration, internlm2) is None
    with pytest.raises(HostError, match="no model can be opened"):
        load_model(internlm2)
