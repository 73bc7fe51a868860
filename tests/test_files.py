"""Files and folders are on disk whole or not at all."""

from contextlib import suppress
from pathlib import Path

import pytest

from trol.files import whole_file, whole_folder, write_json, write_whole


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_replaced_whole_or_stays(tmp_path: Path) -> None:
    path = write_whole(tmp_path / "new" / "a.txt", "first")
    with suppress(RuntimeError), whole_file(path) as draft:
        draft.write_text("half", encoding="utf-8")
        raise RuntimeError
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(path, {"loss": float("nan")})
    assert path.read_text(encoding="utf-8") == "first"
    assert names(path.parent) == ["a.txt"]
    assert write_whole(path, b"second").read_bytes() == b"second"


def test_a_folder_is_replaced_whole_or_stays(tmp_path: Path) -> None:
    place = tmp_path / "model"
    for name in ("first", "second"):
        with whole_folder(place) as draft:
            (draft / name).write_text(name, encoding="utf-8")
        assert names(place) == [name]
    with suppress(RuntimeError), whole_folder(place) as draft:
        (draft / "third").write_text("half", encoding="utf-8")
        raise RuntimeError
    assert names(place) == ["second"]
    assert names(tmp_path) == ["model"]


def test_a_folder_that_cannot_be_named_leaves_the_earlier_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "model"
    place.mkdir()
    (place / "first").touch()
    replace = Path.replace

    def fails(path: Path, to: Path) -> Path:
        if to == place and path.name.endswith("draft"):
            raise OSError
        return replace(path, to)

    monkeypatch.setattr(Path, "replace", fails)
    with pytest.raises(OSError), whole_folder(place) as draft:  # noqa: PT011 - the one above
        (draft / "second").touch()
    assert names(place) == ["first"]
    assert names(tmp_path) == ["model"]


def test_what_a_killed_run_left_of_an_earlier_folder_is_no_obstacle(tmp_path: Path) -> None:
    place, left = tmp_path / "out", tmp_path / ".out.draft.old"
    for folder in (place, left):
        folder.mkdir()
        (folder / "a").write_text("earlier")
    with whole_folder(place) as draft:
        (draft / "a").write_text("new")
    assert (place / "a").read_text() == "new"
    assert list(tmp_path.iterdir()) == [place]
