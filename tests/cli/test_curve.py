"""`trol curve`: files that agree with its JSON, and bad input refused before anything is opened."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import trol
from cli import command
from trol.depth import attached
from trol.depth.policy import Plain
from trol.evaluation import curve as points
from trol.evaluation import plan_search, timing
from trol.evaluation.curve_methods import Candidate
from trol.evaluation.items import Item
from trol.evaluation.tasks import task_of
from trol.family import TrolForConditionalGeneration, tiny, tiny_processor
from trol.policies.controller import Controller

WORDS = "which digit is on the yellow tile? is there a 7? how many red tiles are there?"


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> TrolForConditionalGeneration:
    """A tiny random model of four layers that every name loads, measured in a moment."""
    monkeypatch.setattr(points, "ROUNDS", 1)
    monkeypatch.setattr(plan_search, "QUESTIONS", 2)
    monkeypatch.setattr(timing.gc, "collect", lambda: 0)
    torch.manual_seed(0)
    processor = tiny_processor([WORDS])
    config = tiny(len(processor.tokenizer), hidden_size=32, layers=4)
    made = TrolForConditionalGeneration(config).eval()
    monkeypatch.setitem(vars(trol), "load_model", lambda name: (made, processor))
    return made


def run(out: Path, *words: str) -> int:
    short = ["--tasks", "boards", "--questions", "3", "--out", str(out)]
    return command.run("curve", *short, *words)


def test_the_json_is_the_file_and_alone_on_stdout(
    model: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "made" / "curve"
    asked = ["--methods", "skip,influence", "--keep", "0.5:1.0:0.5", "--seeds", "2", "--json"]
    assert run(out, *asked) == 0
    result = json.loads(capsys.readouterr().out)
    assert result == json.loads((out / "curve.json").read_text())
    assert result["keep"] == [0.5, 1.0]
    assert result["seeds"] == [0, 1]
    assert list(result["tasks"]["boards"]["methods"]) == ["skip", "influence"]
    assert result["run"]["versions"]["torch"]
    assert result["model"] == "trol-tiny"
    assert {path.name for path in out.iterdir()} == {
        "curve.json",
        "curve.html",
        *(f"boards-{chart}.png" for chart in ("visits", "flops", "time", "cosine")),
    }
    assert attached(model)[1].depth_policy.name == "trol_mixer"


def test_people_get_a_table_and_the_page(
    model: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path, "--methods", "exit", "--keep", "0.5", "--seeds", "1") == 0
    text = capsys.readouterr().out
    assert "exit 0-1" in text
    assert text.splitlines()[-1] == str(tmp_path / "curve.html")


def test_a_controller_of_an_adapter_folder(
    model: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = attached(model)[1].depth_policy
    gates = {name: t.clone() for name, t in model.state_dict().items() if ".depth." in name}
    trol.detach(model)
    trol.attach(model, Controller(initial=0.01))
    folder = str(trol.save(model, tmp_path / "controller"))
    trol.detach(model)
    trol.attach(model, own)
    model.load_state_dict(gates, strict=False)
    asked = ["--methods", "controller", "--adapters", folder, "--seeds", "1", "--json"]
    assert run(tmp_path / "out", *asked) == 0
    half, full = json.loads(capsys.readouterr().out)["tasks"]["boards"]["methods"]["controller"][
        "points"
    ]
    assert half["settings"] == {"adapter": folder}
    assert (half["visits_share"]["mean"], full["visits_share"]["mean"]) == (0.5, 1)
    assert attached(model)[1].depth_policy == own
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in gates.items())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--keep", "0:1"], "above 0 and at most 1"),
        (["--keep", "0.5-1"], "give first:last"),
        (["--methods", "skipp"], "Did you mean 'skip'"),
        (["--methods", ","], "no method named"),
        (["--methods", "oracle"], "trol oracle MODEL"),
        (["--scope", "answers"], "Did you mean 'answer'"),
        (["--shard", "2/2"], "give I/N with I from 0 to N - 1"),
        (["--tasks", "bords"], "Did you mean 'boards'"),
        (["--methods", "controller"], "trol train RECIPE"),
        (["--methods", "router"], "holds a router"),
        (["--methods", "oracle", "--oracle", "absent"], "no finished oracle"),
    ],
)
def test_bad_input_is_refused_and_leaves_nothing(
    model: Any, words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert run(out, *words) == 2
    result = capsys.readouterr()
    assert message in result.err
    assert not result.out
    assert not out.exists()


def test_an_interrupted_curve_goes_on_where_it_was_stopped(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, measure = tmp_path / "out", points.measure
    words = ("--methods", "skip,exit", "--keep", "0.5", "--seeds", "1")
    measured: list[Any] = []

    def interrupted(*what: Any) -> Any:
        if len(measured) == 2:
            raise KeyboardInterrupt
        measured.append(what)
        return measure(*what)

    monkeypatch.setattr(points, "measure", interrupted)
    assert run(out, *words) == 130
    assert [path.name for path in out.iterdir()] == ["points-0-of-1.jsonl"]
    monkeypatch.setattr(points, "measure", lambda *what: (measured.append(what), measure(*what))[1])
    assert run(out, *words) == 0
    assert len(measured) == 3  # the full model, skip, exit
    assert not list(out.glob("points-*"))
    assert run(out, "--methods", "skip", "--keep", "0.5") == 0  # another curve may take its place


def test_points_of_questions_that_were_edited_are_measured_anew(model: Any) -> None:
    names: list[str] = []
    for question in ("is it red?", "is it blue?"):
        item = Item(None, question, "yes", "colour")
        sample = points.Sample(model, None, task_of("boards"), [item])
        candidate = Candidate(None, {}, model, (Plain(),))
        names += points.Drawing("boards", [sample], candidate, {}, {}).names(candidate)
    assert len(set(names)) == 2
