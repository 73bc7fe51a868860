"""Every code block of the README and the docs runs: Python as it stands, commands up to their verb.

Pretrained models are replaced by a tiny one of as many layers; tests/pretrained runs on the real
one. What a verb then does has tests of its own.
"""

from __future__ import annotations

import importlib
import re
import runpy
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import typer
from PIL import Image
from transformers import LlamaForCausalLM

import trol
from trol.cli import VERBS, application
from trol.family.presets import byte_level_tokenizer, text_decoder
from trol.family.pretrained import NAMES
from trol.host.names import CACHE
from trol.studies import STUDIES, study_of

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
DOCUMENTS = [path for path in DOCUMENTS if path.name not in ("CHANGELOG.md", "LAB.md")]
TEXT = re.DOTALL | re.MULTILINE
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", TEXT)
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"


def python_blocks(path: Path) -> list[str]:
    return [code for kind, code in FENCED.findall(path.read_text()) if kind == "python"]


def commands(path: Path) -> list[str]:
    """Indented lines that begin with a program's name, without their comments."""
    indented = re.findall(r"^    (\S.*)$", FENCED.sub("", path.read_text()), re.MULTILINE)
    lines = [re.split(r"\s+#", line)[0] for line in indented]
    return [line for line in lines if line.split()[0] in ("trol", "make", "python", "torchrun")]


def tiny_host() -> tuple[Any, Any]:
    tokenizer = byte_level_tokenizer(["Why is the sky blue?"], 300)
    tokenizer.chat_template = TEMPLATE
    torch.manual_seed(0)
    config = text_decoder(tokenizer, hidden_size=32, layers=30, heads=2, positions=256)
    return LlamaForCausalLM(config).eval(), tokenizer


def test_the_readme_has_as_many_commands_as_its_heading_says() -> None:
    counted = re.findall(r"^## (\w+) commands$(.*?)^## ", (ROOT / "README.md").read_text(), TEXT)
    for number, text in counted:
        lines = re.findall(r"^    (\S.*)$", FENCED.sub("", text), re.MULTILINE)
        assert len(lines) == ["Zero", "One", "Two", "Three", "Four", "Five"].index(number)
    assert counted


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    """What a block may use without making it: the model of the pages, in an empty folder."""
    model, tokenizer = tiny_host()
    trol.attach(model, "0-11 12-13:2 14-29")
    folder = tmp_path / "saved"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    vlm, processor = trol.load_model("trol-tiny")
    trol.save(vlm, tmp_path / "runs" / "sparse")
    Image.new("RGB", (60, 60), "red").save(tmp_path / "photo.jpg")
    load_local = trol.load_model

    def or_tiny(auto: Any, which: int) -> None:
        local = auto.from_pretrained

        def from_pretrained(name: Any, *args: Any, **kwargs: Any) -> Any:
            there = Path(name).exists()
            return local(name, *args, **kwargs) if there else tiny_host()[which]

        monkeypatch.setattr(auto, "from_pretrained", from_pretrained)

    def load_model(name: Any, **kwargs: Any) -> Any:
        if str(name).startswith("BK-Lee/"):
            return vlm, processor
        return tiny_host() if name in NAMES else load_local(name, **kwargs)

    or_tiny(transformers.AutoModelForCausalLM, 0)
    or_tiny(transformers.AutoTokenizer, 1)
    monkeypatch.setattr(trol, "load_model", load_model)
    monkeypatch.setattr(torch, "compile", lambda model, **_: model)  # tests/laws compile
    monkeypatch.chdir(tmp_path)
    inputs = tokenizer("Why?", return_tensors="pt", return_token_type_ids=False)
    return {"model": model, "tokenizer": tokenizer, "inputs": inputs, "folder": folder}


@pytest.mark.parametrize("path", [p for p in DOCUMENTS if python_blocks(p)], ids=lambda p: p.name)
def test_python_blocks_run(path: Path, hub: dict[str, Any]) -> None:
    for code in python_blocks(path):
        # The page says what the argument is called before transformers 5.24.
        exec(compile(code.replace("cache=cache", f"{CACHE}=cache"), str(path), "exec"), hub)


@pytest.mark.parametrize(
    "line", sorted({line for path in DOCUMENTS for line in commands(path)}), ids=lambda line: line
)
def test_commands_are_accepted(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    words = shlex.split(line)
    accepted: dict[str, Callable[[list[str]], None]] = {
        "make": lambda words: _is_target(words[1]),
        "python": lambda words: _is_file(words[1:]),
        "torchrun": lambda words: _reaches(words[words.index("trol") + 1 :], monkeypatch),
        "trol": lambda words: _reaches(words[1:], monkeypatch),
    }
    accepted[words[0]](words)


def _is_target(name: str) -> None:
    assert re.search(rf"^{name}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


def _is_file(words: list[str]) -> None:
    assert importlib.util.find_spec(words[1]) if words[0] == "-m" else (ROOT / words[0]).is_file()


def _reaches(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The words are parsed and reach their verb, whose work is replaced here."""
    importlib.import_module(VERBS[words[0]].split(":")[0])
    command: Any = typer.main.get_command(application(words))
    command = command.commands[words[0]]
    reached: list[dict[str, Any]] = []
    monkeypatch.setattr(command, "callback", lambda **given: reached.append(given))
    command.main(words[1:], standalone_mode=False)
    assert len(reached) == 1


def test_the_tables_of_studies_say_what_the_results_say() -> None:
    for page, text in runpy.run_path(str(ROOT / "docs" / "studies.py"))["written"]().items():
        assert page.read_text(encoding="utf-8") == text, "run python docs/studies.py"
        assert "| reproduced |" in text


def test_claims_name_claims_of_studies_and_entries_of_the_lab_book() -> None:
    page = runpy.run_path(str(ROOT / "docs" / "studies.py"))
    entries = re.findall(r"^## \S+ · (.*)$", (ROOT / "LAB.md").read_text(), re.MULTILINE)
    for claim in (claim for group in page["claimed"]() for claim in group["claims"]):
        assert claim.get("by") or claim.get("open"), f"nothing decides {claim['claim']!r}"
        assert claim.get("lab", entries[0]) in entries
        for study, texts in claim.get("by", {}).items():
            if study in STUDIES or texts:
                claims = [one.text for one in study_of(study).claims]
                assert set(texts) <= set(claims), f"{study} claims: {claims}"
                assert texts, f"{claim['claim']!r} names no claim of {study}"


def test_a_claim_without_a_result_is_not_run_and_one_that_names_none_is_refused() -> None:
    page = runpy.run_path(str(ROOT / "docs" / "studies.py"))
    assert next(page["deciders"]({"claim": "", "by": {"to-come": []}}))[2] == "not run"
    with pytest.raises(ValueError, match="no claim of the study oracle"):
        list(page["deciders"]({"claim": "", "by": {"oracle": []}}))


def test_the_picture_of_the_rooms_is_what_the_imports_are() -> None:
    drawn = runpy.run_path(str(ROOT / "docs" / "rooms.py"))["drawing"]()
    assert (ROOT / "docs" / "rooms.svg").read_text() == drawn, "run python docs/rooms.py"
