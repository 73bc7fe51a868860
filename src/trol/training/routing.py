"""Training a router on an oracle's rows: which questions a cheaper plan answers as well.

The model stays as it is. Its states at the router's layer are computed once for each question;
what is learnt from them is small.
"""

import inspect
import math
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
from trol.evaluation.store import OracleRow
from trol.host.generation import SLICES_LOGITS
from trol.host.layers import find_decoder, layer_list
from trol.policies.planned import plan_of
from trol.policies.router import Router, RouterHead, first_sure
from trol.strict import check, setting

DIALS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
"""Dials of a report."""

AT_ONCE = 32
"""Questions whose states are computed at once."""

MOST_WEIGHT = 20.0
"""Largest weight of the rarer answer (enough, or not) about a level."""

Prompts = Callable[[Sequence[OracleRow]], Any]
"""Rows, one for each question, to inputs that the host takes, padded anyhow."""


@dataclass(frozen=True)
class RouterTrainingArgs:
    """How a router is trained."""

    epochs: int = setting(30, bounds=(1, math.inf))
    batch: int = setting(32, bounds=(1, math.inf))
    """Questions in one step."""
    learning_rate: float = setting(1e-3, bounds=(0, math.inf))
    weight_decay: float = setting(0.01, bounds=(0, math.inf))
    validation: float = 0.2
    """Share of the questions that are held out, in (0, 1)."""
    tolerance: float = setting(0.0, bounds=(0, math.inf))
    """How far a level's score may lie below the full model's and still suffice."""
    seed: int = 0
    """Seed of the first weights, of the split, and of the order."""


@dataclass(frozen=True)
class RouterTraining:
    """The result of `train_router`."""

    router: Router
    """The policy that is attached now."""
    curve: list[dict[str, float]]
    """`{"loss", "validation_loss"}` of each epoch."""
    best: int
    """The epoch whose weights were kept."""
    held_out: list[int]
    """Numbers of the questions that were not learnt from."""
    report: dict[str, Any]
    """`router_report` on the questions that were held out."""


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
    def suffices(self) -> Tensor:
        """Where a level scores at least what the full one does, within the tolerance: [N, M]."""
        return self.scores >= self.scores[:, -1:] - self.tolerance

    def of(self, places: list[int]) -> "Table":
        """The table of some of its questions, by their places."""
        questions = tuple(self.questions[i] for i in places)
        return Table(self.menu, questions, self.costs[places], self.scores[places], self.tolerance)


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
    args: RouterTrainingArgs | None = None,
    prompts: Prompts | None = None,
) -> RouterTraining:
    """Attaches a router to a plain model, in place, and trains it on what an oracle saw.

        label[i, m] = 1 where score(item i, level m) >= score(item i, full) - tolerance
        loss = BCE(router's logits, labels), the rarer answer of each level weighed up

    Args:
        model: the model whose answers the rows are.
        processor: its processor, or the tokenizer of a text model.
        rows: of `trol.evaluation.store`; drawn samples among them are left out.
        metric: which of their scores counts.
        menu: the router's plans, from the cheapest to the full one; all plans of the rows if None.
        after: layers that run before the router chooses.
        hidden: width of the router's hidden layer.
        dial: the dial that the router is left with; see `Router`.
        args: how it is trained.
        prompts: makes the inputs of questions, where they are more than text.

    Raises:
        UsageError: a policy is attached already, the menu does not fit, or a setting is out of
            its range.
        DataError: an item lacks a level.
        TrainingError: the loss is no number any more.
    """
    args = args or RouterTrainingArgs()
    check(args)
    if not 0 < args.validation < 1:
        raise UsageError(f"validation is {args.validation}, but must lie in (0, 1).")
    layers = len(layer_list(find_decoder(model)) or ())
    data = _table(rows, metric, layers, menu, args.tolerance)
    count = len(data.questions)
    if count < 2:
        raise UsageError(f"{count} questions are too few to hold some out; give more.")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(args.seed)
        router = Router(data.menu, after=after, hidden=hidden, dial=dial)
        attach(model, router)
    order = list(range(count))
    random.Random(f"router/{args.seed}").shuffle(order)
    held = min(count - 1, max(1, round(count * args.validation)))
    learnt, held_out = sorted(order[held:]), sorted(order[:held])
    try:
        states = question_states(model, data.questions, prompts or text_prompts(processor))
        curve, best = _learn(_head(model), states, data, (learnt, held_out), args)
    except BaseException:
        detach(model)
        raise
    unseen = data.of(held_out)
    report = _report(_logits(_head(model), [states[i] for i in held_out]), unseen, DIALS)
    return RouterTraining(router, curve, best, [row.item for row in unseen.questions], report)


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
    """What an attached router would have cost and scored on an oracle's rows, at each dial.

    `random` deals the levels that the router chose to questions at random: the same budget,
    expected. `oracle` takes the cheapest level that suffices.

    Raises:
        UsageError: no router is attached.
        DataError: an item lacks a level of its menu.
    """
    _, stack = attached(model)
    if not isinstance(stack.depth_policy, Router):
        raise UsageError(
            f"{stack.depth_policy.name} is attached, not a router; load one with trol.load."
        )
    data = _table(rows, metric, stack.depth_layers, stack.depth_policy.plans, tolerance)
    states = question_states(model, data.questions, prompts or text_prompts(processor))
    return _report(_logits(_head(model), states), data, dials)


def text_prompts(processor: Any) -> Prompts:
    """Questions in text through the processor's chat template, padded on the left."""

    def encode(rows: Sequence[OracleRow]) -> Any:
        tokenizer = getattr(processor, "tokenizer", processor)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        tokenizer.padding_side = "left"
        form: dict[str, Any] = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
        if isinstance(processor, ProcessorMixin):
            chats = [Pair(row.question, "", row.type).messages(answered=False) for row in rows]
            form["processor_kwargs"] = {"padding": True}
        else:
            chats = [[{"role": "user", "content": row.question}] for row in rows]
            form["padding"] = True
        return processor.apply_chat_template(chats, add_generation_prompt=True, **form)

    return encode


@torch.no_grad()
def question_states(model: Any, rows: Sequence[OracleRow], prompts: Prompts) -> list[Tensor]:
    """The input of the attached router's layer for each question: N times [T, D]."""
    host, stack = attached(model)
    layer: Any = (layer_list(stack) or ())[stack.depth_policy.after]
    entered: list[Tensor] = []
    hook = layer.register_forward_pre_hook(
        lambda _, inputs, named: entered.append(inputs[0] if inputs else named["hidden_states"]),
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


def _table(
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
    metrics = set.intersection(*(set(row.scores) for row in greedy))
    if metric not in metrics:
        raise unknown("metric of these rows", metric, metrics)
    cells = {(row.item, Plan(row.plan).for_layers(layers)): row for row in greedy}
    costs = {row.plan: row.cost for row in greedy}
    cheap_first = sorted(costs, key=lambda text: (costs[text], text))
    plans = tuple(plan_of(plan) for plan in (cheap_first if menu is None else menu))
    answers: list[list[OracleRow]] = []
    for item in sorted({row.item for row in greedy}):
        answers.append([])
        for plan in plans:
            row = cells.get((item, plan.for_layers(layers)))
            if row is None:
                raise DataError(
                    f"question {item} was not answered at level '{plan}'; finish the oracle's "
                    "folder, or leave the level out of the menu."
                )
            answers[-1].append(row)
    return Table(
        plans,
        tuple(levels[0] for levels in answers),
        torch.tensor([[float(row.cost) for row in levels] for levels in answers]),
        torch.tensor([[row.value(metric) for row in levels] for levels in answers]),
        tolerance,
    )


def _report(logits: Tensor, data: Table, dials: Sequence[float]) -> dict[str, Any]:
    """The result of `router_report`. Shape of logits: [N, M - 1]."""
    suffices = data.suffices
    right = (logits > 0) == suffices[:, :-1]
    cheapest = suffices.int().argmax(1)  # the full one suffices always
    full = torch.full_like(cheapest, len(data.menu) - 1)
    at_dials = []
    for dial in dials:
        levels = first_sure(logits, dial)
        shares = torch.bincount(levels, minlength=len(data.menu)) / len(levels)
        dealt = {
            "cost": (shares * data.costs.mean(0)).sum().item(),
            "score": (shares * data.scores.mean(0)).sum().item(),
        }
        point = {"dial": dial, **_means(levels, data), "random": dealt, "shares": shares.tolist()}
        at_dials.append(point)
    return {
        "questions": len(data.questions),
        "menu": [str(plan) for plan in data.menu],
        "accuracy": right.float().mean().item(),
        "accuracy_by_level": right.float().mean(0).tolist(),
        "suffices_by_level": suffices.float().mean(0).tolist(),
        "full": _means(full, data),
        "oracle": _means(cheapest, data),
        "dials": at_dials,
    }


def _means(levels: Tensor, data: Table) -> dict[str, float]:
    """Mean cost and score where question i is answered at level levels[i]."""
    return {
        "cost": data.costs.gather(1, levels[:, None]).mean().item(),
        "score": data.scores.gather(1, levels[:, None]).mean().item(),
    }


def _head(model: Any) -> RouterHead:
    _, stack = attached(model)
    head: Any = gates_of(stack)[stack.depth_policy.after]
    return head.requires_grad_(True)


def _learn(
    head: RouterHead,
    states: Sequence[Tensor],
    data: Table,
    split: tuple[list[int], list[int]],
    args: RouterTrainingArgs,
) -> tuple[list[dict[str, float]], int]:
    """Trains the head in place, and leaves it as it was after its best epoch."""
    learnt, held_out = split
    labels = data.suffices[:, :-1].float()
    # Yes and no count the same for each level, up to a bound.
    yes = labels[learnt].sum(0)
    weight = ((len(learnt) - yes) / yes.clamp(min=1)).clamp(1 / MOST_WEIGHT, MOST_WEIGHT)
    loss_of = nn.BCEWithLogitsLoss(pos_weight=weight)
    adamw = torch.optim.AdamW(
        head.parameters(), lr=args.learning_rate, weight_decay=args.weight_decay
    )
    order, best, curve = random.Random(args.seed), 0, []
    best_weights: dict[str, Tensor] = {}
    for epoch in range(args.epochs):
        shuffled, losses = order.sample(learnt, len(learnt)), []
        for start in range(0, len(shuffled), args.batch):
            batch = shuffled[start : start + args.batch]
            logits = head(*_padded([states[i] for i in batch], head))
            loss = _finite(loss_of(logits.cpu(), labels[batch]), epoch)
            adamw.zero_grad()
            loss.backward()
            adamw.step()
            losses.append(loss.item() * len(batch))
        unseen = loss_of(_logits(head, [states[i] for i in held_out]), labels[held_out])
        unseen = _finite(unseen, epoch).item()
        curve.append({"loss": sum(losses) / len(learnt), "validation_loss": unseen})
        if unseen <= min(point["validation_loss"] for point in curve):
            best = epoch
            best_weights = {name: p.detach().clone() for name, p in head.named_parameters()}
    head.load_state_dict(best_weights)
    return curve, best


def _finite(loss: Tensor, epoch: int) -> Tensor:
    if not loss.isfinite():
        raise TrainingError(
            f"epoch {epoch + 1}: the router's loss is {loss.item()}; lower the learning rate."
        )
    return loss


@torch.no_grad()
def _logits(head: RouterHead, states: Sequence[Tensor]) -> Tensor:
    """The head's logits, on the CPU. Shape: [N, M - 1]."""
    starts = range(0, len(states), AT_ONCE)
    return torch.cat([head(*_padded(states[i : i + AT_ONCE], head)).cpu() for i in starts])


def _padded(states: Sequence[Tensor], head: RouterHead) -> tuple[Tensor, Tensor]:
    """States [B, T, D] and which of them are real [B, T], where the head is."""
    device = head.vote_weight.device
    counts = torch.tensor([len(one) for one in states])
    real = torch.arange(int(counts.max()))[None] < counts[:, None]
    return pad_sequence(list(states), batch_first=True).to(device), real.to(device)
