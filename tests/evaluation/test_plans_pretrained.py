"""What a pretrained decoder teaches a plan: SmolLM2 on text that it did not see."""

import math
import pydoc_data.topics as unseen
from pathlib import Path
from typing import Any

import pytest

from trol.evaluation.items import Item
from trol.evaluation.plan_search import chosen_plan, plan_loss
from trol.evaluation.tasks import questions_of
from trol.family.loading import load_model

pytestmark = pytest.mark.pretrained

KEEP = 22 / 30


@pytest.fixture(scope="module")
def reader(smollm2: Path) -> tuple[Any, Any]:
    return load_model(smollm2)


@pytest.fixture(scope="module")
def windows(reader: tuple[Any, Any], tmp_path_factory: pytest.TempPathFactory) -> list[Item]:
    """Four windows of 256 tokens of Python's own topics."""
    file = tmp_path_factory.mktemp("unseen") / "topics.txt"
    file.write_text("\n\n".join(unseen.topics[name] for name in sorted(unseen.topics)))
    return questions_of(*reader, f"text:{file}", 4, seed=0, window=256)


def test_a_block_in_the_middle_needs_the_first_token(
    reader: tuple[Any, Any], windows: list[Item]
) -> None:
    made = chosen_plan("middle", *reader, windows[:2], KEEP, scope="all")
    assert str(made.plan) == "0-10 19-29"
    assert made.keep_first == 1
    # One layer of the block builds the sink; a third of the harm is done at that one token.
    assert made.losses["keep_first=0"] > made.losses["keep_first=1"] + 0.5


def test_influence_is_far_better_than_even_spacing(
    reader: tuple[Any, Any], windows: list[Item]
) -> None:
    """On windows that it did not see: within 4.5 times the full perplexity, as no exit is."""
    made = chosen_plan("influence", *reader, windows[:2], KEEP, scope="all")
    even = chosen_plan("uniform", *reader, windows[:1], KEEP, scope="all")
    judged = [
        plan_loss(*reader, windows[2:], one.plan, "all", keep_first=one.keep_first)
        for one in (made, even)
    ]
    full = plan_loss(*reader, windows[2:], chosen_plan("exit", *reader, [], 1).plan, "all")
    assert judged[0] - full < math.log(4.5)
    assert judged[1] > judged[0] + 2
