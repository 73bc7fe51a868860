"""Every question of a set answered at every level of a menu, and scored."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from trol.data.oracle_rows import OracleRow
from trol.depth import attached, depth, is_attached
from trol.errors import UsageError
from trol.evaluation import metrics
from trol.evaluation.kept import items_digest
from trol.evaluation.oracle.levels import TEMPERATURE, Batch, Given, Noise, OracleScope
from trol.evaluation.oracle.menu import Level, Menu
from trol.evaluation.oracle.store import Store
from trol.evaluation.tasks import Item
from trol.host.layers import find_decoder, layer_list
from trol.policies.digests import weights_digest
from trol.policies.planned import Planned

BATCH = 64
"""Questions answered at once."""

Key = tuple[int, str, int]


@dataclass(frozen=True)
class Questions:
    """The set, and how its answers are made and scored."""

    items: Sequence[Item]
    metrics: tuple[str, ...]
    new_tokens: int
    scope: OracleScope = "answer"
    seed: int = 0
    samples: int = 0
    """Answers drawn at full depth, beside the greedy one."""

    def header(self, model: Any, menu: Menu, **names: Any) -> dict[str, Any]:
        """What rows of this set, model and menu belong to; `names` are told as they are."""
        return {
            **names,
            "weights": weights_digest(model),
            "questions": len(self.items),
            "set": items_digest(self.items),
            "menu": [level.text for level in menu.levels],
            "metrics": list(self.metrics),
            "new_tokens": self.new_tokens,
            "scope": self.scope,
            "seed": self.seed,
            "samples": self.samples,
            "temperature": TEMPERATURE,
        }

    def drawing(self, samples: int) -> Questions:
        """The same questions with so many answers drawn at full depth."""
        return replace(self, samples=samples)

    def missing(self, menu: Menu, store: Store, shards: int) -> list[str]:
        """Which of so many shards are not finished, as `--shard` takes them."""
        return [
            f"{index}/{shards}"
            for index in range(shards)
            if any(
                store.lacks(_keys(self.order((index, shards)), level, sample))
                for _, sample, level in self.units(menu)
            )
        ]

    def batch(self, model: Any, processor: Any, items: Sequence[Item]) -> Batch:
        """Some of the questions, ready to be answered at any level."""
        return Batch(model, processor, items, scope=self.scope, new_tokens=self.new_tokens)

    def order(self, shard: tuple[int, int]) -> list[int]:
        """The items of one shard, short questions first, so that batches need little padding."""
        index, shards = shard
        ordered = sorted(range(len(self.items)), key=lambda i: (len(self.items[i].question), i))
        return ordered[index::shards]

    def units(self, menu: Menu) -> Iterator[tuple[int, int, Level]]:
        """What a batch is asked: (number, sample, level), the drawn ones last."""
        full = menu.levels[menu.full]
        wanted = [(0, level) for level in menu.levels]
        wanted += [(number, full) for number in range(1, self.samples + 1)]
        for number, (sample, level) in enumerate(wanted):
            yield number, sample, level


def answer_all(
    model: Any,
    processor: Any,
    questions: Questions,
    menu: Menu,
    store: Store,
    *,
    shard: tuple[int, int] = (0, 1),
    done: Callable[[int, int], None] = lambda _done, _all: None,
    batch_size: int = BATCH,
) -> None:
    """Answers what the store lacks of one shard, batch by batch.

    Args:
        model: a transformers model.
        processor: its processor, or the tokenizer of a text model.
        questions: the set.
        menu: the levels.
        store: what is finished, and where new rows go.
        shard: which part of the set: (0, 2) is the first of two.
        done: is told how many rows of how many are finished, as they are.
        batch_size: questions answered at once; what they are answered does not depend on it.
    """
    order = questions.order(shard)
    rows = sum(1 for _ in questions.units(menu))
    for start in range(0, len(order), batch_size):
        places = order[start : start + batch_size]
        batch: Batch | None = None
        for number, sample, level in questions.units(menu):
            if store.lacks(_keys(places, level, sample)):
                items = [questions.items[place] for place in places]
                batch = batch or questions.batch(model, processor, items)
                noise = Noise(places, sample, questions.seed) if sample else None
                given = batch.answers(level.plan, noise)
                unit = {"given": given, "level": level, "sample": sample}
                scores = _scores(model, processor, items, questions, **unit)
                store.append(_rows(places, items, scores, **unit))
            done(start * rows + (number + 1) * len(places), len(order) * rows)


def layers_of(model: Any) -> int:
    """Layers of the decoder inside `model`."""
    if is_attached(model):
        return attached(model)[1].depth_layers
    return len(layer_list(find_decoder(model)) or ())


def check_shard(text: str) -> tuple[int, int]:
    """`0/2`, the first of two parts, as numbers; raises `UsageError` where it is none."""
    first, slash, second = text.partition("/")
    if not (slash and first.isdecimal() and second.isdecimal() and int(first) < int(second)):
        raise UsageError(
            f"--shard is {text!r}; give I/N with I from 0 to N - 1, such as 0/2 and 1/2."
        )
    return int(first), int(second)


def _scores(
    model: Any,
    processor: Any,
    items: Sequence[Item],
    questions: Questions,
    *,
    given: Sequence[Given],
    level: Level,
    sample: int,
) -> list[dict[str, float]]:
    """Metric -> score, for each item; a drawn answer has no loss of its own."""
    texts = [one.text for one in given]
    columns: dict[str, Sequence[float]] = {}
    for metric in questions.metrics:
        if metric != "loss":
            columns[metric] = metrics.scores(metric, texts, items)
        elif not sample:
            with depth(model, Planned(level.plan, scope=questions.scope)):
                columns[metric] = metrics.losses(model, processor, items)
    return [
        {metric: float(column[i]) for metric, column in columns.items()} for i in range(len(items))
    ]


def _rows(
    places: Sequence[int],
    items: Sequence[Item],
    scores: Sequence[dict[str, float]],
    *,
    given: Sequence[Given],
    level: Level,
    sample: int,
) -> list[OracleRow]:
    return [
        OracleRow(
            item=place,
            question=item.question,
            reference=item.answer,
            answer=one.text,
            type=item.type,
            plan=level.text,
            cost=level.cost,
            sample=sample,
            new_tokens=one.tokens,
            scores=got,
        )
        for place, item, one, got in zip(places, items, given, scores, strict=True)
    ]


def _keys(places: Sequence[int], level: Level, sample: int) -> list[Key]:
    return [(place, level.text, sample) for place in places]
