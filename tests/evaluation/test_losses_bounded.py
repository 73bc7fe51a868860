"""Losses whose logits never are in memory as a whole: the same numbers, in any family."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from hosts import HOSTS, Host
from laws.subjects import some_hosts
from trol.depth import attach, depth, readout
from trol.errors import HostError
from trol.evaluation.answers import mean_losses
from trol.policies.exits import EarlyExit
from trol.policies.planned import Planned

IGNORED_LABEL = -100
LENGTHS = (9, 5, 7)


def asked(host: Host) -> tuple[Any, dict[str, Tensor]]:
    """A model, and rows of different lengths whose ends are answer."""
    padded = host.right_padded(LENGTHS)
    inputs = dict(padded.batch)
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, IGNORED_LABEL)
    for row in range(len(LENGTHS)):
        labels[row, : row + 2] = IGNORED_LABEL
    return host.build(), {**inputs, "labels": labels}


def unbounded(model: Any, inputs: dict[str, Tensor]) -> list[float]:
    """The same from all logits of the batch."""
    labels = inputs["labels"][:, 1:]
    with torch.no_grad():
        logits = model(**inputs, use_cache=False).logits[:, :-1].float()
    each = functional.cross_entropy(
        logits.transpose(1, 2), labels, ignore_index=IGNORED_LABEL, reduction="none"
    )
    return (each.sum(1) / (labels != IGNORED_LABEL).sum(1)).tolist()


@pytest.mark.parametrize("host", some_hosts(*HOSTS))
def test_they_are_those_of_all_logits(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = asked(host)
    words = model.config.get_text_config().vocab_size
    expected = unbounded(model, inputs)
    for at_once in (1, 3 * words, readout.LOGITS_AT_ONCE):
        monkeypatch.setattr(readout, "LOGITS_AT_ONCE", at_once)
        assert mean_losses(model, dict(inputs)) == pytest.approx(expected, abs=2e-5)


@pytest.mark.parametrize("scope", ["answer", "question", "all"])
@pytest.mark.parametrize("host", some_hosts("llama", "gemma2"))
def test_they_are_so_under_a_plan_and_its_scope(host: Host, scope: Any) -> None:
    model, inputs = asked(host)
    full = unbounded(model, inputs)
    attach(model, "plain")
    with depth(model, Planned("0-1 3", scope=scope)):
        expected = unbounded(model, inputs)
        assert mean_losses(model, dict(inputs)) == pytest.approx(expected, abs=2e-5)
    assert expected != pytest.approx(full, abs=1e-4)


def test_exits_read_the_head_on_the_way() -> None:
    """What a policy reads is not cut, and is not what the loss is made of."""
    model, inputs = asked(HOSTS["llama"])
    full = unbounded(model, inputs)
    attach(model, EarlyExit("margin", 0.02))
    expected = unbounded(model, inputs)
    assert mean_losses(model, dict(inputs)) == pytest.approx(expected, abs=2e-5)
    assert expected != pytest.approx(full, abs=1e-4)


@pytest.mark.parametrize("host", some_hosts("llama", "gemma2", "falcon_h1"))
def test_no_more_logits_than_allowed_are_made(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = asked(host)
    made: list[int] = []

    def count(_: nn.Module, __: Any, out: Tensor) -> None:
        made.append(out.numel())

    head = model.get_output_embeddings()
    head.register_forward_hook(count)
    words = head.weight.shape[0]
    monkeypatch.setattr(readout, "LOGITS_AT_ONCE", 2 * words)
    mean_losses(model, dict(inputs))
    assert max(made) <= max(2, len(LENGTHS)) * words  # the pass reads one position of each row
    wanted = int((inputs["labels"][:, 1:] != IGNORED_LABEL).sum())
    assert sum(made) == (len(LENGTHS) + wanted) * words  # and no position that nobody asks for


def test_a_head_that_is_not_called_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = asked(HOSTS["llama"])
    own = nn.Linear(32, 64)
    monkeypatch.setattr(model, "get_output_embeddings", lambda: own)
    with pytest.raises(HostError, match="called its head 0 times"):
        mean_losses(model, dict(inputs))
