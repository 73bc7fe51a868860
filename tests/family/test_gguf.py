"""GGUF files are models like any other, wherever a MODEL is taken; what is none says why."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from cli.command import run
from family.gguf_files import TEMPLATE, written
from trol import load_model
from trol.depth import attach, attached
from trol.errors import DataError, HostError, TrolError, UsageError
from trol.family.loading import load_host
from trol.host.weights import is_quantised
from trol.policies.mixer import TrolMixer


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The only GGUF file of its folder, besides other files."""
    folder = tmp_path_factory.mktemp("gguf")
    (folder / "README.md").write_text("# a model")
    return written(folder / "host-Q8_0.gguf", layers=4)


@pytest.fixture(scope="module")
def model(file: Path) -> Any:
    return load_host(file)


def test_it_opens_with_its_full_weights_by_each_of_its_names(file: Path, model: Any) -> None:
    ids = torch.arange(3, 12)[None]
    with torch.no_grad():
        for name, settings in (
            *((place, {}) for place in (file, str(file), file.parent)),
            (file.parent, {"gguf_file": file.name}),
            (file.parent.parent, {"subfolder": file.parent.name}),
        ):
            opened, tokenizer = load_model(name, **settings)
            assert not is_quantised(opened)
            assert torch.equal(opened(ids).logits, model(ids).logits)
            assert tokenizer.decode(tokenizer("hello")["input_ids"]) == "hello"
            assert tokenizer.chat_template == TEMPLATE
            assert opened.generation_config.eos_token_id == 2


@pytest.mark.parametrize("kind", ["Q4_0", "Q5_1", "Q8_0", "F16", "F32"])
def test_what_its_weights_were_is_said(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By its own name and by its folder's, and of a folder made of it no more."""
    file = written(tmp_path / "file" / "x.gguf", kind=kind)
    bits = int(kind[1:].partition("_")[0])
    for name in (file, file.parent):
        assert run("info", name, "--json") == 0
        said = json.loads(capsys.readouterr().out)["weights"]
        assert said.startswith(f"{bits}-bit ({kind} ")
        assert ("widened to float32" in said) == (bits < 16)
        assert said.endswith("; x.gguf")
    assert run("export", file, tmp_path / "made", "--plan", "all", "--unmeasured") == 0
    assert run("info", tmp_path / "made", "--json") == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["weights"] == "as they lie there"


def test_it_can_be_saved_with_a_policy(file: Path, tmp_path: Path) -> None:
    """transformers refuses to save one."""
    model = attach(load_host(file), TrolMixer(initial_gate=0.3))
    model.save_pretrained(tmp_path)
    again = load_host(tmp_path)
    ids = torch.arange(3, 12)[None]
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)
    assert attached(again)[1].depth_policy == TrolMixer(initial_gate=0.3)


CHATS = "".join(
    json.dumps(
        {
            "messages": [
                {"role": "user", "content": f"what is {number}?"},
                {"role": "assistant", "content": f"a number {number}"},
            ]
        }
    )
    + "\n"
    for number in range(12)
)
ROWS = ["data=chat.jsonl", "batch=4", "accumulate=1"]
STEPS = " ".join(f"stages.{step}.{row}" for step in ("step1", "step2") for row in ROWS)
VERBS = {
    "chat": "MODEL --question hello --max-new-tokens 3",
    "info": "MODEL",
    "eval": "MODEL --tasks text:notes.txt --window 32",
    "plan": "MODEL --method influence --keep 0.5 --task chat:chat.jsonl --questions 2",
    "curve": "MODEL --methods skip --keep 0.5 --tasks chat:chat.jsonl --questions 2",
    "oracle": "MODEL --menu uniform:2 --task chat:chat.jsonl --questions 2 --samples 2",
    "calibrate": "MODEL --exit margin --quality 0.1 --questions 4 --task chat:chat.jsonl",
    "export": "MODEL made --plan 0-2",
    "train": f"any-llm host=MODEL precision=fp32 stages.step2.lora=2 {STEPS}",
    "data": "check chat.jsonl --processor MODEL --workers 1",
}
"""Verb that takes a MODEL -> words that end soon."""


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_takes_it(
    verb: str, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    Path("chat.jsonl").write_text(CHATS)
    Path("notes.txt").write_text("one text of a few words, " * 10)
    assert run(verb, *VERBS[verb].replace("MODEL", str(file)).split()) == 0


def test_a_file_that_is_cut_off_anywhere_says_so(file: Path, tmp_path: Path) -> None:
    whole = file.read_bytes()
    cut = tmp_path / "cut.gguf"
    for length in (0, 3, 4, 23, 24, 60, 300, 2000, 5000, len(whole) // 2, len(whole) - 1):
        cut.write_bytes(whole[:length])
        with pytest.raises(TrolError, match=r"no GGUF file|download it again") as raised:
            load_model(cut)
        assert "\n" not in str(raised.value), length
        said = str(raised.value)  # the cure first, and behind it what its reader says
        assert re.search(r"download it again.* Its reader says: |no GGUF file", said), length


@pytest.mark.parametrize(
    ("name", "content", "error", "told"),
    [
        ("x.gguf", None, UsageError, "no GGUF file"),
        ("x.gguf", b"", DataError, "begins with b''"),
        ("x.gguf", b"PK\x03\x04...", DataError, "no GGUF file"),
        ("x.onnx", b"PK\x03\x04...", UsageError, "the folder that holds the model, or a GGUF"),
    ],
)
def test_what_is_no_gguf_file_is_refused(
    name: str, content: bytes | None, error: type[TrolError], told: str, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(error, match=told):
        load_model(tmp_path / name)


def test_an_unknown_family_is_named(tmp_path: Path) -> None:
    with pytest.raises(HostError, match="frobnicator"):
        load_model(written(tmp_path / "x.gguf", family="frobnicator"))


def test_of_several_files_one_must_be_named(file: Path, tmp_path: Path) -> None:
    for name in ("a.gguf", "b.gguf"):
        shutil.copy(file, tmp_path / name)
    with pytest.raises(UsageError, match=r"2 GGUF files \(a.gguf, b.gguf\); name one"):
        load_host(tmp_path)
    load_host(tmp_path, gguf_file="b.gguf")


def test_its_weights_are_not_quantised_once_more(file: Path) -> None:
    with pytest.raises(UsageError, match="leave bits out"):
        load_model(file, bits=4)


def test_without_the_package_the_error_names_it(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trol.family.gguf.find_spec", lambda name: None)
    with pytest.raises(HostError, match="pip install gguf"):
        load_model(file)
