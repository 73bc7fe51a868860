"""The checker itself: it passes what agrees, and misses nothing that does not."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from .__main__ import main
from .made import make_set


@pytest.fixture(scope="module", params=["internlm2", "phi3"])
def folder(request, tmp_path_factory):
    made = tmp_path_factory.mktemp(request.param)
    make_set(made, request.param)
    return made


@pytest.fixture
def copy(folder, tmp_path):
    """The same set, to be spoilt."""
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def spoil(folder, change):
    tensors = load_file(folder / "expected.safetensors")
    change(tensors)
    save_file(tensors, folder / "expected.safetensors")


def misses(out):
    return [line for line in out.splitlines() if "MISS" in line]


def test_a_set_that_agrees_passes(folder, capsys):
    assert main([str(folder)]) == 0
    out = capsys.readouterr().out
    assert not misses(out)
    assert "0 missed" in out
    assert "own: traversal off" in out


@pytest.mark.parametrize(
    "name", ["text_batch_pad.logits", "text_batch_pad.cache_k", "text_batch_pad.gate", "train.loss"]
)
def test_a_changed_number_is_a_miss(copy, capsys, name):
    def change(tensors):
        tensors[name][..., -1:] += 1e-2  # the last token of the last row is no padding

    spoil(copy, change)
    assert main([str(copy)]) == 1
    (line,) = misses(capsys.readouterr().out)
    assert line.split()[1] == name.partition(".")[2]


def test_changed_ids_and_counts_are_misses(copy, capsys):
    def change(tensors):
        tensors["text_batch_pad.gen_ids"][0, 0] += 1

    spoil(copy, change)
    facts = json.loads((copy / "expected.json").read_text(encoding="utf-8"))
    facts["text_batch_pad.gate_calls"] += 1
    (copy / "expected.json").write_text(json.dumps(facts), encoding="utf-8")
    assert main([str(copy)]) == 1
    assert [line.split()[1] for line in misses(capsys.readouterr().out)] == [
        "gate_calls",
        "gen_ids[0]",
    ]


def test_what_nobody_looked_at_is_a_miss(copy, capsys):
    spoil(copy, lambda tensors: tensors.update({"text_batch_pad.novelty": torch.zeros(2)}))
    assert main([str(copy)]) == 1
    (line,) = misses(capsys.readouterr().out)
    assert "novelty" in line
    assert "not checked" in line


def test_a_folder_without_a_set_is_a_usage_error(tmp_path, capsys):
    assert main([str(tmp_path)]) == 2
    assert "give a folder with config.json" in capsys.readouterr().err
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    assert main([str(tmp_path)]) == 2
    assert main([]) == 2
