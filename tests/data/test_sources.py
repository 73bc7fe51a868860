"""Each format and each container gives the same messages, or one error by name."""

import base64
import http.server
import json
import pickle
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.samples import jpeg, lines, said, shared, texts
from trol.data import row_files as json_files
from trol.data.formats import KINDS, RowError, read_row
from trol.data.images import open_picture
from trol.data.row_files import LEFT_OUT, JsonArray, JsonLines, Table
from trol.errors import DataError, UsageError

DOC = said("<|image|>what is it?", "a form", image=["a.jpg"])


def read(row: Any, form: str, columns: Any = None, placeholder: str = "<image>") -> Any:
    return read_row(row, form, columns or {}, placeholder)


@pytest.mark.parametrize(
    ("row", "form", "settings", "expected"),
    [
        (said("hi"), "messages", {}, ["hi", "yes"]),
        (shared("<image>\nhi", image="a.jpg"), "sharegpt", {}, ["<image>", "hi", "yes"]),
        (shared("hi\n<image>", image="a.jpg"), "sharegpt", {}, ["hi", "<image>", "yes"]),
        (shared("hi", image=""), "sharegpt", {}, ["hi", "yes"]),
        (DOC, "messages", {"placeholder": "<|image|>"}, ["<image>", "what is it?", "a form"]),
        ({"instruction": "2+2?", "output": "4"}, "alpaca", {}, ["2+2?", "4"]),
        ({"instruction": "add", "input": "2 2", "output": "4"}, "alpaca", {}, ["add\n2 2", "4"]),
        (
            {"question": "see <image1>?", "options": ["1", "2"], "answer": "B", "image": "a.png"},
            "alpaca",
            {
                "columns": {"instruction": "question", "input": "options", "output": "answer"},
                "placeholder": "<image1>",
            },
            ["see ", "<image>", "?\nA. 1\nB. 2", "B"],
        ),
        (
            {"system": "s", "instruction": "q", "output": "a", "images": ["a", b"b"]},
            "alpaca",
            {},
            ["s", "<image>", "<image>", "q", "a"],
        ),
    ],
)
def test_rows_become_messages(row: Any, form: str, settings: Any, expected: list[str]) -> None:
    assert texts(read(row, form, **settings)) == expected


def test_openai_parts() -> None:
    url = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}
    asked = [url, {"type": "text", "text": "hi"}, {"type": "image"}, {"type": "image", "path": "b"}]
    messages = read(said(asked, image={"bytes": None, "path": "a"}), "messages")
    shown = [part["image"] for part in messages[0]["content"] if part["type"] == "image"]
    assert shown == ["data:image/png;base64,AA==", "a", "b"]


USER, ASSISTANT = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}
SYSTEM = {"role": "system", "content": "be brief"}


@pytest.mark.parametrize(
    ("row", "form", "kind"),
    [
        ({"messages": [ASSISTANT, USER]}, "messages", "role_order"),
        ({"messages": [USER]}, "messages", "role_order"),
        ({"messages": [SYSTEM]}, "messages", "role_order"),
        ({"messages": [USER, USER, ASSISTANT]}, "messages", "role_order"),
        ({"messages": [USER, ASSISTANT, SYSTEM]}, "messages", "role_order"),
        ({"messages": [USER, {"role": "tool", "content": "x"}]}, "messages", "wrong_format"),
        ({"messages": []}, "messages", "wrong_format"),
        (shared("hi"), "messages", "wrong_format"),
        (said("hi"), "sharegpt", "wrong_format"),
        (said(None), "messages", "wrong_format"),
        (said([{"type": "video"}]), "messages", "wrong_format"),
        (said("hi", [{"type": "image", "image": "a"}]), "messages", "wrong_format"),
        (said("<image>hi", image=3), "messages", "wrong_format"),
        ({"instruction": "q"}, "alpaca", "wrong_format"),
        (said("hi", " "), "messages", "empty_answer"),
        (shared("<image>", image="a"), "sharegpt", "empty_question"),
        (shared("<image>hi"), "sharegpt", "image_count"),
        (shared("hi", image="a"), "sharegpt", "image_count"),
        (shared("<image><image>hi", image=["a"]), "sharegpt", "image_count"),
        ({"instruction": "<image>q", "output": "a", "images": ["a", "b"]}, "alpaca", "image_count"),
    ],
)
def test_damage_is_named(row: Any, form: str, kind: str) -> None:
    with pytest.raises(RowError) as raised:
        read(row, form)
    assert raised.value.kind == kind


def test_an_error_of_a_row_survives_pickling() -> None:
    error = pickle.loads(pickle.dumps(RowError("role_order", "two users")))
    assert (error.kind, str(error)) == ("role_order", "two users")
    assert isinstance(error, DataError)
    with pytest.raises(UsageError, match="Did you mean 'role_order'"):
        RowError("role_orders", "")
    assert all(KINDS.values())


def test_broken_lines_are_found_in_their_place(tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", [said("ä"), "", '{"messages": [', "[1]", said("last")])
    path.write_bytes(path.read_bytes() + b'{"messages": "\xff"}')  # and no line end
    found = list(JsonLines(path).rows())
    assert [isinstance(row, RowError) for _, _, row in found] == [False, True, True, False, True]
    reader = JsonLines(path)
    assert reader.read(*found[0][:2]) == said("ä")
    assert pickle.loads(pickle.dumps(reader)).read(*found[3][:2]) == said("last")
    with pytest.raises(RowError, match="broken JSON"):
        reader.read(*found[1][:2])
    with pytest.raises(RowError, match="is list, not an object"):
        reader.read(*found[2][:2])


ROWS = st.lists(
    st.dictionaries(st.text(max_size=4), st.text(max_size=40) | st.integers() | st.none())
)


@given(rows=ROWS, indent=st.sampled_from([None, 0, 3]), plain=st.booleans(), mark=st.booleans())
@settings(max_examples=60)
def test_an_array_is_read_as_json_reads_it(
    rows: list[Any], indent: Any, plain: bool, mark: bool, tmp_path_factory: Any
) -> None:
    """Windows of 32 bytes cut rows, characters and separators at every place."""
    path = tmp_path_factory.mktemp("array") / "rows.json"
    text = json.dumps(rows, indent=indent, ensure_ascii=plain)
    path.write_text(text, encoding="utf-8-sig" if mark else "utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_files, "WINDOW", 32)
        found = list(JsonArray(path).rows())
    assert [row for _, _, row in found] == rows
    reader = JsonArray(path)
    assert [reader.read(start, end) for start, end, _ in found] == rows


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"data": []}', "not with"),
        ("", "not with"),
        ('[{"a": 1}, {"a": ', "behind row 0"),
        ('[{"a": 1} {"a": 2}]', "behind row 0"),
        ('[, {"a": 1}]', "behind row -1"),
        ('[{"a": 1}', "behind row 0"),
    ],
)
def test_a_broken_array_is_refused(text: str, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(text)
    with pytest.raises(DataError, match=reason):
        list(JsonArray(path).rows())


def test_pictures_from_everywhere(tmp_path: Path) -> None:
    data = jpeg(size=8)
    (tmp_path / "a.jpg").write_bytes(data)
    inline = f"data:image/jpeg;base64,{base64.b64encode(data).decode()}"
    for reference in ("a.jpg", str(tmp_path / "a.jpg"), data, inline):
        assert open_picture(reference, tmp_path).size == (8, 8)


@pytest.mark.parametrize(
    ("reference", "kind"),
    [
        ("none.jpg", "image_missing"),
        ("x" * 5000, "image_missing"),
        ("a\0b", "image_missing"),
        ("cut.jpg", "image_unreadable"),
        ("folder", "image_unreadable"),
        (b"no picture", "image_unreadable"),
        ("data:image/png,plain", "image_unreadable"),
        ("data:image/png;base64,%%", "image_unreadable"),
        ("https://example.org/a.png", "image_url"),
    ],
)
def test_damaged_pictures_are_named(reference: Any, kind: str, tmp_path: Path) -> None:
    data = jpeg()
    (tmp_path / "cut.jpg").write_bytes(data[: len(data) // 2])
    (tmp_path / "folder").mkdir()
    with pytest.raises(RowError) as raised:
        open_picture(reference, tmp_path)
    assert raised.value.kind == kind


def test_an_address_is_fetched_only_if_allowed(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(jpeg(size=8))

    class Silent(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None: ...

        def translate_path(self, path: str) -> str:
            return str(tmp_path / path.strip("/"))

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Silent) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        assert open_picture(f"{address}/a.jpg", tmp_path, allow_urls=True).size == (8, 8)
        for refused in (
            lambda: open_picture(f"{address}/none.jpg", tmp_path, allow_urls=True),
            lambda: open_picture(f"{address}/a.jpg", tmp_path),
        ):
            with pytest.raises(RowError, match=r"answer|fetched"):
                refused()
        server.shutdown()


@pytest.fixture
def tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hub")
    datasets.disable_progress_bars()
    return datasets


PICTURED: dict[str, list[Any]] = {
    "conversations": [shared("<image>a")["conversations"], shared("b")["conversations"]],
    "image": [{"bytes": jpeg(size=8), "path": None}, None],
}


@pytest.mark.parametrize("kind", ["plain", "image", "list", "binary", "saved", "folder", "glob"])
def test_tables(kind: str, tables: Any, tmp_path: Path) -> None:
    columns = dict(PICTURED)
    if kind == "list":
        columns["image"] = [[one] if one else [] for one in columns["image"]]
    if kind == "binary":
        columns["image"] = [one and one["bytes"] for one in columns["image"]]
    made = tables.Dataset.from_dict(columns)
    if kind == "image":
        made = made.cast_column("image", tables.Image())
    if kind == "list":
        made = made.cast_column("image", tables.List(tables.Image()))
    (tmp_path / "rows").mkdir()
    made.save_to_disk(tmp_path / "saved")
    made.to_parquet(tmp_path / "rows" / "train.parquet")
    places = {"saved": "saved", "folder": "rows", "glob": "rows/tr*.parquet"}
    path = tmp_path / places.get(kind, "rows/train.parquet")
    table = pickle.loads(pickle.dumps(Table(str(path), "train")))
    outlined = [read(row, "sharegpt") for _, _, row in table.rows() if isinstance(row, dict)]
    whole = [read(table.read(start, end), "sharegpt") for start, end, _ in table.rows()]
    assert list(map(texts, outlined)) == [["<image>", "a", "yes"], ["b", "yes"]]
    assert list(map(texts, whole)) == list(map(texts, outlined))
    assert outlined[0][0]["content"][0]["image"] == LEFT_OUT
    assert open_picture(whole[0][0]["content"][0]["image"], tmp_path).size == (8, 8)
    assert all(file.exists() for file in table.files)


def test_what_is_no_table(tables: Any, tmp_path: Path) -> None:
    (tmp_path / "rows.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(DataError, match="opens no table"):
        Table(str(tmp_path / "rows.parquet"), "train")
    with pytest.raises(DataError, match="opens no table 'nobody/nothing'"):
        Table("nobody/nothing", "train")
    made = tables.Dataset.from_dict({"a": [1]})
    tables.DatasetDict({"test": made}).save_to_disk(tmp_path / "saved")
    with pytest.raises(DataError, match=r"no split 'train'.*\['test'\]"):
        Table(str(tmp_path / "saved"), "train")
    assert Table(str(tmp_path / "saved"), "test").read(0, 1) == {"a": 1}
