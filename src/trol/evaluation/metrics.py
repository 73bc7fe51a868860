"""Metrics: how near an answer comes to its reference, per question."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch.nn import functional
from transformers import BatchEncoding

from trol.data.chat import IGNORED
from trol.data.conversations import ConversationCollator
from trol.errors import UsageError, unknown
from trol.evaluation.tasks import Item, batches, fitted, messages, task_of, tokenizer_of

ROUGE = ("rouge1", "rouge2", "rougeL")
METRICS = (*ROUGE, "exact", "loss")
"""ROUGE-1, -2 and -L (F1, without a stemmer as in Glavas et al., arXiv 2410.20022), words equal to
the reference's, and the mean negative log-likelihood of the reference."""

LOSS_BATCH = 32
"""References whose loss is computed at once."""


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
    model: Any, processor: Any, items: Sequence[Item], *, batch: int = LOSS_BATCH
) -> list[float]:
    """Mean negative log-likelihood of each reference's tokens, its end included. Unit: nats.

        loss = - mean_t log p(y_t | question, y_<t)

    The reference's tokens are answer, all others question, as in `generate`.
    """
    found: list[float] = []
    tokenizer = tokenizer_of(processor)
    for some in batches(items, batch):
        inputs = labelled(model, processor, some, tokenizer).to(model.device)
        with torch.inference_mode():
            logits = model(**inputs, use_cache=False).logits
        labels = inputs["labels"][:, 1:]
        each = functional.cross_entropy(
            logits[:, :-1].float().transpose(1, 2), labels, ignore_index=IGNORED, reduction="none"
        )  # Shape: [B, T - 1]
        found += (each.sum(1) / (labels != IGNORED).sum(1)).tolist()
    return found


def labelled(model: Any, processor: Any, items: Sequence[Item], tokenizer: Any) -> Any:
    """The items with their references, padded on the right, `labels` at the references."""
    longest = max(len(tokenizer(i.answer, add_special_tokens=False)["input_ids"]) for i in items)
    told = [messages(fitted(model, processor, item, longest), answered=True) for item in items]
    collate = ConversationCollator(processor)
    return BatchEncoding(collate(told))


def _score(metric: str) -> Callable[[str, str], float]:
    if metric in ROUGE:
        scorer = _scorer(metric)
        return lambda given, wanted: scorer.score(wanted, given)[metric].fmeasure
    if metric == "exact":
        return lambda given, wanted: float(words(given) == words(wanted))
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
    """Lower-cased words without full stops, which `exact` compares."""
    return text.lower().replace(".", " ").split()
