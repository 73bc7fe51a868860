"""`trol calibrate` on a model that traverses: from its gates to an adapter with thresholds."""

import json
from functools import partial
from pathlib import Path

import pytest

import trol
from cli.command import run
from trol.depth import attached
from trol.depth.attachment import gates_of
from trol.evaluation.answers import answers
from trol.evaluation.items import board_items
from trol.evaluation.timing import time_prefills
from trol.family import TrolForConditionalGeneration

SMALL = ("--quality", 0.7, "--confidence", 0.7, "--questions", 16)


@pytest.fixture(autouse=True)
def timed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts are read once in each way, since no time is looked at."""
    monkeypatch.setattr(
        "trol.evaluation.calibration.time_prefills", partial(time_prefills, rounds=1)
    )


@pytest.fixture
def model(tiny_model: TrolForConditionalGeneration) -> TrolForConditionalGeneration:
    """Layer 0 goes again, the gates of the others are shut."""
    for layer, gate in enumerate(gates_of(attached(tiny_model)[1])):
        gate.weight.data.zero_()
        gate.bias.data.fill_(30.0 if layer == 0 else -30.0)
    return tiny_model


def test_an_adapter_is_written(
    model: TrolForConditionalGeneration, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It writes what it prints, and puts that in force on the model it was made for."""
    out = tmp_path / "sparse"
    assert run("calibrate", "any", *SMALL, "--out", out, "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert json.loads((out / "calibration.json").read_text()) == result
    assert (result["data"], result["questions"], result["quality"]) == ("boards", 16, 0.7)
    assert result["policy"]["tau"][1:] == [None] * 3
    assert result["second_visits"][1:] == [0] * 3
    assert result["cost"]["full"] == pytest.approx(2, abs=0.01)
    assert set(result["prefill"][0]["ratio"]) == {"plain", "full", "sparse"}
    assert result["run"]["command"]
    policy = attached(model)[1].depth_policy
    said = answers(model, trol.load_model("any")[1], board_items(3, 0), new_tokens=2)
    trol.load(trol.detach(model), out)
    assert attached(model)[1].depth_policy == policy
    assert answers(model, trol.load_model("any")[1], board_items(3, 0), new_tokens=2) == said


def test_people_get_sentences(
    model: TrolForConditionalGeneration, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "sparse"
    assert run("calibrate", "any", "--data", "boards", *SMALL, "--out", out) == 0
    text = capsys.readouterr().out
    assert "100.00 % of 8 answers are those of full traversal" in text
    assert "none: one visit" in text
    assert "full traversal 2.00 (predicted)" in text
    assert "Reading one question" in text
    assert text.endswith(f"trol.load(trol.detach(model), {str(out)!r}) attaches it.\n")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--quality", 1.0), "quality is 1.0, but must lie in (0, 1)"),
        (("--quality", 0), "quality is 0.0"),
        (("--confidence", 1.5), "confidence is 1.5"),
        (("--questions", 100), "give 460 or more"),
        (("--cost", 0.5), "--cost is for early exits; add --exit MEASURE"),
        (("--first", 2), "--first is for early exits"),
        (("--data", "bords"), "Did you mean 'boards'"),
        (("--data", "alpaca:absent.json"), "absent.json"),
    ],
)
def test_bad_usage(
    model: TrolForConditionalGeneration,
    words: tuple,
    said: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run("calibrate", "any", *words, "--out", tmp_path / "out") != 0
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_set_without_questions(
    model: TrolForConditionalGeneration, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    empty = tmp_path / "empty.json"
    empty.write_text("[]")
    out = tmp_path / "out"
    assert run("calibrate", "any", "--data", f"alpaca:{empty}", "--out", out) != 0
    assert "empty.json" in (said := capsys.readouterr().err) or "no questions" in said
    assert not out.exists()


def test_a_model_without_gates(
    model: TrolForConditionalGeneration, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trol.detach(model)
    assert run("calibrate", "any", *SMALL, "--out", tmp_path / "out") == 2
    said = capsys.readouterr().err
    assert "no policy, and so no gates" in said
    assert "--exit MEASURE" in said
