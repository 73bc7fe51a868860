"""`trol map`: the picture and its JSON agree with the trace."""

import json
from pathlib import Path

import pytest
from PIL import Image

from trol.cli import main

pytestmark = pytest.mark.usefixtures("tiny_model", "traced")


def test_map_writes_a_picture_and_its_numbers(
    board: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "made" / "map"
    words = ["--image", board, "--question", "is there a 7?", "--out", str(out), "--json"]
    with pytest.raises(SystemExit) as left:
        main(["map", *words])
    assert left.value.code == 0
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads((out / "map.json").read_text())
    assert found["image"]["grid"] == [3, 3]
    assert found["gate_per_layer"] == pytest.approx([0.9, 0.6333, 0.3667, 0.1])
    assert found["image"]["visits"][0] == [2] * 9
    assert found["image"]["visits"][-1] == [1] * 9
    assert found["words"]["text"] == ["is", "there", "a", "7", "?"]
    assert found["run"]["versions"]["trol"]
    with Image.open(out / "map.png") as picture:
        assert picture.width > 500


def test_a_bad_picture_leaves_nothing(tmp_path: Path) -> None:
    out = tmp_path / "map"
    with pytest.raises(SystemExit) as left:
        main(["map", "--image", "absent.png", "--question", "x", "--out", str(out)])
    assert left.value.code == 1
    assert not out.exists()
