"""The installed packages are the tested ones: those of the lock, or of the file that is named."""

import os
import re
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[2]
GROUND = os.environ.get("TROL_GROUND", "lock")
"""Which file the installed packages are held to: lock, oldest, or newest for none."""


def pins(file: Path) -> list[Requirement]:
    lines = (line.partition("#")[0].strip() for line in file.read_text("utf-8").splitlines())
    return [Requirement(line) for line in lines if line]


@pytest.mark.skipif(GROUND == "newest", reason="the newest ground is whatever pip finds")
def test_every_installed_distribution_is_the_locked_one() -> None:
    differing = []
    for pin in pins(ROOT / "requirements" / f"{GROUND}.txt"):
        if pin.marker is not None and not pin.marker.evaluate():
            continue
        try:
            installed = version(pin.name)
        except PackageNotFoundError:
            continue  # of an extra that is not installed
        if Version(installed).public not in pin.specifier:
            differing.append(f"{pin.name} {installed}, locked is {pin.specifier}")
    assert not differing, f"run `make {'test' if GROUND == 'lock' else 'test-oldest'}`: {differing}"


@pytest.mark.parametrize("file", ["lock", "oldest"])
def test_the_lock_keeps_what_pyproject_asks(file: str) -> None:
    """A bound that was changed without the lock fails, and names `make lock`."""
    locked = {one.name: one for one in pins(ROOT / "requirements" / f"{file}.txt")}
    wanted = [Requirement(line) for line in requires("trol-vlm") or ()]
    for one in wanted:
        if one.marker is None or one.marker.evaluate({"extra": "dev"}):
            name = re.sub(r"[-_.]+", "-", one.name).lower()
            (pin,) = locked[name].specifier
            assert Version(pin.version) in one.specifier, f"{name}: run `make lock`"


def test_torch_is_named_once_for_pip_and_once_for_the_lock() -> None:
    first = {one.name: one for one in pins(ROOT / "requirements" / "constraints.txt")}
    named = re.search(r'name = "torch"\nversion = "(.+)"', (ROOT / "pyproject.toml").read_text())
    assert named is not None
    assert str(first["torch"].specifier) == f"=={named[1]}"
