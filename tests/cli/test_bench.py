"""`trol bench`: results written, compared with stored ones, and bad input refused."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from cli import command
from trol.bench import SUITES, Setting
from trol.bench.setting import TINY
from trol.cli import bench

QUICK = ("--size", "tiny", "--rounds", "2")
FILE = "train-tiny.json"


run = partial(command.run, "bench")


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the result of one suite."""
    out = tmp_path_factory.mktemp("bench") / "made"
    assert run("train", *QUICK, "--out", out) == 0
    return out


def with_ratios(stored: Path, tmp_path: Path, **changed: Any) -> Path:
    result = json.loads((stored / FILE).read_text())
    result["rows"] = [{**row, **changed} for row in result["rows"]]
    (tmp_path / FILE).write_text(json.dumps(result))
    return tmp_path


def test_one_json_for_each_suite_says_where_it_was_measured(stored: Path) -> None:
    assert [file.name for file in stored.iterdir()] == [FILE]
    result = json.loads((stored / FILE).read_text())
    assert (result["suite"], result["threads"], result["rounds"]) == ("train", 1, 2)
    assert result["run"]["versions"]["torch"]
    assert result["rows"]


def test_json_is_one_object_alone_on_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("train", *QUICK, "--json") == 0
    assert json.loads(capsys.readouterr().out)["suite"] == "train"


def test_slower_than_stored_fails_and_names_the_rows(
    stored: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    from trol.bench import cases

    monkeypatch.setattr(cases, "NOISE", 1e9)  # however busy the machine of this test
    was = with_ratios(stored, tmp_path, ratio=-1e6, spread=0.0, noisy=False)
    assert run("train", *QUICK, "--against", was) == 1
    error = capsys.readouterr().err
    assert "slower than" in error
    assert "all tokens b1 t64" in error


def test_not_slower_than_stored_passes(
    stored: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    was = with_ratios(stored, tmp_path, ratio=1e6)
    assert run("train", *QUICK, "--against", was) == 0
    assert "nothing is slower" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("trian",), "Did you mean 'train'"),
        (("train", "--size", "smal"), "Did you mean 'small'"),
        (("train", "--rounds", "1"), "at least 2"),
        (("train", *QUICK, "--against", "nowhere"), "there is no nowhere"),
        (("train", *QUICK, "--against", "."), "no result of train"),
        (("train", *QUICK, "--out", __file__), "cannot write into"),
        (("all", *QUICK, "--against", __file__), "needs one of stored results"),
    ],
)
def test_bad_input_is_refused_before_anything_is_measured(
    words: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.setattr("trol.bench.run", None)
    assert run(*words) == 2
    assert message in capsys.readouterr().err


def test_a_profile_shows_operators_beside_the_bare_hosts(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run("traverse", "--size", "tiny", "--profile", "--json") == 0
    result = json.loads(capsys.readouterr().out)["operators"]
    attention = next(one for one in result if "scaled_dot_product" in one["name"])
    assert attention["calls"] > attention["bare_calls"] > 0  # second visits attend again
    assert run("load", "--size", "tiny", "--profile") == 2
    assert "unknown suite with a profile 'load'" in capsys.readouterr().err


def test_all_leaves_out_what_a_setting_does_not_allow(capsys: pytest.CaptureFixture[str]) -> None:
    names = bench._suites("all", Setting(dtype="nf4"))
    assert names == [name for name in SUITES if name not in ("train", "launch")]
    assert "train is left out: nf4" in capsys.readouterr().err


def test_help_lists_the_suites_that_there_are() -> None:
    assert bench.SUITES.split(", ") == list(SUITES)


def test_results_of_other_settings_have_files_of_their_own() -> None:
    assert bench.file_name("skip", Setting()) == "skip"
    other = Setting(TINY, dtype="bf16", device="cuda", threads=2)
    assert bench.file_name("skip", other) == "skip-tiny-bf16-cuda-2threads"
