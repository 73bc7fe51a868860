"""Text that comes with every Python: the help topics of pydoc, in parts that share no topic."""

import random
from functools import cache
from pydoc_data.topics import topics

from trol.data.own_files import SPLITS, check_split


@cache
def topic_text(split: str) -> str:
    """The topics of a split (train, validation or test), one after another.

    Which topic belongs to which split follows from the topics' names alone. The text is about the
    running Python, so it differs from release to release.

    Raises:
        UsageError: an unknown split.
    """
    check_split(split)
    names = sorted(topics)
    random.Random("topics").shuffle(names)
    size, read = sum(map(len, topics.values())), 0
    parts: dict[str, list[str]] = {name: [] for name in SPLITS}
    for name in names:
        share, begin = read / size, 0.0
        for part, width in SPLITS.items():
            begin += width
            if share < begin:
                parts[part].append(topics[name].strip())
                break
        read += len(topics[name])
    return "\n\n\n".join(parts[split])
