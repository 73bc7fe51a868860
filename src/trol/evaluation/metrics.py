"""Metrics: how near an answer comes to its reference, per question."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import BatchEncoding

from trol.data.conversations import ConversationCollator
from trol.depth import is_attached
from trol.depth.readout import Readout
from trol.depth.roles import IGNORED_LABEL
from trol.errors import HostError, UsageError, unknown
from trol.evaluation.tasks import (
    Heard,
    Item,
    batches,
    fitted,
    messages,
    padded,
    task_of,
    tokenizer_of,
)

ROUGE = ("rouge1", "rouge2", "rougeL")
METRICS = (*ROUGE, "exact", "contains", "loss")
"""ROUGE-1, -2 and -L (F1, without a stemmer as in Glavas et al., arXiv 2410.20022), words equal to
the reference's, the reference's among the answer's words, and the mean negative log-likelihood of
the reference."""

LOSS_BATCH = 32
"""References that are read at once."""

LOGITS_AT_ONCE = 2**24
"""Logits that are in memory together, one token's at least: 64 MiB in float32."""


def check_metric(task: str, metric: str) -> None:
    """Raises `UsageError` where the metric is unknown, or the task has no references for it."""
    if metric not in METRICS:
        raise unknown("metric", metric, METRICS)
    known = task_of(task).metrics
    if metric not in known:
        raise UsageError(
            f"the task {task} has no references for {metric}; measure it by {', '.join(known)}."
        )


def scores(metric: str, given: Sequence[str], items: Sequence[Item]) -> list[float]:
    """How good each answer is, in [0, 1] (1 = best), by a metric that reads texts.

        F1 = 2 P R / (P + R), of n-grams (rouge1, rouge2) or the longest common subsequence (rougeL)

    Raises:
        UsageError: the metric is unknown, or is `loss`, which reads no answers: see `losses`.
    """
    score = _score(metric)
    return [score(answer, item.answer) for answer, item in zip(given, items, strict=True)]


def losses(
    model: Any,
    processor: Any,
    items: Sequence[Item],
    *,
    batch: int = LOSS_BATCH,
    heard: Heard = lambda done: None,
) -> list[float]:
    """Mean negative log-likelihood of each reference's tokens, its end included. Unit: nats.

        loss = - mean_t log p(y_t | question, y_<t)

    The reference's tokens are answer, all others question, as in `generate`; of a window of plain
    text all are answer that something comes before. `heard` is told how many items are done.

    Raises:
        HostError: the model has no head that is a module.
    """
    found: list[float] = []
    tokenizer = tokenizer_of(processor)
    for some in batches(items, batch):
        inputs = labelled(model, processor, some, tokenizer).to(model.device)
        found += mean_losses(model, dict(inputs))
        heard(len(found))
    return found


@torch.inference_mode()
def mean_losses(model: Any, inputs: dict[str, Tensor]) -> list[float]:
    """Mean loss of the labelled tokens of each row: [B].

    Only the states before them go through the head, and so many at once that their logits stay
    below `LOGITS_AT_ONCE`, however many rows, tokens and words there are.
    """
    labels = inputs.pop("labels")
    if is_attached(model):
        # With labels, the host would make all logits.
        inputs["assistant_masks"] = labels != IGNORED_LABEL
    readout = Readout(model)
    with readout.unread() as kept:
        vocabulary = model(**inputs, use_cache=False).logits.shape[-1]
    if len(kept) != 1:
        raise HostError(
            f"{type(model).__name__} called its head {len(kept)} times in one pass, so what it "
            "would read is not known; measure by a metric of answers, such as rougeL."
        )
    labels = labels[:, 1:].to(kept[0].device)
    rows, at = (labels != IGNORED_LABEL).nonzero(as_tuple=True)
    states, wanted = kept[0][rows, at], labels[rows, at]
    size = max(1, LOGITS_AT_ONCE // vocabulary)
    each = torch.cat(
        [
            functional.cross_entropy(readout.behind_norm(some).float(), words, reduction="none")
            for some, words in zip(states.split(size), wanted.split(size), strict=True)
        ]
    )
    sums = torch.zeros(len(labels), dtype=torch.double).index_add(
        0, rows.cpu(), each.double().cpu()
    )
    return (sums / rows.cpu().bincount(minlength=len(labels))).tolist()


def labelled(model: Any, processor: Any, items: Sequence[Item], tokenizer: Any) -> Any:
    """The items with their references, padded on the right, `labels` at the references."""
    if any(item.ids for item in items):
        inputs = padded([item.ids for item in items])
        labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, IGNORED_LABEL)
        labels[:, 0] = IGNORED_LABEL  # nothing comes before it
        return BatchEncoding({**inputs, "labels": labels})
    longest = max(len(tokenizer(i.answer, add_special_tokens=False)["input_ids"]) for i in items)
    told = [messages(fitted(model, processor, item, longest), answered=True) for item in items]
    collate = ConversationCollator(processor, plain=True, last=True)
    return BatchEncoding(collate(told))


def _score(metric: str) -> Callable[[str, str], float]:
    if metric in ROUGE:
        scorer = _scorer(metric)
        return lambda given, wanted: scorer.score(wanted, given)[metric].fmeasure
    if metric == "exact":
        return lambda given, wanted: float(words(given) == words(wanted))
    if metric == "contains":
        return contains
    if metric == "loss":
        raise UsageError(
            "loss is no score of an answer; take trol.evaluation.metrics.losses(model, processor, "
            "items), whose smaller values are better."
        )
    raise unknown("metric", metric, METRICS)


@cache
def _scorer(metric: str) -> Any:
    from rouge_score.rouge_scorer import RougeScorer  # noqa: PLC0415 - takes a second, for texts

    return RougeScorer([metric], use_stemmer=False)


def words(text: str) -> list[str]:
    """Lower-cased words without full stops, which `exact` and `contains` compare."""
    return text.lower().replace(".", " ").split()


def contains(given: str, wanted: str) -> float:
    """1 where the words wanted stand in those given, in a row and not inside of longer words."""
    sought, said = " ".join(words(wanted)), " ".join(words(given))
    if not sought:
        return float(not said)
    return float(bool(re.search(rf"(?<!\w){re.escape(sought)}(?!\w)", said)))
