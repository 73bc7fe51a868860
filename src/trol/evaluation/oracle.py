"""The oracle's questions, answered at every level of a menu and scored.

A menu holds plans from cheap to dear, the full model among them. With scope `answer`, the paper's,
the prompt visits all layers at every level, so its keys and values are the same for all: they are
computed once, and each level goes on from a copy. The last token of the prompt, which predicts the
first of the answer, is left to each level's `generate`.
"""

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor

from trol.checkpoints.adapter import weights_digest
from trol.depth import Plan, depth
from trol.depth.planes import fork_cache
from trol.errors import UsageError, unknown
from trol.evaluation import answers
from trol.evaluation.answers import StepsDone
from trol.evaluation.items import BATCH, Item, fitted_prompts, tokenizer_of
from trol.evaluation.plan_search import ChosenPlan, keep_first_text
from trol.evaluation.shards import WHOLE, Shard
from trol.evaluation.store import OracleRow, RowKey, Store, items_digest
from trol.evaluation.tasks import SkipScope
from trol.host.cache import is_recurrent
from trol.host.names import CACHE
from trol.policies.planned import STATIC, Planned, static_plan

TEXT_ONLY = {"input_ids", "attention_mask"}
"""Inputs of which all but the last column can be read beforehand."""

TEMPERATURE = 0.7
"""Temperature of the answers drawn for the best-of-n control, a usual one for best-of-n."""

DEFAULT_MENU = "influence:8"
"""Eight levels from half of the layers to all, chosen by one pass over validation questions."""

LEAST_SHARE = 0.5
"""The share of the layers of the cheapest level that is chosen by measuring."""

SERIES = (*STATIC, "influence", "greedy")
"""The methods that a menu can have a series of."""

_SERIES = re.compile(r"(?P<method>[a-z]+):(?P<levels>\d+)")


@dataclass(frozen=True)
class Level:
    """One cost level: a plan, and what it costs."""

    plan: Plan
    text: str
    """The plan with every visited layer named, so that one plan has one text."""
    cost: int
    """Σ_l n_l, the layers that a token of the answer visits. Unit: layers."""
    keep_first: int = 0
    """The first tokens of each sequence that visit every layer. Unit: tokens."""

    def policy(self, scope: SkipScope) -> Planned:
        """What answers at this level."""
        return Planned(self.plan, scope=scope, keep_first=self.keep_first)


@dataclass(frozen=True)
class Menu:
    """The levels, cheapest first."""

    levels: tuple[Level, ...]
    layers: int
    """Layers of the stack."""

    @property
    def full(self) -> int:
        """Which level is the full model."""
        return next(i for i, one in enumerate(self.levels) if _is_full(one.plan, self.layers))

    @property
    def costs(self) -> list[int]:
        """The cost of each level. Unit: layers."""
        return [level.cost for level in self.levels]


Choose = Callable[[str, float], ChosenPlan]
"""(method, share of the layers) -> the plan that it chooses."""


def read_menu(
    text: str,
    layers: int,
    *,
    seed: int = 0,
    read: Callable[[str], Plan | ChosenPlan] = Plan,
    choose: Choose | None = None,
) -> Menu:
    """The menu that `text` names for a stack of `layers` layers.

    Args:
        text: plans with commas between; `influence:8` and the like stand for eight plans of that
            method of `trol plan`. The costs of a static method are evenly spaced from an eighth of
            the layers on, those of a method that measures from half of them on: pretrained models
            say nothing sensible with fewer, however they are chosen.
        layers: of the stack.
        seed: of the method `random`.
        read: plan text, or the name of a plan file, -> plan.
        choose: chooses the plans of methods that measure; None where there is no model to measure.

    Raises:
        UsageError: a part is no plan, names layers that the stack lacks, or asks for more levels
            than it has layers; or the menu has one level, or lacks the full model.
    """
    plans: list[Plan | ChosenPlan] = []
    for part in parsed(text, read):
        if not isinstance(part, tuple):
            plans.append(part)
        elif part[0] in STATIC:
            plans += _series(*part, layers=layers, seed=seed)
        elif choose is None:
            raise UsageError(f"{part[0]} measures a model, and none is given; give its plans.")
        else:
            plans += _measured_series(*part, choose)
    return menu_of(plans, layers)


def parsed(
    text: str, read: Callable[[str], Plan | ChosenPlan]
) -> list[Plan | ChosenPlan | tuple[str, int]]:
    """The parts of a menu: plans, and series of so many levels; raises as `read_menu`."""
    parts: list[Plan | ChosenPlan | tuple[str, int]] = []
    for part in filter(None, map(str.strip, text.split(","))):
        series = _SERIES.fullmatch(part)
        if series is None or series["method"] == "all":
            parts.append(read(part))
            continue
        if series["method"] not in SERIES:
            raise unknown("series of plans", series["method"], SERIES)
        parts.append((series["method"], int(series["levels"])))
    return parts


def menu_of(plans: Sequence[Plan | ChosenPlan], layers: int) -> Menu:
    """The menu of these plans; the same plan twice is one level. Raises as `read_menu`."""
    levels: dict[str, Level] = {}
    for one in plans:
        plan, first = (one, 0) if isinstance(one, Plan) else (one.plan, one.keep_first)
        visits = plan.for_layers(layers)
        text = str(Plan(visits)) + (f", {keep_first_text(first)}" if first else "")
        levels[text] = Level(Plan(visits), text, sum(visits), first)
    if not any(_is_full(level.plan, layers) for level in levels.values()):
        raise UsageError(
            f"the menu lacks the full model, which its levels are compared with; add 'all' to "
            f"--menu ({', '.join(levels) or 'it is empty'})."
        )
    if len(levels) < 2:
        raise UsageError(
            "the menu has one level, so there is nothing to choose; give more plans, such as "
            f"--menu '{DEFAULT_MENU}'."
        )
    ordered = sorted(levels.values(), key=lambda level: (level.cost, level.text))
    return Menu(tuple(ordered), layers)


def _series(method: str, levels: int, *, layers: int, seed: int) -> list[Plan]:
    if not 2 <= levels <= layers:
        raise UsageError(
            f"'{method}:{levels}' asks for {levels} levels of a stack of {layers} layers; give 2 "
            f"to {layers}."
        )
    # level / levels as a share of the layers: evenly spaced costs, the last one the full model.
    return [static_plan(method, layers, level / levels, seed) for level in range(1, levels + 1)]


def _measured_series(method: str, levels: int, choose: Choose) -> list[Plan | ChosenPlan]:
    if levels < 2:
        raise UsageError(f"'{method}:{levels}' asks for {levels} levels; give 2 or more.")
    shares = [LEAST_SHARE + (1 - LEAST_SHARE) * level / (levels - 1) for level in range(levels - 1)]
    return [*(choose(method, share) for share in shares), Plan("all")]


def _is_full(plan: Plan, layers: int) -> bool:
    return plan.for_layers(layers) == (1,) * layers


@dataclass(frozen=True)
class OracleAnswer:
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
        scope: SkipScope,
        new_tokens: int,
    ) -> None:
        self.model, self.new_tokens = model, new_tokens
        self.scope: SkipScope = scope
        self.tokenizer = tokenizer_of(processor)
        self.inputs: dict[str, Tensor] = dict(fitted_prompts(model, processor, items, new_tokens))
        padding = self.tokenizer.pad_token_id
        self._settings = {"num_beams": 1, "pad_token_id": 0 if padding is None else padding}
        self._prefix: Any = self._shared_prefix() if self._may_share() else None

    def answers(self, policy: Planned, noise: LogitsProcessor | None = None) -> list[OracleAnswer]:
        """The answers under this plan: greedy ones, or with `noise` on the logits."""
        settings: dict[str, Any] = dict(self._settings)
        if noise is not None:
            settings["logits_processor"] = [noise]
        if self._prefix is not None:
            settings[CACHE] = fork_cache(self._prefix, planes=True)
        with depth(self.model, policy), torch.inference_mode():
            new = answers.greedy(self.model, self.inputs, self.new_tokens, **settings)
        texts = self.tokenizer.batch_decode(new, skip_special_tokens=True)
        before = answers.before_end(self.model, new).sum(1)
        counts = (before + 1).clamp(max=new.shape[1]).tolist()  # the end, if there is one
        return [OracleAnswer(text.strip(), n) for text, n in zip(texts, counts, strict=True)]

    def _may_share(self) -> bool:
        if self.scope != "answer" or set(self.inputs) != TEXT_ONLY:
            return False
        # A row of one token would be nothing but padding without its last.
        return int(self.inputs["attention_mask"].sum(1).min()) > 1

    def _shared_prefix(self) -> Any:
        """The cache of all prompt tokens but the last, or None where it cannot be gone on from."""
        shorter = {name: values[:, :-1] for name, values in self.inputs.items()}
        settings = {**self._settings, "max_new_tokens": 1, "return_dict_in_generate": True}
        with depth(self.model, "all"), torch.inference_mode():
            out = self.model.generate(**shorter, do_sample=False, **settings)
        cache = out[CACHE]
        # A recurrent state that began in one visit of a layer is not that of a second one.
        return None if any(is_recurrent(slot) for slot in cache.layers) else cache


class GumbelNoise(LogitsProcessor):
    """Gumbel noise by which a greedy choice draws from softmax(logits / temperature).

        argmax(logits / temperature - log(-log u)),   u uniform in (0, 1)

    Every row has its own stream of u, so that what is drawn for a question does not depend on
    the other questions of its batch.

    Args:
        items: numbers of the rows' questions.
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
        # Kept off 0, whose logarithm is infinite.
        drawn = drawn.clamp_min(torch.finfo(drawn.dtype).tiny).to(scores.device)
        return scores.float() / self.temperature - torch.log(-torch.log(drawn))


def _stream(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big")


@dataclass(frozen=True)
class Questions:
    """The set, and how its answers are made and scored."""

    items: Sequence[Item]
    metrics: tuple[str, ...]
    new_tokens: int
    scope: SkipScope = "answer"
    seed: int = 0
    samples: int = 0
    """Answers drawn at full depth, beside the greedy one."""

    def header(self, model: Any, menu: Menu, **names: Any) -> dict[str, Any]:
        """The header of rows of this set, model and menu; `names` are added as they are."""
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

    def drawing(self, samples: int) -> "Questions":
        """The same questions with so many answers drawn at full depth."""
        return replace(self, samples=samples)

    def missing(self, menu: Menu, store: Store, shards: int) -> list[str]:
        """Which of so many shards are not finished, as `--shard` takes them."""
        return [
            f"{index}/{shards}"
            for index in range(shards)
            if any(
                store.lacks(_keys(self.order((index, shards)), level, sample))
                for sample, level in self.units(menu)
            )
        ]

    def order(self, shard: Shard) -> list[int]:
        """The items of one shard, short questions first, so that batches need little padding."""
        index, shards = shard
        ordered = sorted(range(len(self.items)), key=lambda i: (len(self.items[i].question), i))
        return ordered[index::shards]

    def units(self, menu: Menu) -> list[tuple[int, Level]]:
        """How each batch is answered: (sample, level), the drawn answers last."""
        full = menu.levels[menu.full]
        greedy = [(0, level) for level in menu.levels]
        return greedy + [(sample, full) for sample in range(1, self.samples + 1)]


def answer_all(
    model: Any,
    processor: Any,
    questions: Questions,
    menu: Menu,
    store: Store,
    *,
    shard: Shard = WHOLE,
    done: StepsDone = lambda _done, _all: None,
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
        done: takes how many rows of how many are finished, as they are.
        batch_size: questions answered at once; the answers do not depend on it.
    """
    order = questions.order(shard)
    units = questions.units(menu)
    for start in range(0, len(order), batch_size):
        places = order[start : start + batch_size]
        items = [questions.items[place] for place in places]
        batch: Batch | None = None
        for number, (sample, level) in enumerate(units, start=1):
            if store.lacks(_keys(places, level, sample)):
                batch = batch or Batch(
                    model, processor, items, scope=questions.scope, new_tokens=questions.new_tokens
                )
                noise = GumbelNoise(places, sample, questions.seed) if sample else None
                given = batch.answers(level.policy(questions.scope), noise)
                texts = [one.text for one in given]
                scores: dict[str, Sequence[float]] = {}
                for metric in questions.metrics:
                    if metric != "loss":
                        scores[metric] = answers.scores(metric, texts, items)
                    elif not sample:  # a drawn answer has no loss of its own
                        with depth(model, level.policy(questions.scope)):
                            scores[metric] = answers.losses(model, processor, items)
                store.append(_rows(places, items, given, scores, level=level, sample=sample))
            done(start * len(units) + number * len(places), len(order) * len(units))


def _rows(
    places: Sequence[int],
    items: Sequence[Item],
    given: Sequence[OracleAnswer],
    scores: dict[str, Sequence[float]],
    *,
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
            scores={metric: float(column[row]) for metric, column in scores.items()},
        )
        for row, (place, item, one) in enumerate(zip(places, items, given, strict=True))
    ]


def _keys(places: Sequence[int], level: Level, sample: int) -> list[RowKey]:
    return [(place, level.text, sample) for place in places]
