"""Mixture files: strictly read; and the published mixture with all its layouts."""

import json
from pathlib import Path
from typing import Any

import pytest

from data.samples import asked, jpeg, lines, mixture_file, opened, said, shared, texts
from trol.data.mixture import names, open_mixture, read_mixture
from trol.errors import DataError, UsageError


@pytest.mark.parametrize(
    ("sources", "reason"),
    [
        ({"a": {"paht": "x"}}, r"sources\.a 'paht'. Did you mean 'path'"),
        ({"a": {"format": "alpaca"}}, r"sources\.a lacks path"),
        ({"a": {"path": "x", "format": "sharegtp"}}, "Did you mean 'sharegpt'"),
        ({"a": {"path": "x", "columns": {"mesages": "m"}}}, "Did you mean 'messages'"),
        ({"a": {"path": "x", "name": "b"}}, "'name'"),
        ({"a": {"path": "x", "weight": 0}}, r"sources\.a\.weight is 0"),
        ({"a": {"path": "x", "weight": "much"}}, "must be a number"),
        ({"a": {"path": 3}}, "must be a text"),
        ({"a": {"path": "x", "count": 1.5}}, "must be a whole number"),
        ({"a": {"path": "x", "allow_urls": 1}}, "must be true or false"),
        ({"a": {"path": "x", "count": True}}, "must be a whole number"),
        ({"a": {"path": "x", "where": {"image": "ai2d"}}}, "lists of patterns"),
        ({"a": {"path": "x", "placeholder": ""}}, "placeholder is empty"),
        ({"a": "x.json"}, "give keys and values"),
        ({}, "names no sources"),
        (["a"], "names no sources"),
    ],
)
def test_a_malformed_mixture_is_refused(sources: Any, reason: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=reason):
        read_mixture(mixture_file(tmp_path, sources))


def test_what_is_no_mixture_file(tmp_path: Path) -> None:
    path = tmp_path / "mixture.yaml"
    for text, reason in (
        ("a: [", "no YAML"),
        ("- a", "holds list"),
        ("source: {}", "Did you mean"),
    ):
        path.write_text(text)
        with pytest.raises(UsageError, match=reason):
            read_mixture(path)
    with pytest.raises(UsageError, match="to read conversations from"):
        read_mixture("none.yaml")
    with pytest.raises(UsageError, match=r"Did you mean 'trol-2\.27m'"):
        read_mixture("trol-2.7m")


@pytest.mark.parametrize("path", ["none.jsonl", "none.json", "none-*.parquet"])
def test_a_missing_file_is_named(path: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"the source a has no file .*none"):
        opened(tmp_path, {"a": {"path": path}})


def test_the_published_mixture() -> None:
    """The eleven sources have the published number of samples, 2,273,830."""
    assert names() == ["trol-2.27m"]
    described = read_mixture("trol-2.27m")
    assert described.root == Path()
    assert len(described.sources) == 11
    assert sum(source.count or 0 for source in described.sources) == 2_273_830
    assert len(described.path.read_text().splitlines()) <= 60


PUBLISHED_ROWS = {
    "sharegpt4v-caption": [
        shared("<image>\nq", image="coco/a.jpg"),
        shared("q", image="sam/x.jpg"),
    ],
    "sharegpt4v-instruction": [shared("q\n<image>", image="coco/a.jpg"), shared("q")],
    "allava-text": [shared("q", id="1")],
    "minigemini": [
        shared("<image>\nq", image="ai2d/a.jpg"),
        shared("<image>\nq", image="coco/a.jpg"),
    ],
    "docdownstream": [said("<|image|>q", image=["./coco/a.jpg"])],
    "docreason": [said("<|image|>q", image=["./coco/a.jpg"], task_name="qa_sft")],
    "gllava-align": [shared("<image>\nq", image="coco/a.jpg")],
    "gllava-qa": [shared("<image>\nq", image="coco/a.jpg")],
    "mathvision": [
        {"question": "q\n<image1>", "options": [], "answer": "3", "image": "coco/a.jpg"}
    ],
    "mathinstruct": [{"source": "s", "instruction": "q", "output": "a"}],
    "mathplus": [{"instruction": "q", "output": "a"}],
}


def test_a_small_copy_of_the_published_mixture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every source's layout, with one row that belongs and perhaps one that does not."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hub")
    datasets.disable_progress_bars()
    for folder in ("coco", "ai2d"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.jpg").write_bytes(jpeg(size=16))
    described = read_mixture("trol-2.27m", root=tmp_path)
    for source in described.sources:
        path, rows = tmp_path / source.path, PUBLISHED_ROWS[source.name]
        if path.suffix == ".parquet":
            datasets.Dataset.from_list(rows).to_parquet(path)
        elif path.suffix == ".jsonl":
            lines(path, rows)
        else:
            path.write_text(json.dumps(rows))
    mixture = open_mixture(described, cache=tmp_path / "cache")
    assert [len(part.index) for part in mixture.parts] == [1, 2, 1, 1, 1, 1, 1, 1, 1, 1, 1]
    assert asked(mixture) == ["q", "<image>", *["q"] * 7, "<image>", "q", "q"]
    pictured = [i for i in range(len(mixture)) if "<image>" in texts(mixture[i])]
    assert pictured == [0, 1, 4, 5, 6, 7, 8, 9]
