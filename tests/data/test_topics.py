"""Python's help topics as text: splits that share no topic, and the task made of them."""

from pydoc_data.topics import topics

import pytest

from trol.data.own_files import SPLITS
from trol.data.topics import topic_text
from trol.errors import UsageError
from trol.evaluation.items import topic_items
from trol.evaluation.store import items_digest
from trol.family.presets import byte_level_tokenizer


def test_every_topic_is_in_one_split() -> None:
    texts = {split: topic_text(split) for split in SPLITS}
    for topic in topics.values():
        assert sum(topic.strip() in text for text in texts.values()) == 1
    size = sum(map(len, texts.values()))
    for split, share in SPLITS.items():
        assert len(texts[split]) / size == pytest.approx(share, abs=0.06)
    with pytest.raises(UsageError, match="tests"):
        topic_text("tests")


def test_windows_are_those_of_their_split_and_the_same_on_every_call() -> None:
    tokenizer = byte_level_tokenizer([topic_text("train")[:5000]], 300)
    windows = {split: topic_items(20, 0, split, tokenizer=tokenizer, window=64) for split in SPLITS}
    for split, items in windows.items():
        assert len(items) == 20
        again = topic_items(20, 0, split, tokenizer=tokenizer, window=64)
        assert items_digest(again) == items_digest(items)
        assert all(item.answer in topic_text(split) for item in items)
    assert len({items_digest(items) for items in windows.values()}) == len(SPLITS)
