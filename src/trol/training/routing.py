"""Training a router on an oracle's rows: which questions a cheaper plan answers as well.

The model stays as it is. Its states at the router's layer are computed once for each question;
what is learnt from them is small.

What an oracle saw, as a table of questions and levels, and what a router makes of it.
"""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import ProcessorMixin

from trol.data.own_files import Pair
from trol.depth import Plan, attach, attached, depth, detach
from trol.depth.attachment import gates_of
from trol.errors import DataError, TrainingError, UsageError, unknown
from trol.evaluation.oracle_store import OracleRow
from trol.host.generation import SLICES_LOGITS
from trol.host.layers import find_decoder, layer_list
from trol.policies.planned import plan_of
from trol.policies.router import Router, RouterHead, first_sure

DIALS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
"""Dials of a report."""


@dataclass(frozen=True)
class Table:
    """N questions, each answered at the M levels of a menu, the full one last."""

    menu: tuple[Plan, ...]
    questions: tuple[OracleRow, ...]
    """A row of each question."""
    costs: Tensor
    """Shape: [N, M]. Unit: layers of an answer's token."""
    scores: Tensor
    """Higher is better. Shape: [N, M]."""
    tolerance: float = 0.0

    @property
    def items(self) -> list[int]:
        """The questions' numbers."""
        return [row.item for row in self.questions]

    @property
    def suffices(self) -> Tensor:
        """Where a level scores at least what the full one does, within the tolerance: [N, M]."""
        return self.scores >= self.scores[:, -1:] - self.tolerance

    def of(self, some: Sequence[int]) -> Table:
        """The same of some questions, by their places in the table."""
        picked = tuple(self.questions[i] for i in some)
        where = list(some)
        return Table(self.menu, picked, self.costs[where], self.scores[where], self.tolerance)


def table(
    rows: Iterable[OracleRow],
    metric: str,
    layers: int,
    menu: Sequence[Plan | str] | None,
    tolerance: float,
) -> Table:
    """The table of an oracle's greedy answers; of all their plans where `menu` is None.

    Raises:
        UsageError: the metric is none of the rows', or there are no rows.
        DataError: a question lacks a level of the menu.
    """
    greedy = [row for row in rows if row.sample == 0]
    if not greedy:
        raise UsageError("no rows to learn from; give those of a folder that `trol oracle` wrote.")
    known = set.intersection(*(set(row.scores) for row in greedy))
    if metric not in known:
        raise unknown("metric of these rows", metric, known)
    cells = {(row.item, Plan(row.plan).for_layers(layers)): row for row in greedy}
    plans = {row.plan: row.cost for row in greedy}
    cheap_first = sorted(plans, key=lambda text: (plans[text], text))
    levels = tuple(plan_of(plan) for plan in (cheap_first if menu is None else menu))
    visits = [plan.for_layers(layers) for plan in levels]
    items = sorted({row.item for row in greedy})
    for item in items:
        for plan, counts in zip(levels, visits, strict=True):
            if (item, counts) not in cells:
                raise DataError(
                    f"question {item} was not answered at level '{plan}'; finish the oracle's "
                    "folder, or leave the level out of the menu."
                )
    found = [[cells[item, counts] for counts in visits] for item in items]
    return Table(
        levels,
        tuple(line[0] for line in found),
        torch.tensor([[float(row.cost) for row in line] for line in found]),
        torch.tensor([[row.value(metric) for row in line] for line in found]),
        tolerance,
    )


def report(logits: Tensor, data: Table, dials: Sequence[float]) -> dict[str, Any]:
    """How right a router is, and what it costs and scores at each dial, by what the oracle saw.

    `random` deals the levels that the router chose to questions at random: the same budget,
    expected. `oracle` takes the cheapest level that suffices. Shape of logits: [N, M - 1].
    """
    suffices = data.suffices
    right = (logits > 0) == suffices[:, :-1]
    cheapest = suffices.int().argmax(1)  # the full one suffices always
    full = torch.full_like(cheapest, len(data.menu) - 1)
    return {
        "questions": len(data.items),
        "menu": [str(plan) for plan in data.menu],
        "accuracy": right.float().mean().item(),
        "accuracy_by_level": right.float().mean(0).tolist(),
        "suffices_by_level": suffices.float().mean(0).tolist(),
        "full": _means(full, data),
        "oracle": _means(cheapest, data),
        "dials": [_at(dial, logits, data) for dial in dials],
    }


def _at(dial: float, logits: Tensor, data: Table) -> dict[str, Any]:
    levels = first_sure(logits, dial)
    shares = torch.bincount(levels, minlength=len(data.menu)) / len(levels)
    dealt = {
        "cost": (shares * data.costs.mean(0)).sum().item(),
        "score": (shares * data.scores.mean(0)).sum().item(),
    }
    return {"dial": dial, **_means(levels, data), "random": dealt, "shares": shares.tolist()}


def _means(levels: Tensor, data: Table) -> dict[str, float]:
    """Mean cost and score where question i is answered at level levels[i]."""
    picked = levels[:, None]
    return {
        "cost": data.costs.gather(1, picked).mean().item(),
        "score": data.scores.gather(1, picked).mean().item(),
    }


Prompts = Callable[[Sequence[OracleRow]], Any]
"""Rows, one for each question, to inputs that the host takes, padded anyhow."""

AT_ONCE = 32
"""Questions whose states are computed at once."""

MOST_WEIGHT = 20.0
"""The most that the rarer answer about a level counts against the other one."""


@dataclass(frozen=True)
class Lessons:
    """How a router is trained."""

    epochs: int = 30
    batch: int = 32
    """Questions in one step."""
    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    validation: float = 0.2
    """Share of the questions that are held out."""
    tolerance: float = 0.0
    """How far a level's score may lie below the full model's and still suffice."""
    seed: int = 0
    """Of the first weights, of who is held out, and of the order."""


@dataclass(frozen=True)
class RouterTraining:
    """What `train_router` found."""

    router: Router
    """The policy that is attached now."""
    curve: list[dict[str, float]]
    """`{"loss", "validation_loss"}` of each epoch."""
    best: int
    """The epoch whose weights were kept."""
    held_out: list[int]
    """Numbers of the questions that were not learnt from."""
    report: dict[str, Any]
    """`router_report` on them."""


def train_router(
    model: Any,
    processor: Any,
    rows: Iterable[OracleRow],
    *,
    metric: str,
    menu: Sequence[Plan | str] | None = None,
    after: int = 1,
    hidden: int = 64,
    dial: float = 0.5,
    lessons: Lessons | None = None,
    prompts: Prompts | None = None,
) -> RouterTraining:
    """Attaches a router to a plain model, in place, and trains it on what an oracle saw.

        label[i, m] = 1 where score(item i, level m) >= score(item i, full) - tolerance
        loss = BCE(router's logits, labels), the rarer answer of each level weighed up

    Args:
        model: the model whose answers the rows are.
        processor: its processor, or the tokenizer of a text model.
        rows: of `trol.evaluation.oracle_store`; drawn samples among them are left out.
        metric: which of their scores counts.
        menu: the router's plans, from the cheapest to the full one; all plans of the rows if None.
        after: layers that run before the router chooses.
        hidden: width of a vote.
        dial: the dial that the router is left with; see `Router`.
        lessons: how it is trained.
        prompts: makes the inputs of questions, where they are more than text.

    Raises:
        UsageError: a policy is attached already, the menu does not fit, or a setting is out of
            its range.
        DataError: an item lacks a level.
        TrainingError: the loss is no number any more.
    """
    lessons = lessons or Lessons()
    _check(lessons)
    layers = len(layer_list(find_decoder(model)) or ())
    data = table(rows, metric, layers, menu, lessons.tolerance)
    if len(data.items) < 2:
        raise UsageError(f"{len(data.items)} questions are too few to hold some out; give more.")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(lessons.seed)
        router = Router(data.menu, after=after, hidden=hidden, dial=dial)
        attach(model, router)
    try:
        states = question_states(model, data.questions, prompts or text_prompts(processor))
        learnt, held = _split(len(data.items), lessons)
        curve, best = _learn(_router_head(model), states, data, (learnt, held), lessons)
    except BaseException:
        detach(model)
        raise
    found = report(_logits(_router_head(model), [states[i] for i in held]), data.of(held), DIALS)
    return RouterTraining(router, curve, best, [data.items[i] for i in held], found)


def router_report(
    model: Any,
    processor: Any,
    rows: Iterable[OracleRow],
    *,
    metric: str,
    tolerance: float = 0.0,
    dials: Sequence[float] = DIALS,
    prompts: Prompts | None = None,
) -> dict[str, Any]:
    """What an attached router would have cost and scored on an oracle's rows; see `report`.

    Raises:
        UsageError: no router is attached.
        DataError: an item lacks a level of its menu.
    """
    _, stack = attached(model)
    if not isinstance(stack.depth_policy, Router):
        raise UsageError(
            f"{stack.depth_policy.name} is attached, not a router; load one with trol.load."
        )
    data = table(rows, metric, stack.depth_layers, stack.depth_policy.plans, tolerance)
    states = question_states(model, data.questions, prompts or text_prompts(processor))
    return report(_logits(_router_head(model), states), data, dials)


def text_prompts(processor: Any) -> Prompts:
    """Questions in text through the processor's chat template, padded on the left."""

    def made(rows: Sequence[OracleRow]) -> Any:
        sees = isinstance(processor, ProcessorMixin)
        told: list[Any] = [[{"role": "user", "content": row.question}] for row in rows]
        if sees:
            told = [Pair(row.question, "", row.type).messages(answered=False) for row in rows]
        tokenizer = getattr(processor, "tokenizer", processor)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        tokenizer.padding_side = "left"
        padding: dict[str, Any] = {"padding": True}
        settings = {"processor_kwargs": padding} if sees else padding
        form: dict[str, Any] = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
        return processor.apply_chat_template(told, add_generation_prompt=True, **form, **settings)

    return made


@torch.no_grad()
def question_states(model: Any, rows: Sequence[OracleRow], prompts: Prompts) -> list[Tensor]:
    """What enters the attached router's layer, of each question's tokens: N times [T, D]."""
    host, stack = attached(model)
    layer: Any = (layer_list(stack) or ())[stack.depth_policy.after]
    entered: list[Tensor] = []
    hook = layer.register_forward_pre_hook(
        lambda _, given, named: entered.append(given[0] if given else named["hidden_states"]),
        with_kwargs=True,
    )
    lean = SLICES_LOGITS in inspect.signature(host.forward).parameters
    states: list[Tensor] = []
    was_training = host.training
    host.eval()
    try:
        with depth(host, f"exit@{stack.depth_policy.after}"):
            for start in range(0, len(rows), AT_ONCE):
                inputs = prompts(rows[start : start + AT_ONCE]).to(host.device)
                host(**inputs, use_cache=False, **({SLICES_LOGITS: 1} if lean else {}))
                real = inputs["attention_mask"].bool()
                states += [x[mask].cpu() for x, mask in zip(entered.pop(), real, strict=True)]
    finally:
        hook.remove()
        host.train(was_training)
    return states


def _router_head(model: Any) -> RouterHead:
    _, stack = attached(model)
    found: Any = gates_of(stack)[stack.depth_policy.after]
    return found.requires_grad_(True)


def _split(count: int, lessons: Lessons) -> tuple[list[int], list[int]]:
    order = list(range(count))
    random.Random(f"router/{lessons.seed}").shuffle(order)
    held = min(count - 1, max(1, round(count * lessons.validation)))
    return sorted(order[held:]), sorted(order[:held])


def _learn(
    head: RouterHead,
    states: Sequence[Tensor],
    data: Table,
    split: tuple[list[int], list[int]],
    lessons: Lessons,
) -> tuple[list[dict[str, float]], int]:
    """Trains the head in place, and leaves it as it was after its best epoch."""
    learnt, held = split
    labels = data.suffices[:, :-1].float()
    loss_of = _balanced(labels[learnt])
    steps = torch.optim.AdamW(
        head.parameters(), lr=lessons.learning_rate, weight_decay=lessons.weight_decay
    )
    order, best, curve = random.Random(lessons.seed), 0, []
    kept: dict[str, Tensor] = {}
    for epoch in range(lessons.epochs):
        shuffled, losses = order.sample(learnt, len(learnt)), []
        for start in range(0, len(shuffled), lessons.batch):
            some = shuffled[start : start + lessons.batch]
            logits = head(*_padded([states[i] for i in some], head))
            loss = _finite(loss_of(logits.cpu(), labels[some]), epoch)
            steps.zero_grad()
            loss.backward()
            steps.step()
            losses.append(loss.item() * len(some))
        unseen = loss_of(_logits(head, [states[i] for i in held]), labels[held])
        unseen = _finite(unseen, epoch).item()
        curve.append({"loss": sum(losses) / len(learnt), "validation_loss": unseen})
        if unseen <= min(point["validation_loss"] for point in curve):
            best, kept = epoch, {n: p.detach().clone() for n, p in head.named_parameters()}
    head.load_state_dict(kept)
    return curve, best


def _finite(loss: Tensor, epoch: int) -> Tensor:
    if not loss.isfinite():
        raise TrainingError(
            f"epoch {epoch + 1}: the router's loss is {loss.item()}; lower the learning rate."
        )
    return loss


def _balanced(labels: Tensor) -> nn.BCEWithLogitsLoss:
    """Binary cross-entropy in which yes and no count the same for each level, up to a bound."""
    yes = labels.sum(0)
    weight = ((len(labels) - yes) / yes.clamp(min=1)).clamp(1 / MOST_WEIGHT, MOST_WEIGHT)
    return nn.BCEWithLogitsLoss(pos_weight=weight)


@torch.no_grad()
def _logits(head: RouterHead, states: Sequence[Tensor]) -> Tensor:
    """Shape: [N, M - 1], on the CPU."""
    parts = [
        head(*_padded(states[start : start + AT_ONCE], head)).cpu()
        for start in range(0, len(states), AT_ONCE)
    ]
    return torch.cat(parts)


def _padded(states: Sequence[Tensor], head: RouterHead) -> tuple[Tensor, Tensor]:
    """States [B, T, D] and which of them are real [B, T], where the head is."""
    device = head.vote_weight.device
    counts = torch.tensor([len(one) for one in states])
    real = torch.arange(int(counts.max()))[None] < counts[:, None]
    return pad_sequence(list(states), batch_first=True).to(device), real.to(device)


def _check(lessons: Lessons) -> None:
    if lessons.epochs < 1 or lessons.batch < 1:
        raise UsageError(
            f"epochs is {lessons.epochs} and batch is {lessons.batch}; give 1 or more of each."
        )
    for name in ("learning_rate", "weight_decay", "tolerance"):
        if not getattr(lessons, name) >= 0:
            raise UsageError(f"{name} is {getattr(lessons, name)}; give 0 or more.")
    if not 0 < lessons.validation < 1:
        raise UsageError(f"validation is {lessons.validation}, but must lie in (0, 1).")
