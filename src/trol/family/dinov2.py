"""DINOv2 from an ONNX file that torch exported of transformers' Dinov2Model, as a folder.

An exporter keeps the name of a parameter that it left as it was. A linear map's weight it turns
round and gives a number in the place of its name; the node that multiplies by it still has the
path of the module. The position table it cuts in two, the class token's row and the others.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import BitImageProcessorPil, Dinov2Config, Dinov2Model
from transformers.utils.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from trol.errors import DataError

HEAD_SIZE = 64
"""Of every attention head of every DINOv2; no weight tells it."""

EMBEDDINGS = "embeddings"
LINEAR = "MatMul"
MODULE = "backbone"
"""Where the tower stands in the exported model, when something was built on top of it."""


@dataclass(frozen=True)
class Constant:
    """A tensor of an ONNX file, its own name, and the node that reads it first."""

    name: str
    tensor: torch.Tensor
    kind: str
    """Of the node: `MatMul`, `Conv`, ..."""
    path: str
    """Of the node: module after module, and last its own name."""
    place: int
    """Which of the node's inputs it is."""


def convert_dinov2(file: Path, folder: Path) -> None:
    """Fills a folder with the DINOv2 of an ONNX file, so that `AutoModel.from_pretrained` opens it.

    Its image processor is written beside it. What the file has on top of the tower is left out.

    Raises:
        DataError: the file is no ONNX file, or holds no whole DINOv2.
    """
    weights = dinov2_weights(read_constants(file), str(file))
    model = _filled(weights, str(file))
    size = {"height": model.config.image_size, "width": model.config.image_size}
    pictures = BitImageProcessorPil(
        size=size,
        crop_size=size,
        do_center_crop=False,
        image_mean=IMAGENET_DEFAULT_MEAN,
        image_std=IMAGENET_DEFAULT_STD,
    )
    model.save_pretrained(folder)
    pictures.save_pretrained(folder)


def read_constants(file: Path) -> list[Constant]:
    """All tensors of an ONNX file that one of its nodes reads.

    Raises:
        DataError: it is no ONNX file.
    """
    # Read once in the life of a tower, by a package that nothing else needs.
    import onnx  # noqa: PLC0415
    from google.protobuf.message import DecodeError  # noqa: PLC0415

    try:
        graph = onnx.load(str(file)).graph
    except (DecodeError, OSError) as error:
        raise DataError(f"{file} is no whole ONNX file ({error}); download it again.") from error
    readers: dict[str, tuple[Any, int]] = {}
    for node in graph.node:
        for place, name in enumerate(node.input):
            readers.setdefault(name, (node, place))
    constants = []
    for entry in graph.initializer:
        if entry.name not in readers:
            continue
        node, place = readers[entry.name]
        tensor = torch.from_numpy(onnx.numpy_helper.to_array(entry).copy())
        constants.append(Constant(entry.name, tensor, node.op_type, node.name, place))
    return constants


def dinov2_weights(constants: list[Constant], source: str) -> dict[str, torch.Tensor]:
    """The weights of a Dinov2Model by the names that its published checkpoints have.

    Raises:
        DataError: there is no position table among these tensors.
    """
    weights, table = {}, {}
    for constant in constants:
        name, tensor = constant.name.removeprefix(f"{MODULE}."), constant.tensor
        module = constant.path.strip("/").removeprefix(f"{MODULE}/").split("/")[:-1]
        if name.startswith((f"{EMBEDDINGS}.", "encoder.", "layernorm.")):
            weights[name] = tensor
        elif module[:1] == ["encoder"] and constant.kind == LINEAR and constant.place == 1:
            weights[".".join([*module, "weight"])] = tensor.T.contiguous()
        elif module == [EMBEDDINGS] and tensor.ndim == 3:
            table[tensor.shape[1] == 1] = tensor
    if set(table) != {True, False}:
        raise DataError(
            f"{source} has no position table of a DINOv2 ({len(constants)} tensors, of which "
            f"{len(weights)} are its); give a file that was exported of transformers' Dinov2Model."
        )
    weights[f"{EMBEDDINGS}.position_embeddings"] = torch.cat([table[True], table[False]], dim=1)
    return weights


def _filled(weights: dict[str, torch.Tensor], source: str) -> Dinov2Model:
    """The model of these weights; `DataError` unless each has a place of its shape, and no more."""
    made: Any = Dinov2Model
    try:
        model, info = made.from_pretrained(
            None, config=_config(weights), state_dict=weights, output_loading_info=True
        )
        wrong = sorted(info["missing_keys"]) + sorted(info["unexpected_keys"])
    except (KeyError, RuntimeError) as error:  # a tensor that the sizes are read off; its shape
        raise DataError(f"the weights of {source} make no DINOv2: {error}.") from error
    if wrong:
        raise DataError(
            f"the weights of {source} make no DINOv2: {len(wrong)} are missing or have no place, "
            f"first {wrong[0]}; give a file that was exported of transformers' Dinov2Model."
        )
    return model


def _config(weights: Mapping[str, torch.Tensor]) -> Dinov2Config:
    """The sizes, read off the weights' shapes."""
    width, _, patch, _ = weights[f"{EMBEDDINGS}.patch_embeddings.projection.weight"].shape
    places = weights[f"{EMBEDDINGS}.position_embeddings"].shape[1] - 1
    layers = {name.split(".")[2] for name in weights if name.startswith("encoder.")}
    inner = weights["encoder.layer.0.mlp.fc1.weight"].shape[0]
    return Dinov2Config(
        hidden_size=width,
        num_hidden_layers=len(layers),
        num_attention_heads=width // HEAD_SIZE,
        mlp_ratio=inner // width,
        image_size=round(places**0.5) * patch,
        patch_size=patch,
        use_mask_token=False,  # which only its pretraining reads
    )
