"""Mixtures, their indexes and quarantine lists, and mixtures as datasets of token rows."""

import json
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from data.samples import asked, jpeg, lines, opened, said, shared, texts
from trol.data import mixture as mixtures
from trol.data.conversations import ConversationCollator, SoundRows
from trol.data.formats import RowError, read_row
from trol.data.mixture import Damaged, open_mixture, read_quarantine, write_quarantine
from trol.errors import DataError
from trol.family import tiny_processor


@pytest.fixture
def two(tmp_path: Path) -> dict[str, Any]:
    """Three rows of text and three of pictures, one of which another folder holds."""
    (tmp_path / "ai2d").mkdir()
    for name in ("ai2d/a.jpg", "ai2d/b.jpg", "c.jpg"):
        (tmp_path / name).write_bytes(jpeg(size=16))
    lines(tmp_path / "words.jsonl", [said(f"w{n}", "x" * n or "-") for n in range(3)])
    pictures = [shared(f"<image>p{n}", image=i) for n, i in enumerate(["ai2d/a.jpg", "c.jpg"])]
    pictures.append(shared("<image><image>p2", image=["ai2d/a.jpg", "ai2d/b.jpg"]))
    (tmp_path / "pictures.json").write_text(json.dumps(pictures))
    return {
        "words": {"path": "words.jsonl"},
        "pictures": {"path": "pictures.json", "format": "sharegpt"},
    }


def test_sources_follow_each_other(two: dict[str, Any], tmp_path: Path) -> None:
    mixture = opened(tmp_path, two)
    assert asked(mixture) == ["w0", "w1", "w2", "p0", "p1", "p2"]
    assert [len(part.index) for part in mixture.parts] == [3, 3]
    assert mixture[3][0]["content"][0]["image"].size == (16, 16)
    assert asked(pickle.loads(pickle.dumps(mixture))) == asked(mixture)
    with pytest.raises(IndexError, match="conversation 6"):
        mixture[6]


def test_filters_choose_rows(two: dict[str, Any], tmp_path: Path) -> None:
    chosen = {**two["pictures"], "where": {"image": ["ai2d/*", "dvqa/*"]}}
    mixture = opened(tmp_path, {"pictures": chosen})
    assert asked(mixture) == ["p0", "p2"]
    assert [mixture.parts[0].index["row"][place] for place in range(2)] == [0, 2]
    rest = {**two["pictures"], "unless": {"image": ["ai2d/*"]}}
    assert asked(opened(tmp_path, {"pictures": rest})) == ["p1"]


def test_weights_repeat_and_draw(tmp_path: Path) -> None:
    lines(tmp_path / "a.jsonl", [said(f"q{n}") for n in range(20)])
    for weight, count in ((2.5, 50), (0.1, 2), (1, 20)):
        made = [opened(tmp_path, {"a": {"path": "a.jsonl", "weight": weight}}) for _ in range(2)]
        assert asked(made[0]) == asked(made[1])
        assert len(made[0]) == count
        times = np.unique(asked(made[0]), return_counts=True)[1]
        assert set(times) <= {int(weight), int(weight) + 1}


def test_the_index_is_kept_until_something_changes(
    two: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened(tmp_path, two)
    built: list[Any] = []
    entries = mixtures._entries
    monkeypatch.setattr(mixtures, "_entries", lambda c, s: built.append(c) or entries(c, s))
    opened(tmp_path, two)
    assert not built
    path = lines(tmp_path / "words.jsonl", [said("new")])
    assert asked(opened(tmp_path, two))[:2] == ["new", "p0"]
    status = path.stat()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    opened(tmp_path, two)
    opened(tmp_path, {"words": {**two["words"], "placeholder": "<|image|>"}})
    assert len(built) == 3
    assert not list((tmp_path / "cache").glob("*.draft"))


def test_an_index_is_written_whole_or_not_at_all(
    two: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(mixtures.np, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        opened(tmp_path, two)
    assert not list((tmp_path / "cache").iterdir())


ANY = st.text(max_size=12)
VALID = st.builds(lambda q, a: said(f"q{q}", f"a{a}"), ANY, ANY)
BROKEN = st.sampled_from(["{", "[]", '{"messages": 1}', said("hi", "")])
PICTURED = st.builds(lambda n: said("<image>" * n + "hi", image=["a.jpg"] * n), st.integers(1, 3))


@given(st.lists(st.one_of(VALID, BROKEN, PICTURED), min_size=1, max_size=8))
def test_the_index_equals_a_plain_read(tmp_path_factory: Any, rows: list[Any]) -> None:
    folder = tmp_path_factory.mktemp("index")
    lines(folder / "a.jsonl", rows)
    index = opened(folder, {"a": {"path": "a.jsonl"}}).parts[0].index
    text = (folder / "a.jsonl").read_bytes()
    found = [text[start:end] for start, end in zip(index["start"], index["end"], strict=True)]
    assert found == text.splitlines(keepends=True)
    assert index["images"].tolist() == [images_in(line) for line in text.splitlines()]


def images_in(line: bytes) -> int:
    """The count of a plain reader."""
    try:
        messages = read_row(json.loads(line), "messages", {}, "<image>")
    except (json.JSONDecodeError, AttributeError, RowError):
        return 0
    return texts(messages).count("<image>")


def test_a_damaged_row_is_refused_by_name(tmp_path: Path) -> None:
    lines(tmp_path / "a.jsonl", [said("hi"), "", "{", said("<image>hi", image="none.jpg")])
    mixture = opened(tmp_path, {"src": {"path": "a.jsonl"}})
    for number, kind in ((1, "broken_row"), (2, "image_missing")):
        with pytest.raises(RowError, match=rf"\.jsonl, row {number}: ") as raised:
            mixture[number]
        assert raised.value.kind == kind


def test_quarantined_rows_are_skipped_and_counted(two: dict[str, Any], tmp_path: Path) -> None:
    sizes = opened(tmp_path, two).sizes()
    bad = [Damaged("words", 1, "empty_answer", "-"), Damaged("pictures", 0, "image_missing", "-")]
    listed = tmp_path / "mixture.quarantine.jsonl"
    write_quarantine(listed, sizes, bad)
    mixture = opened(tmp_path, two)
    assert asked(mixture) == ["w0", "w2", "p1", "p2"]
    assert mixture.skipped == {"words": {"empty_answer": 1}, "pictures": {"image_missing": 1}}
    assert len(mixture) == 4
    elsewhere = listed.rename(tmp_path / "bad.jsonl")
    assert len(opened(tmp_path, two)) == 6
    assert len(opened(tmp_path, two, quarantine=elsewhere)) == 4


def test_a_quarantine_list_of_other_files_is_refused(two: dict[str, Any], tmp_path: Path) -> None:
    listed = tmp_path / "mixture.quarantine.jsonl"
    write_quarantine(listed, opened(tmp_path, two).sizes(), [])
    lines(tmp_path / "words.jsonl", [said("other")])
    with pytest.raises(DataError, match="when words had another size; delete it and run"):
        opened(tmp_path, two)
    assert read_quarantine(listed, {"new": 3}) == {}
    for text in ("", "[]", '{"sizes": {}}\n{"row": 1}', '{"sizes": {}}\n{'):
        listed.write_text(text)
        with pytest.raises(DataError, match="is no quarantine list"):
            read_quarantine(listed, {})
    write_quarantine(listed, {}, [Damaged("a", 0, "boredom", "")])
    with pytest.raises(DataError, match="unknown reason 'boredom'"):
        read_quarantine(listed, {})


def test_batches_with_and_without_pictures(two: dict[str, Any], tmp_path: Path) -> None:
    processor = tiny_processor(["w0 w1 w2 p0 p1 p2 yes x xx -"])
    mixture = opened(tmp_path, two)
    batch = ConversationCollator(processor)([mixture[i] for i in range(len(mixture))])
    assert batch["pixel_values"].shape[0] == 4
    per_row = (batch["input_ids"] == processor.image_token_id).sum(1) // processor.tokens_per_image
    assert per_row.tolist() == [0, 0, 0, 1, 1, 2]
    longest = int(batch["attention_mask"].sum(1).max())
    assert ConversationCollator(processor, most_tokens=longest)([mixture[5]])
    short = ConversationCollator(processor, most_tokens=longest - 1)
    with pytest.raises(RowError, match=f"{longest} tokens long") as raised:
        short([mixture[5]])
    assert raised.value.kind == "too_long"
    rows = SoundRows(mixture, short, mixture.where)
    with pytest.warns(UserWarning, match=r"pictures.json, row 2: .*tokens long"):
        assert len(rows.batch([4, 5])["input_ids"]) == 2
    with pytest.raises(DataError, match="has no chat template"):
        ConversationCollator(processor.tokenizer)


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_load_the_same_batches(workers: int, two: dict[str, Any], tmp_path: Path) -> None:
    mixture, wanted = opened(tmp_path, two), [3, 0, 5, 1, 4, 2]
    processor = tiny_processor(["w0 w1 w2 p0 p1 p2 yes x xx -"])
    rows = SoundRows(mixture, ConversationCollator(processor), mixture.where)
    loader = DataLoader(rows, 2, sampler=wanted, collate_fn=rows.batch, num_workers=workers)
    for number, batch in enumerate(loader):
        plain = rows.batch(wanted[2 * number : 2 * number + 2])
        assert plain.keys() == batch.keys()
        assert all(torch.equal(plain[key], batch[key]) for key in plain)


def test_the_example_mixture_is_sound(tmp_path: Path) -> None:
    path = Path(__file__).parents[2] / "examples" / "mixture" / "mixture.yaml"
    mixture = open_mixture(path, cache=tmp_path)
    assert len([mixture[i] for i in range(len(mixture))]) == 4
    names = [part.source.name for part in mixture.parts]
    assert list(yaml.safe_load(path.read_text())["sources"]) == names
