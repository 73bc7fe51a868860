"""`trol calibrate`: from a saved model to an adapter of calibrated exits."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

import trol
from cli.command import run
from training import standins
from trol.data.own_files import Pair
from trol.data.pairs import BUILT_IN
from trol.depth import attached
from trol.depth.attachment import gates_of
from trol.policies.exits import EarlyExit


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = standins.llm(tmp_path_factory.mktemp("llama"), num_hidden_layers=4)
    model, _ = trol.load_model(folder)
    source = torch.Generator().manual_seed(0)
    for weight in model.parameters():
        if weight.ndim > 1:
            weight.data = 0.2 * torch.randn(weight.shape, generator=source)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def few_docstrings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Short pairs in the place of the library's; the splits that were asked for."""
    splits: list[str] = []

    def pairs(split: str, *, limit: int | None = None, **_: Any) -> list[Pair]:
        splits.append(split)
        source = random.Random(0)
        said = [" ".join(source.choices(standins.ANSWERED, k=3)) for _ in range(40)]
        return [Pair(standins.ASKED[i % 4], text, "words") for i, text in enumerate(said)][:limit]

    monkeypatch.setitem(BUILT_IN, "docstrings", pairs)
    return splits


def test_an_adapter_is_written(
    llama: str, tmp_path: Path, few_docstrings: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "adapter"
    words = ("calibrate", llama, "--exit", "entropy", "--quality", 0.6, "--confidence", 0.7)
    assert run(*words, "--first", 2, "--out", out, "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert few_docstrings == ["validation"]
    assert result["ran"]["quality"] >= 0.6
    assert result["ran"]["executed"] < 1
    assert json.loads((out / "calibration.json").read_text()) == result
    model = trol.load(trol.load_model(llama)[0], out)
    policy = attached(model)[1].depth_policy
    assert isinstance(policy, EarlyExit)
    assert policy.settings() == result["policy"]
    assert (policy.measure, policy.first) == ("entropy", 2)
    assert result["run"]["command"]
    told = json.loads(ask(capsys, llama, "--depth", out))["tasks"]["docstrings"]
    assert told["depth_columns"]["layer_visits_per_token"] < 4  # tokens leave


def ask(capsys: pytest.CaptureFixture[str], *words: Any) -> str:
    assert run("eval", *words, "--tasks", "docstrings", "--questions", 8, "--json") == 0
    return capsys.readouterr().out


def flops_share(out: Path) -> float:
    return json.loads((out / "calibration.json").read_text())["flops_share"]


def test_people_get_sentences(
    llama: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "adapter"
    assert (
        run("calibrate", llama, "--exit", "margin", "--cost", 1.0, "--questions", 8, "--out", out)
        == 0
    )
    text = capsys.readouterr().out
    assert "100.0 % of the tokens agree" in text
    assert f"Written to {out}; trol.load(model, {str(out)!r}) attaches it." in text
    assert "p =" not in text
    assert "% of the FLOPs per answer token, looks included; 100.0 % of the tokens" in text
    assert flops_share(out) > 1  # no token leaves, and the looks come on top
    assert "save nothing on this model" in text
    assert "(--every K)" in text


def test_trained_heads_stay(llama: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A model with exit heads: only the threshold is new; looks they are not for are refused."""
    model, processor = trol.load_model(llama)
    trol.attach(model, EarlyExit("margin", 0.5, first=2, heads=True))
    for gate in gates_of(attached(model)[1]):
        if gate is not None:
            torch.nn.init.normal_(gate.weight, std=0.1)
    heads = tmp_path / "heads"
    model.save_pretrained(heads)
    processor.save_pretrained(heads)
    out = tmp_path / "adapter"
    assert run("calibrate", heads, "--cost", 0.9, "--questions", 16, "--out", out) == 0
    fresh = trol.load(trol.load_model(llama)[0], out)
    pairs = zip(gates_of(attached(fresh)[1]), gates_of(attached(model)[1]), strict=True)
    for mine, theirs in pairs:
        assert (mine is None) == (theirs is None)
        assert mine is None or torch.equal(mine.weight, theirs.weight)
    capsys.readouterr()
    assert run("calibrate", heads, "--cost", 0.9, "--first", 1, "--out", out) == 2
    assert "were trained for first=2" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--exit", "margins"), "Did you mean 'margin'"),
        (
            ("--exit", "margin", "--quality", 0.9, "--cost", 0.5),
            "either a wanted quality or a wanted cost",
        ),
        (("--exit", "margin", "--quality", 0.95, "--questions", 20), "give 45 or more"),
        (("--exit", "margin", "--quality", 0.95, "--questions", 100), "40 answers cannot show"),
        (("--exit", "margin", "--quality", 0.5, "--first", 4), "the stack has layers 0 to 3"),
        (("--data", "docstring"), "Did you mean 'docstrings'"),
    ],
)
def test_bad_usage(
    llama: str, words: tuple, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("calibrate", llama, *words, "--out", tmp_path / "out") == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_folder_with_something_else_in_it_is_refused_first(
    llama: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("calibrate", "absent/model", "--cost", 0.9, "--out")
    assert run(*words, llama) == 2
    assert "config.json" in (said := capsys.readouterr().err)
    assert "name a folder that is new or empty" in said
    file = tmp_path / "file"
    file.write_text("")
    for place in (file, file / "below", "/proc/nope"):
        assert run(*words, place) == 2
        assert f"cannot write into '{place}'" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [file]


def test_an_adapter_is_written_over(llama: str, tmp_path: Path) -> None:
    for cost in (1.0, 0.9):
        words = ("--cost", cost, "--questions", 8, "--out", tmp_path / "adapter")
        assert run("calibrate", llama, "--exit", "margin", "--task", "docstrings", *words) == 0
    assert json.loads((tmp_path / "adapter" / "calibration.json").read_text())["cost"] == 0.9
