"""The command itself: help, exit codes, messages, start-up."""

import importlib
import json
import shlex
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from transformers import Cache

from cli.command import run
from trol import errors
from trol.cli import VERBS, application

WITHOUT_HEAVY = """
import sys, trol.cli
trol.cli.application(["--help"])
heavy = {"torch", "transformers", "numpy", "matplotlib", "sklearn", "PIL"} & set(sys.modules)
sys.exit(f"imported at start-up: {heavy}" if heavy else 0)
"""


def test_no_heavy_import_at_start_up() -> None:
    command = [sys.executable, "-c", WITHOUT_HEAVY]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


WITHOUT_TRAINING = """
import sys
from trol.cli import main
try:
    main(sys.argv[1:])
except SystemExit as left:
    trains = {"peft", "transformers.trainer", "trol.training"} & set(sys.modules)
    sys.exit(f"imported: {trains}" if trains else left.code)
"""


@pytest.mark.parametrize(
    "words",
    ["chat trol-tiny --question why --max-new-tokens 1", "plan trol-tiny --keep 0.5 --questions 1"],
)
def test_a_verb_that_does_not_train_imports_nothing_that_trains(words: str, tmp_path: Path) -> None:
    command = [sys.executable, "-c", WITHOUT_TRAINING, *words.split()]
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_help_lists_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--help") == 0
    listed = capsys.readouterr().out.partition("Commands:\n")[2].splitlines()[: len(VERBS)]
    assert [line.split()[0] for line in listed] == list(VERBS)
    assert not any(line.endswith("...") for line in listed), "a summary does not fit its line"


@pytest.mark.parametrize("verb", VERBS)
def test_help_ends_with_three_examples(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(verb, "--help") == 0
    lines = capsys.readouterr().out.rstrip().splitlines()
    assert lines[-4].strip() == "Examples:"
    assert all(line.strip().startswith(f"trol {verb}") for line in lines[-3:])


@pytest.mark.parametrize("verb", VERBS)
def test_examples_are_accepted(verb: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every example is parsed and reaches its verb (whose work is replaced here)."""
    import typer

    module_name, function = VERBS[verb].split(":")
    module = importlib.import_module(module_name)
    for example in module.EXAMPLES:
        words = shlex.split(example.split(" > ")[0])[1:]
        command = typer.main.get_command(application(words)).commands[verb]
        seen: list[dict[str, object]] = []
        monkeypatch.setattr(command, "callback", lambda seen=seen, **given: seen.append(given))
        command.main(words[1:], standalone_mode=False)
        assert len(seen) == 1, f"{function}: {example}"


@pytest.mark.parametrize(
    ("raised", "code"),
    [
        (errors.UsageError("plan '0-9': no."), 2),
        (errors.DataError("no picture."), 1),
        (errors.HostError("refused."), 1),
        (FileNotFoundError(2, "No such file", "x"), 1),
    ],
)
def test_errors_are_one_line_and_a_code(
    raised: Exception,
    code: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*_: object) -> None:
        raise raised

    monkeypatch.setattr("trol.cli.info._collect", fail)
    assert run("info") == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == f"trol: {raised}\n"


def test_an_interrupt_is_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("trol.cli.info._collect", interrupted)
    assert run("info") == 130


@pytest.mark.parametrize(
    "words", [["chta"], ["info", "--jsno"], ["map"], ["info", "extra", "more"], []]
)
def test_bad_usage_is_2(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*words) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Usage: trol" in captured.err


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--version") == 0
    assert capsys.readouterr().out == f"trol {version('trol-vlm')}\n"


@pytest.mark.parametrize("more", [(), ("mixture.yaml",)])
def test_an_unknown_verb_of_data(more: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert run("data", "chek", *more) == 2
    assert "unknown verb of trol data 'chek'. Did you mean 'check'?" in capsys.readouterr().err


def test_json_is_alone_on_stdout(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def noisy() -> dict[str, object]:
        print("a library says something")
        return {"versions": {}}

    monkeypatch.setattr("trol.cli.info._collect", noisy)
    assert run("info", "--json") == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out) == {"versions": {}}
    assert "a library says something" in captured.err


def test_info_names_what_is_here(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("info", "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert result["versions"]["torch"]
    assert result["threads"] >= 1
    assert "gemma4_text" in result["hosts"]["refused"]


def test_info_of_a_model_says_what_it_is_and_costs(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("info", "trol-tiny", "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["family"], result["layers"], result["refused"]) == ("llama", 2, {})
    assert result["policy"]["policy"] == "trol_mixer"
    assert result["visit"]["flops_per_token"][0] > 0
    assert run("info", "trol-tiny") == 0
    assert "refused" in capsys.readouterr().out


def test_info_fails_where_an_assumption_does(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Cache, "trim", lambda cache, n: None, raising=False)
    assert run("info") == 1
    captured = capsys.readouterr()
    assert "ASSUMES WRONGLY" in captured.out
    assert "trim" in captured.out
    assert captured.err.splitlines()[-1].startswith("trol: 1 of the assumptions")
