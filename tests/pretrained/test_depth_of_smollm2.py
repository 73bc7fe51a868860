"""What depth does to a pretrained model, where a wrong default would break it."""

from __future__ import annotations

from pathlib import Path
from pydoc_data.topics import topics

import pytest
import torch

import trol
from trol.cli.conversation import Conversation
from trol.evaluation.answers import losses
from trol.evaluation.tasks import questions_of

pytestmark = pytest.mark.pretrained


@pytest.mark.parametrize(("start", "much"), [(0.01, False), (None, True)])
def test_gates_that_are_attached_leave_it_what_it_is(
    smollm2: Path, tmp_path: Path, start: float | None, much: bool
) -> None:
    """The default does; the published start, for models trained from nothing, does not."""
    model, tokenizer = trol.load_model(smollm2)
    (tmp_path / "text.txt").write_text(topics["assignment"])
    items = questions_of(model, tokenizer, f"text:{tmp_path / 'text.txt'}", 1, seed=0, window=256)
    (before,) = losses(model, tokenizer, items)
    torch.manual_seed(0)
    trol.attach(model, trol.TrolMixer(scope="all", initial_gate=start))
    (after,) = losses(model, tokenizer, items)
    assert (after - before > 2) == much
    assert much or abs(after - before) < 0.05


def test_it_talks_on_when_the_depth_changes(smollm2: Path) -> None:
    conversation = Conversation(*trol.load_model(smollm2), max_new_tokens=8)
    assert "Paris" in conversation.ask("What is the capital of France? Answer in one word.").text
    conversation.use_plan("0-13 15-29")
    assert "layer visits: 29 for each token" in conversation.depth_in_words()
    assert conversation.ask("And of Italy?").text
    conversation.use_plan(None)
    assert conversation.ask("And of Spain?").text
    assert [turn["role"] for turn in conversation.messages] == ["user", "assistant"] * 3
