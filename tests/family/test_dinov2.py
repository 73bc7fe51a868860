"""DINOv2 out of an ONNX file: every weight in its place, or an error that says which is not."""

import dataclasses
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, BitImageProcessorPil, Dinov2Config, Dinov2Model

from family.samples import enlarged
from trol.errors import DataError
from trol.family import dinov2
from trol.family.dinov2 import Constant, convert_dinov2

SIZES = {
    "small": {"hidden_size": 64, "num_hidden_layers": 2, "patch_size": 4, "image_size": 16},
    "wide": {"hidden_size": 128, "num_hidden_layers": 1, "patch_size": 2, "image_size": 6},
}


def tower(size: str) -> Dinov2Model:
    settings = SIZES[size]
    heads = settings["hidden_size"] // dinov2.HEAD_SIZE
    torch.manual_seed(0)
    config = Dinov2Config(**settings, num_attention_heads=heads, mlp_ratio=2, use_mask_token=False)
    return enlarged(Dinov2Model(config))


def exported(model: Dinov2Model, folder: Path) -> list[Constant]:
    """The model's weights as torch's exporter leaves them, and one of what stands on top of it."""
    from safetensors.torch import load_file

    model.save_pretrained(folder)
    constants = []
    for name, tensor in load_file(folder / "model.safetensors").items():
        module = "/" + "/".join(["backbone", *name.split(".")[:-1]])
        if name.endswith("position_embeddings"):
            constants += [
                Constant("onnx::Concat_1", tensor[:, :1], "Concat", "/backbone/embeddings/C", 0),
                Constant("onnx::Reshape_2", tensor[:, 1:], "Reshape", "/backbone/embeddings/R", 0),
            ]
        elif tensor.ndim == 2:
            number = f"onnx::MatMul_{len(constants)}"
            constants.append(Constant(number, tensor.T, "MatMul", f"{module}/MatMul", 1))
        else:
            constants.append(Constant(f"backbone.{name}", tensor, "Add", f"{module}/Add", 0))
    head = Constant("decoder.conv.bias", torch.ones(3), "Conv", "/decoder/conv/Conv", 2)
    return [*constants, head]


@pytest.mark.parametrize("size", SIZES)
def test_a_folder_gives_what_the_exported_model_gave(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, size: str
) -> None:
    model = tower(size)
    constants = exported(model, tmp_path / "before")
    monkeypatch.setattr(dinov2, "read_constants", lambda file: constants)
    convert_dinov2(Path("made.onnx"), tmp_path / "after")
    pixels = torch.randn(1, 3, *[SIZES[size]["image_size"]] * 2)
    after = AutoModel.from_pretrained(tmp_path / "after").eval()
    with torch.no_grad():
        states = [one(pixels).last_hidden_state for one in (model, after)]
    assert torch.equal(*states)
    pictures = BitImageProcessorPil.from_pretrained(tmp_path / "after")
    grey = torch.full((3, 30, 40), 128, dtype=torch.uint8)
    assert pictures(grey, return_tensors="pt")["pixel_values"].shape == pixels.shape


@pytest.mark.parametrize(
    ("fault", "match"),
    [
        ("no table", "no position table"),
        ("a weight less", "first embeddings.cls_token"),
        ("a weight more", "first encoder.layer.0.strange"),
        ("another shape", "make no DINOv2"),
    ],
)
def test_weights_that_make_no_tower_are_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fault: str, match: str
) -> None:
    constants = exported(tower("small"), tmp_path / "before")
    if fault == "no table":
        constants = [one for one in constants if one.kind not in ("Concat", "Reshape")]
    elif fault == "a weight less":
        constants = [one for one in constants if not one.name.endswith("cls_token")]
    elif fault == "a weight more":
        constants.append(Constant("backbone.encoder.layer.0.strange", torch.ones(1), "Add", "/", 0))
    else:
        place = next(i for i, one in enumerate(constants) if one.name.endswith("cls_token"))
        constants[place] = dataclasses.replace(constants[place], tensor=torch.ones(1, 1, 3))
    monkeypatch.setattr(dinov2, "read_constants", lambda file: constants)
    with pytest.raises(DataError, match=match):
        convert_dinov2(Path("made.onnx"), tmp_path / "after")


def test_constants_are_read_with_the_nodes_that_read_them(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    weight, bias = torch.randn(2, 3), torch.randn(3)
    tensors = [("onnx::MatMul_1", weight), ("a.bias", bias), ("unread", bias)]
    nodes = [
        onnx.helper.make_node("MatMul", ["x", "onnx::MatMul_1"], ["y"], name="/a/MatMul"),
        onnx.helper.make_node("Add", ["a.bias", "y"], ["z"], name="/a/Add"),
    ]
    values = [
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in "xz"
    ]
    entries = [onnx.numpy_helper.from_array(tensor.numpy(), name) for name, tensor in tensors]
    graph = onnx.helper.make_graph(nodes, "made", values[:1], values[1:], entries)
    onnx.save(onnx.helper.make_model(graph), str(tmp_path / "made.onnx"))
    first, second = dinov2.read_constants(tmp_path / "made.onnx")
    assert (first.name, first.kind, first.path, first.place) == (
        *("onnx::MatMul_1", "MatMul", "/a/MatMul"),
        1,
    )
    assert torch.equal(first.tensor, weight)
    assert (second.name, second.place) == ("a.bias", 0)
    (tmp_path / "text.onnx").write_text("no such file", encoding="utf-8")
    with pytest.raises(DataError, match="no whole ONNX file"):
        dinov2.read_constants(tmp_path / "text.onnx")
