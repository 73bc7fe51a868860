"""A harness that cannot be used is one line with the command that mends it; what is assumed is."""

from importlib import metadata
from types import SimpleNamespace

import pytest
from packaging.requirements import Requirement

from cli.command import run
from trol import host
from trol.errors import HostError, UsageError
from trol.harness import packages
from trol.harness.packages import HARNESSES, Harness, check_harness, lacking


def installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", HARNESSES)
def test_what_is_assumed_of_a_harness_is_there(name: str) -> None:
    if not installed(name):
        pytest.skip(f"{name} is not installed: it is heavy, and no part of the dev extra")
    assert lacking(name) == []


@pytest.mark.parametrize(
    ("path", "arguments", "said"),
    [
        ("json:dumps", ("obj", "nothing", "else_"), "json:dumps takes no nothing, else_"),
        ("json:JSONEncoder.absent", (), "json:JSONEncoder.absent is not there"),
        ("no_such_module_here:x", (), "no_such_module_here:x is not there"),
    ],
)
def test_what_is_not_as_assumed_is_named(
    path: str, arguments: tuple[str, ...], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(HARNESSES, "packaging", Harness("packaging", {path: arguments}))
    (fault,) = lacking("packaging")
    assert fault.startswith(said)
    with pytest.raises(HostError, match=r"is not as trol knows it.*pip install 'trol-vlm\["):
        check_harness("packaging")


def test_a_missing_harness_is_one_line_with_the_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def absent(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    missing = metadata.PackageNotFoundError
    standin = SimpleNamespace(version=absent, PackageNotFoundError=missing)
    monkeypatch.setattr(packages, "metadata", standin)
    for name in HARNESSES:
        assert run("eval", "trol-tiny", "--harness", name, "--tasks", "boards") == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert f"{name} is not installed; run: pip install 'trol-vlm[{name}]'" in line


@pytest.mark.parametrize(("bounds", "how"), [(">=990,<999", "older"), (">=0,<0.1", "newer")])
def test_another_release_is_one_line_with_the_command(
    bounds: str, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(HARNESSES, "packaging", Harness("packaging", {}))
    monkeypatch.setattr(host, "required", lambda name, extra: Requirement(f"{name}{bounds}"))
    host.check_release.cache_clear()
    with pytest.raises(HostError, match=f"{how} than what.*pip install 'packaging"):
        check_harness("packaging")
    host.check_release.cache_clear()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--harness", "lm_eval"], "unknown harness 'lm_eval'. Did you mean 'lm-eval'?"),
        (["--harness", "lm-eval", "--tasks", "text:x.txt"], "leave --harness out"),
        (["--harness", "lm-eval", "--metrics", "loss"], "--metrics is of no use with --harness"),
        (["--harness", "lm-eval", "--out", "x"], "--out goes with --suite"),
        (["--suite", "troll"], "unknown suite 'troll'. Did you mean 'trol'?"),
        (["--suite", "trol", "--tasks", "boards"], "--tasks is of no use with --suite"),
        (["--suite", "trol", "--harness", "lm-eval"], "--harness is of no use with --suite"),
        (["--suite", "trol", "--published", "TroL-8B"], "unknown published model 'TroL-8B'"),
        (["--published", "TroL-7B"], "--published goes with --suite"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_what_does_not_fit_is_refused_before_a_model_is_opened(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("eval", "no/such/model/anywhere", *words) == 2
    assert said in capsys.readouterr().err


def test_the_extras_are_what_the_error_names() -> None:
    try:
        lines = metadata.metadata("trol-vlm").get_all("Provides-Extra") or []
    except metadata.PackageNotFoundError:
        pytest.skip("trol is not installed here")
    if "lm-eval" not in lines:
        pytest.skip("another checkout's metadata is installed here")
    for name in HARNESSES:
        asked = host.required(name, name)
        assert asked is not None
        assert {one.operator for one in asked.specifier} == {">=", "<"}


def test_an_unknown_harness_is_refused() -> None:
    with pytest.raises(UsageError, match="Known: lm-eval, lmms-eval"):
        check_harness("vlmeval")
