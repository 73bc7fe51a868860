"""`trol convert`: makes a folder that `trol chat` opens, and says what it refuses."""

import json
import warnings
from pathlib import Path

import pytest
from PIL import Image

from cli.command import run
from family.published.folders import FAMILIES, published_folder
from trol.family.published import conversion


@pytest.mark.parametrize("family", FAMILIES)
def test_convert_then_chat(family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = published_folder(tmp_path / "source", family)
    picture = tmp_path / "picture.png"
    Image.new("RGB", (30, 20), "red").save(picture)
    assert run("convert", source, tmp_path / "made", "--dtype", "float16", "--json") == 0
    captured = capsys.readouterr()
    made = json.loads(captured.out)
    assert (made["family"], made["dtype"], made["sharing"]) == (family, "float16", "shared")
    assert made["bytes"] == 2 * made["parameters"]
    assert "writing 1/1" in captured.err
    answers = []
    for model in (source, tmp_path / "made"):
        words = ("--image", picture, "--question", "which digit?", "--max-new-tokens", 3)
        assert run("chat", "--model", model, *words, "--json") == 0
        answers.append(json.loads(capsys.readouterr().out))
    assert answers[0]["prompt_tokens"] == answers[1]["prompt_tokens"]


def test_for_people(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = published_folder(tmp_path / "source", "phi3")
    assert run("convert", source, tmp_path / "made") == 0
    said = capsys.readouterr().out
    assert "in 1 file; gates shared; opened anew and equal to" in said
    assert f"trol chat {tmp_path / 'made'}" in said


@pytest.mark.parametrize("words", [["convert", "NEW"], ["chat", "--question", "why?"]])
def test_gates_that_differ_are_one_plain_line(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = published_folder(tmp_path / "source", "phi3", sharing="per_layer")
    verb, *rest = (str(tmp_path / "new") if word == "NEW" else word for word in words)
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        assert run(verb, source, *rest) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if "gates" in line]
    assert lines
    assert all(line.startswith(f"trol: the gates in {source}") for line in lines)


@pytest.mark.parametrize("begun", [False, True])
def test_interrupted(
    begun: bool,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    source = published_folder(tmp_path / "source", "phi3")
    monkeypatch.setattr(conversion, "_write_rest" if begun else "published_processor", stopped)
    assert run("convert", source, tmp_path / "made") == 130
    said = capsys.readouterr().err.splitlines()[-1]
    assert ("are kept, and the same command goes on" in said) == begun
    assert ("before anything was written" in said) != begun
    assert (tmp_path / "made" / "model.safetensors").exists() == begun


def test_chat_without_such_a_folder(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("chat", "./nosuch", "--question", "why?") == 2
    said = capsys.readouterr().err
    assert "there is no such folder here" in said
    assert "trol-tiny" in said


def test_chat_in_four_bits_that_do_not_fit(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("bitsandbytes")
    assert run("chat", "trol-tiny", "--question", "why?", "--bits", 4) == 1
    captured = capsys.readouterr()
    assert "has the shape [170, 64]" in captured.err
    assert "--bits 8" in captured.err


def test_chat_with_bits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("bitsandbytes")
    source = published_folder(tmp_path / "source", "internlm2")
    words = ("chat", source, "--question", "which digit?", "--max-new-tokens", 3, "--json")
    assert run(*words, "--bits", 4) == 0
    assert json.loads(capsys.readouterr().out)["new_tokens"] >= 1


def test_one_model_is_named_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("chat", "here", "--model", "there", "--question", "why?") == 2
    assert "name one" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["SOURCE", "SOURCE/made"], 2, "lies within"),
        (["SOURCE", "FULL"], 2, "not empty"),
        (["SOURCE", "NEW", "--dtype", "float61"], 2, "Did you mean 'float16'?"),
        (["FULL", "NEW"], 1, "(missing here: config.json, trol_gating.pt)"),
        (["nobody/nothing", "NEW"], 1, "no folder here"),
        (["nosuch", "NEW"], 2, "no such folder here"),
        (["SOURCE/config.json", "NEW"], 2, "is a file; give the folder"),
        (["trol-tiny", "NEW"], 2, "a model that trol ships"),
        (["", "NEW"], 2, "the name of the model is empty"),
        (["SOURCE", ""], 2, "the destination is empty"),
    ],
)
def test_refused(
    words: list[str],
    code: int,
    says: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source, full = published_folder(tmp_path / "SOURCE", "phi3"), tmp_path / "FULL"
    full.mkdir()
    (full / "letter.txt").write_text("mine")
    places = {
        "SOURCE": source,
        "SOURCE/made": source / "made",
        "SOURCE/config.json": source / "config.json",
        "FULL": full,
        "NEW": tmp_path / "new",
    }
    assert run("convert", *(places.get(word, word) for word in words)) == code
    captured = capsys.readouterr()
    assert says in captured.err
    assert "Traceback" not in captured.err
    assert captured.out == ""


def test_bits_that_do_not_exist(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("chat", "trol-tiny", "--question", "x", "--bits", "3") == 2
    assert "bits is 3; give 4 or 8" in capsys.readouterr().err
