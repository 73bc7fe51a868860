"""`trol map`: the picture and its JSON agree with the trace."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from cli import command
from trol.cli.models import write_plan
from trol.depth import Plan

pytestmark = pytest.mark.usefixtures("tiny_model")


def run(board: str, out: Path, *words: str) -> int:
    asked = ["--image", board, "--question", "is there a 7?", "--out", str(out), "--json"]
    return command.run("map", *asked, *words)


def test_map_writes_a_picture_and_its_numbers(
    board: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "made" / "map"
    assert run(board, out) == 0
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert result == json.loads((out / "map.json").read_text())
    assert result["layers"] == 4
    assert result["image"]["grid"] == [3, 3]
    assert result["image"]["visits"] == [[2] * 9] * 4
    assert all(0 < gate < 1 for layer in result["image"]["gates"] for gate in layer)
    asked = ["<bos>", "<user>", "is", "there", "a", "7", "?", "<assistant>"]
    assert result["words"]["text"] == asked
    assert result["cost"]["layer_visits"] > 0
    assert result["run"]["versions"]["torch"]
    with Image.open(out / "map.png") as picture:
        assert picture.width > 500


@pytest.mark.filterwarnings("default:the page could not be made")
def test_numbers_outlive_their_picture(
    board: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("trol.reports.maps.draw", lambda _: 1 / 0)
    assert run(board, tmp_path) == 0
    captured = capsys.readouterr()
    assert f"the results are kept in {tmp_path / 'map.json'}" in captured.err
    assert json.loads(captured.out) == json.loads((tmp_path / "map.json").read_text())


def test_map_of_a_plan(board: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(board, tmp_path, "--depth", "0-1:2 2-3") == 0
    result = json.loads(capsys.readouterr().out)
    assert result["gate_per_layer"] == [1, 1, 0, 0]
    assert [layer[0] for layer in result["image"]["visits"]] == [2, 2, 1, 1]


def test_a_plan_file_is_a_depth(
    board: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan, out = tmp_path / "plan.json", tmp_path / "map"
    write_plan(plan, Plan("0-1:2 2"), 4, {"method": "by hand"})
    assert run(board, out, "--depth", str(plan)) == 0
    result = json.loads(capsys.readouterr().out)
    assert [layer[0] for layer in result["image"]["visits"]] == [2, 2, 1, 0]
    assert result["depth"] == "0-1:2 2"
    assert run(board, out, "--depth", str(tmp_path / "absent.json")) == 2
    assert "there is no plan file" in capsys.readouterr().err


def test_a_bad_picture_leaves_nothing(tmp_path: Path) -> None:
    out = tmp_path / "map"
    assert run("absent.png", out) == 1
    assert not out.exists()


def test_an_empty_question_leaves_nothing(board: str, tmp_path: Path) -> None:
    out = tmp_path / "map"
    assert run(board, out, "--question", " ") == 2
    assert not out.exists()
