"""What a model answers, and how near it comes to the references: the one loop that generates.

Scores compare generated texts with references; the loss reads the references themselves.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import StoppingCriteria

from trol.depth import is_attached, trace
from trol.depth.readout import Readout
from trol.depth.roles import IGNORED_LABEL
from trol.depth.trace import Trace
from trol.errors import HostError, UsageError, unknown
from trol.evaluation.items import BATCH, Item, batches, fitted_prompts, labelled, tokenizer_of

ROUGE = ("rouge1", "rouge2", "rougeL")
METRICS = (*ROUGE, "exact", "contains", "loss")
"""ROUGE-1, -2 and -L (F1, without a stemmer as in Glavas et al., arXiv 2410.20022), words equal to
the reference's, the reference's among the answer's words, and the mean negative log-likelihood of
the reference."""

LOWER_IS_BETTER = frozenset({"loss"})
"""The metrics of which a smaller value is better."""

LOSS_BATCH = 32
"""References that are read at once."""

ItemsDone = Callable[[float], None]
"""Progress through items: takes how many items' worth of work is done."""

StepsDone = Callable[[int, int], None]
"""Progress in steps: takes how many are done, and how many are expected."""

Around = Callable[[int], AbstractContextManager[Any]]
"""What is open while a batch of so many items is answered or read."""


@dataclass(frozen=True)
class Answers:
    """The greedy answers to a batch of B items."""

    texts: list[str]
    ids: Tensor
    """New tokens. Shape: [B, N]."""
    before_end: Tensor
    """Which of them come before the end of their answer. Shape: [B, N]."""
    trace: Trace | None
    """Visits, weights and cost of the batch, if it was traced."""


class _Progress(StoppingCriteria):
    """Stops no row; reports how far a batch has come after each token."""

    def __init__(self, report: ItemsDone, before: int, *, prompt: int, new_tokens: int) -> None:
        self.report, self.before, self.prompt, self.new_tokens = report, before, prompt, new_tokens

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """Which rows are to stop: none. Shape: [B]."""
        del scores, kwargs
        rows, length = input_ids.shape
        self.report(self.before + rows * (length - self.prompt) / self.new_tokens)
        return torch.zeros(rows, dtype=torch.bool, device=input_ids.device)


def answer(
    model: Any,
    processor: Any,
    items: Sequence[Item],
    *,
    new_tokens: int,
    batch: int = BATCH,
    traced: bool = False,
    settings: Mapping[str, Any] | None = None,
    around: Around = nullcontext,
    progress: ItemsDone = lambda done: None,
) -> Iterator[Answers]:
    """Answers of at most `new_tokens` tokens, batch by batch, padded on the left.

    The policy in force when a batch is drawn from the iterator is the one that answers it.

    Args:
        model: a model, attached or not.
        processor: its processor; of a text decoder, its tokenizer.
        items: the questions.
        new_tokens: the longest answer.
        batch: questions answered at once.
        traced: whether each batch comes with its trace.
        settings: further arguments of `generate`; without, answers are greedy.
        around: what is open while a batch is answered.
        progress: takes how many items' worth of work is done, after each token of a batch.
    """
    done = 0
    for some in batches(items, batch):
        inputs = fitted_prompts(model, processor, some, new_tokens)
        length = inputs["input_ids"].shape[1]
        reporter = _Progress(progress, done, prompt=length, new_tokens=new_tokens)
        chosen = {"stopping_criteria": [reporter], **(settings or {})}
        tracing = trace(model) if traced else nullcontext()
        with tracing as seen, torch.inference_mode(), around(len(some)):
            ids = greedy(model, inputs, new_tokens, **chosen)
        texts = tokenizer_of(processor).batch_decode(ids, skip_special_tokens=True)
        done += len(some)
        yield Answers(texts, ids, before_end(model, ids), seen)


def answers(
    model: Any,
    processor: Any,
    items: Sequence[Item],
    *,
    new_tokens: int,
    **options: Any,
) -> list[str]:
    """The texts of all answers; `options` are further arguments of `answer`."""
    parts = answer(model, processor, items, new_tokens=new_tokens, **options)
    return [text for part in parts for text in part.texts]


def greedy(model: Any, inputs: Any, new_tokens: int, **settings: Any) -> Tensor:
    """The new tokens of a greedy `generate`, if `settings` do not say otherwise. Shape: [B, N]."""
    ids = model.generate(**inputs, **{"max_new_tokens": new_tokens, "do_sample": False, **settings})
    return ids[:, inputs["input_ids"].shape[1] :]


def before_end(model: Any, new: Tensor) -> Tensor:
    """Which new tokens come before the end of their answer. Shape: [B, N], in and out."""
    ends = model.generation_config.eos_token_id
    ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    ended = torch.isin(new, torch.tensor(ends, dtype=new.dtype, device=new.device))
    return ended.long().cumsum(1) == 0


def scores(metric: str, texts: Sequence[str], items: Sequence[Item]) -> list[float]:
    """The score of each answer, in [0, 1] (1 = best), by a metric that reads texts.

        F1 = 2 P R / (P + R), of n-grams (rouge1, rouge2) or the longest common subsequence (rougeL)

    Raises:
        UsageError: the metric is unknown, or is `loss`, which reads no answers: see `losses`.
    """
    score = _score(metric)
    return [score(text, item.answer) for text, item in zip(texts, items, strict=True)]


def _score(metric: str) -> Callable[[str, str], float]:
    if metric in ROUGE:
        scorer = _scorer(metric)
        return lambda text, reference: scorer.score(reference, text)[metric].fmeasure
    if metric == "exact":
        return lambda text, reference: float(_words(text) == _words(reference))
    if metric == "contains":
        return _contains
    if metric == "loss":
        raise UsageError(
            "loss is no score of an answer; take trol.evaluation.answers.losses(model, processor, "
            "items), whose smaller values are better."
        )
    raise unknown("metric", metric, METRICS)


@cache
def _scorer(metric: str) -> Any:
    from rouge_score.rouge_scorer import RougeScorer  # noqa: PLC0415 - takes a second, for texts

    return RougeScorer([metric], use_stemmer=False)


def _words(text: str) -> list[str]:
    """Lower-cased words without full stops."""
    return text.lower().replace(".", " ").split()


def _contains(text: str, reference: str) -> float:
    """1 where the reference's words stand in the text, in a row and not inside of longer words."""
    part, whole = " ".join(_words(reference)), " ".join(_words(text))
    if not part:
        return float(not whole)
    return float(bool(re.search(rf"(?<!\w){re.escape(part)}(?!\w)", whole)))


def losses(
    model: Any,
    processor: Any,
    items: Sequence[Item],
    *,
    batch: int = LOSS_BATCH,
    around: Around = nullcontext,
    progress: ItemsDone = lambda done: None,
) -> list[float]:
    """Mean negative log-likelihood of each reference's tokens, its end included. Unit: nats.

        loss = - mean_t log p(y_t | question, y_<t)

    The reference's tokens have the role answer, all others question, as in `generate`. In a window
    of plain text every token that another precedes is answer. `progress` takes how many items are
    done.

    Raises:
        HostError: the model has no head that is a module.
    """
    values: list[float] = []
    for some in batches(items, batch):
        with around(len(some)):
            values += mean_losses(model, dict(labelled(model, processor, some)))
        progress(len(values))
    return values


def mean_loss(items: Sequence[Item], values: Sequence[float]) -> float:
    """The loss of all items, of which each has its own: the mean over answers, however long.

    Of windows of plain text, it is the mean over all tokens that they predict.
    """
    weights = [item.weight for item in items]
    return sum(w * value for w, value in zip(weights, values, strict=True)) / sum(weights)


@torch.inference_mode()
def mean_losses(model: Any, inputs: dict[str, Tensor]) -> list[float]:
    """Mean loss of the labelled tokens of each row: [B]."""
    read = labelled_tokens(model, inputs)
    sums = torch.zeros(read.rows, dtype=torch.double)
    sums = sums.index_add(0, read.row, -read.log_probability)
    return (sums / read.row.bincount(minlength=read.rows)).tolist()


@dataclass(frozen=True)
class LabelledTokens:
    """What a model says of the N labelled tokens of a batch, row by row."""

    rows: int
    """Rows of the batch."""
    row: Tensor
    """The row of each token. Shape: [N]."""
    log_probability: Tensor
    """Unit: nats. Shape: [N], double."""
    likeliest: Tensor
    """Whether no other token is likelier. Shape: [N]."""


@torch.inference_mode()
def labelled_tokens(model: Any, inputs: Mapping[str, Tensor]) -> LabelledTokens:
    """Reads a batch with `labels` once; tensors of the result are on the CPU.

    Only the states before labelled tokens go through the head, and so many at once that their
    logits fit (`Readout.at_once`), whatever the batch and the vocabulary are.

    Raises:
        HostError: the head is not called once in a pass.
    """
    states = unread_states(model, inputs)
    labels = inputs["labels"][:, 1:].to(states.device)
    rows, at = (labels != IGNORED_LABEL).nonzero(as_tuple=True)
    read, targets, nats, likeliest = Readout(model), labels[rows, at], [], []
    pairs = zip(states[rows, at].split(read.at_once), targets.split(read.at_once), strict=True)
    for some, words in pairs:
        logits = read.behind_norm(some).float()
        nats.append(functional.cross_entropy(logits, words, reduction="none"))
        likeliest.append(logits.argmax(-1) == words)
    log_probability = -torch.cat(nats).double().cpu()
    return LabelledTokens(len(labels), rows.cpu(), log_probability, torch.cat(likeliest).cpu())


def unread_states(model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    """What the head would read of labelled inputs, without their logits. Shape: [B, T, D].

    Raises:
        HostError: the head is not called once in a pass.
    """
    given = dict(inputs)
    labels = given.pop("labels")  # with them, the host would make all logits
    if is_attached(model):
        given["assistant_masks"] = labels != IGNORED_LABEL
    with Readout(model).unread() as kept:
        model(**given, use_cache=False)
    if len(kept) != 1:
        raise HostError(
            f"{type(model).__name__} called its head {len(kept)} times in one pass, so what it "
            "would read is not known; measure by a metric of answers, such as rougeL."
        )
    return kept[0]
