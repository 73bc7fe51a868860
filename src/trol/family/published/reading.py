"""The processor that belongs to a published checkpoint, by the checkpoint's own name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trol.family.processing import TrolProcessor
from trol.family.published.opening import HUB_SETTINGS, find_published
from trol.family.published.processors import published_processor


def open_published_processor(source: str | Path, **settings: Any) -> TrolProcessor | None:
    """What `TrolProcessor.from_pretrained(source)` gives for a published checkpoint, or None.

    Raises:
        DataError: the checkpoint is damaged.
        HostError: it cannot be fetched.
    """
    hub = {name: settings[name] for name in HUB_SETTINGS if name in settings}
    published = find_published(source, **hub)
    return None if published is None else published_processor(published.folder, published.config)
