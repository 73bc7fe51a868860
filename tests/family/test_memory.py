"""Models that do not fit are refused before they are loaded, and no others."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

import trol
from trol.errors import HostError
from trol.family import memory
from trol.family.memory import check_fits, check_opening

VALUES = 2**20


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A million values of two bytes, where next to nothing can be had."""
    save_file({"a": torch.zeros(VALUES, dtype=torch.bfloat16)}, tmp_path / "model-1.safetensors")
    save_file({"a": torch.zeros(8 * VALUES)}, tmp_path / "other.safetensors")
    monkeypatch.setattr(memory, "GIB", 2**20)  # so that the message has digits
    monkeypatch.setattr(memory, "available_bytes", lambda device: VALUES // 4)
    return tmp_path


def test_the_missing_memory_is_named(folder: Path) -> None:
    with pytest.raises(HostError, match=r"x needs 1\.0 .* 0\.2 .* on cpu: 0\.8 .* missing; run"):
        check_fits("x", VALUES, "cpu", "run")
    check_fits("x", VALUES // 4, "cpu", "run")


@pytest.mark.parametrize(
    ("settings", "needed"),
    [
        ({"dtype": torch.float32}, "4.0"),
        ({"device_map": "cuda:0"}, "2.0"),
        ({"device_map": 0, "dtype": torch.float16}, "2.0"),
        ({"quantization_config": BitsAndBytesConfig(load_in_4bit=True)}, "0.5"),
        ({"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}, "1.0"),
    ],
)
def test_weights_that_must_be_held_are_counted(
    folder: Path, settings: dict[str, Any], needed: str
) -> None:
    with pytest.raises(HostError, match=f"opening it needs {needed} "):
        check_opening("it", folder, settings)


@pytest.mark.parametrize(
    "settings",
    [{}, {"dtype": "auto"}, {"dtype": torch.bfloat16}, {"device_map": "cpu"}]
    + [{"device_map": spread, "dtype": torch.float32} for spread in ("auto", {"": "cuda"})],
)
def test_what_is_mapped_or_spread_is_not_refused(folder: Path, settings: dict[str, Any]) -> None:
    check_opening("it", folder, settings)


def test_damaged_files_are_left_to_who_opens_them(folder: Path) -> None:
    (folder / "model-1.safetensors").write_bytes(b"no")
    check_opening("it", folder, {"dtype": torch.float64})


def test_opening_a_model_asks_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=1,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path)
    monkeypatch.setattr(memory, "available_bytes", lambda device: 100)
    with pytest.raises(HostError, match="are missing"):
        trol.load_model(tmp_path, dtype=torch.float32)


def test_a_machine_has_memory() -> None:
    assert memory.available_bytes("cpu") > 2**20
