"""A command opens models and folders of adapters by the same word."""

import json
from pathlib import Path

import pytest

from cli.command import run
from hosts import HOSTS
from training import standins
from trol import training
from trol.errors import HostError
from trol.family.loading import load_host
from trol.reports.description import describe


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters")
    data = standins.chats(folder / "data", pictures=False)
    host = standins.llm(folder / "host")
    stages = [f"stages.{name}.data={data}" for name in ("step1", "step2")]
    small = [
        f"stages.{name}.{key}" for name in ("step1", "step2") for key in ("batch=4", "accumulate=1")
    ]
    recipe = training.resolve("any-llm", [f"host={host}", "precision=fp32", *stages, *small])
    training.run(recipe, folder / "run")
    return folder / "run"


def test_chat_with_a_folder_of_adapters(adapters: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("chat", adapters, "--question", "say a word.", "--max-new-tokens", 2, "--json")
    assert run(*words) == 0
    assert json.loads(capsys.readouterr().out)["model"] == str(adapters)


def test_bits_are_the_recipes(adapters: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("chat", adapters, "--question", "say a word.", "--bits", 4) == 2
    assert "leave bits out" in capsys.readouterr().err


def test_a_finished_run_is_not_trained_over(
    adapters: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("train", "any-llm", "--out", adapters) == 2
    assert "holds a finished run" in capsys.readouterr().err


def test_a_chat_file_is_checked_as_a_mixture_of_itself(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = standins.chats(tmp_path, pictures=True)
    assert run("data", "check", data, "--workers", 1, "--json") == 0
    assert json.loads(capsys.readouterr().out)["sources"][0]["sound"] == 8


@pytest.mark.filterwarnings("always:rows of chat left out")
def test_rows_that_training_leaves_out_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    host, data = standins.llm(tmp_path / "host"), standins.chats(tmp_path / "data", pictures=False)
    with Path(data).open("a", encoding="utf-8") as file:
        file.write("{broken\n")
    assert run("data", "check", data, "--workers", 1) == 1
    stages = [
        f"stages.{name}.{key}" for name in ("step1", "step2") for key in ("batch=4", "accumulate=1")
    ]
    files = [f"stages.{name}.data={data}" for name in ("step1", "step2")]
    words = ("train", "any-llm", f"host={host}", "precision=fp32", *stages, *files)
    assert run(*words, "--out", tmp_path / "made") == 0
    assert "left out as quarantined: 1 " in capsys.readouterr().err


def test_folders_that_are_damaged_are_refused_in_one_line(tmp_path: Path) -> None:
    """A weights file that was cut off, and a configuration that cannot be."""
    HOSTS["llama"].build().save_pretrained(tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    HOSTS["llama"].build().save_pretrained(tmp_path / "odd")
    config = tmp_path / "odd" / "config.json"
    entries = json.loads(config.read_text(encoding="utf-8"))
    config.write_text(json.dumps(entries | {"num_hidden_layers": 3.5}), encoding="utf-8")
    for name in ("cut", "odd"):
        with pytest.raises(HostError, match="no model can be opened from") as raised:
            load_host(tmp_path / name)
        assert "\n" not in str(raised.value)


def test_a_host_alone_needs_no_tokenizer(tmp_path: Path) -> None:
    HOSTS["llama"].build().save_pretrained(tmp_path)
    assert describe(load_host(tmp_path))["layers"] == 4
