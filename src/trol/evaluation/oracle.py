"""Every question of a set answered at every level of a menu, and scored.

Answers of one batch of questions at every level; what the levels share is computed once.

With scope `answer`, the paper's, the prompt visits all layers at every level, so its keys and
values are the same for all: they are made once, and each level goes on from a copy. The last
token of the prompt, which predicts the first of the answer, is left to each level's `generate`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import LogitsProcessor

from trol.checkpoints.adapter import weights_digest
from trol.depth import Plan, attached, depth, is_attached
from trol.depth.planes import fork_cache
from trol.errors import UsageError
from trol.evaluation import metrics
from trol.evaluation.kept import items_digest
from trol.evaluation.oracle_store import Level, Menu, OracleRow, Store
from trol.evaluation.tasks import Item, fitted, prompts, tokenizer_of
from trol.host.cache import is_recurrent
from trol.host.layers import find_decoder, layer_list
from trol.host.names import CACHE
from trol.policies.planned import Planned

OracleScope = Literal["answer", "all"]

TEXT_ONLY = {"input_ids", "attention_mask"}
"""The inputs whose last column can be cut off, and nothing else changes."""

TEMPERATURE = 0.7
"""Of the answers drawn for the best-of-n control; usual where the best of several counts."""


@dataclass(frozen=True)
class Given:
    """One answer that the model gave."""

    text: str
    tokens: int
    """New tokens, the end among them."""


class Batch:
    """One batch of questions, ready to be answered at any level.

    Args:
        model: a transformers model, a policy attached or not.
        processor: its processor, or the tokenizer of a text model.
        items: the questions.
        scope: `answer`: the prompt visits every layer once; `all`: the plan holds for it as well.
        new_tokens: the most tokens of an answer.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        items: Sequence[Item],
        *,
        scope: OracleScope,
        new_tokens: int,
    ) -> None:
        self.model, self.new_tokens = model, new_tokens
        self.scope: OracleScope = scope
        self.tokenizer = tokenizer_of(processor)
        fitting = [fitted(model, processor, item, new_tokens) for item in items]
        self.inputs: dict[str, Tensor] = dict(prompts(processor, fitting).to(model.device))
        self._prefix: Any = self._shared_prefix() if self._may_share() else None

    def answers(self, plan: Plan, noise: LogitsProcessor | None = None) -> list[Given]:
        """What each question is answered at this level: greedily, or with `noise` on the logits."""
        settings = self._settings()
        if noise is not None:
            settings["logits_processor"] = [noise]
        if self._prefix is not None:
            settings[CACHE] = fork_cache(self._prefix, planes=True)
        with depth(self.model, Planned(plan, scope=self.scope)), torch.inference_mode():
            tokens = self.model.generate(**self.inputs, **settings, max_new_tokens=self.new_tokens)
        new = tokens[:, self.inputs["input_ids"].shape[1] :]
        texts = self.tokenizer.batch_decode(new, skip_special_tokens=True)
        counts = _lengths(new, self._ends())
        return [Given(text.strip(), n) for text, n in zip(texts, counts, strict=True)]

    def _may_share(self) -> bool:
        if self.scope != "answer" or set(self.inputs) != TEXT_ONLY:
            return False
        # A row of one token would be nothing but padding without its last.
        return int(self.inputs["attention_mask"].sum(1).min()) > 1

    def _shared_prefix(self) -> Any:
        """The cache of all prompt tokens but the last, or None where it cannot be gone on from."""
        shorter = {name: values[:, :-1] for name, values in self.inputs.items()}
        with depth(self.model, "all"), torch.inference_mode():
            out = self.model.generate(
                **shorter, **self._settings(), max_new_tokens=1, return_dict_in_generate=True
            )
        cache = out[CACHE]
        # A recurrent state that began in one visit of a layer is not that of a second one.
        recurrent = any(is_recurrent(slot) for slot in cache.layers)
        return None if recurrent else cache

    def _settings(self) -> dict[str, Any]:
        padding = self.tokenizer.pad_token_id
        return {
            "do_sample": False,
            "num_beams": 1,
            "pad_token_id": 0 if padding is None else padding,
        }

    def _ends(self) -> list[int]:
        ends = self.model.generation_config.eos_token_id
        return [] if ends is None else [ends] if isinstance(ends, int) else list(ends)


class Noise(LogitsProcessor):
    """Gumbel noise by which a greedy choice draws from softmax(logits / temperature).

        argmax(logits / temperature - log(-log u)),   u uniform in (0, 1)

    Every row has its own stream of u, so that what is drawn for a question does not depend on
    the batch that it is asked in.

    Args:
        items: names of the rows' questions.
        sample: number of the draw.
        seed: of the whole run.
        temperature: of the distribution.
    """

    def __init__(
        self, items: Sequence[int], sample: int, seed: int, temperature: float = TEMPERATURE
    ) -> None:
        self.temperature = temperature
        self.sources = [
            torch.Generator().manual_seed(_stream(f"{seed}/{item}/{sample}")) for item in items
        ]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Noisy logits. Shape: [B, V], in and out."""
        del input_ids
        shape = scores.shape[1]
        drawn = torch.stack([torch.rand(shape, generator=one) for one in self.sources])
        # Kept off 0, whose logarithm is none.
        drawn = drawn.clamp_min(torch.finfo(drawn.dtype).tiny).to(scores.device)
        return scores.float() / self.temperature - torch.log(-torch.log(drawn))


def _stream(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big")


def _lengths(new: Tensor, ends: Sequence[int]) -> list[int]:
    """Tokens of each row up to its first end. Shape of `new`: [B, T]."""
    ended = torch.isin(new, torch.tensor(ends, dtype=new.dtype, device=new.device))
    before = ended.int().cumsum(1) - ended.int()  # ends before each token
    return (before == 0).sum(1).tolist()


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
