"""A router's settings, its menu, and how it counts votes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import trol
from hosts import HOSTS
from trol.depth import Plan, attach, attached
from trol.depth.attachment import gates_of
from trol.depth.policy import from_settings, to_settings
from trol.errors import AdapterError, UsageError
from trol.policies.router import Router, RouterHead, first_sure

MENU = ["0-1", "0-2", "all"]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"menu": []}, "the menu is"),
        ({}, "give a list of two plans or more"),
        ({"menu": "0-1"}, "give a list of two plans or more"),
        ({"menu": ["all"]}, "give a list of two plans or more"),
        ({"menu": ["0-", "all"]}, "is no segment"),
        ({"menu": MENU, "after": -1}, "after is -1"),
        ({"menu": MENU, "hidden": 0}, "hidden is 0"),
        ({"menu": MENU, "dial": 1.1}, "dial is 1.1"),
        ({"menu": MENU, "scope": "all"}, "cannot wait for its end; set scope='answer'"),
        ({"menu": MENU, "scope": "question"}, "set scope='answer'"),
    ],
)
def test_settings_out_of_range_are_told(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        Router(**settings)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"menu": ["1-2", "all"]}, "plan '1-2' of the menu does not visit each of the layers 0-0"),
        ({"menu": ["0:2", "all"]}, "plan '0:2' of the menu"),
        ({"menu": ["0 2", "0-2", "all"], "after": 2}, "plan '0 2' of the menu"),
        ({"menu": ["0-1", "0-2"]}, r"costs \[2, 3\] .* which comes last"),
        ({"menu": ["0-2", "0-1", "all"]}, r"costs \[3, 2, 4\]"),
        ({"menu": ["0 1:9", "all"]}, r"costs \[10, 4\]"),
        ({"menu": MENU, "after": 4}, "after is 4, but this stack has 4 layers"),
        ({"menu": ["0-1", "0-5"]}, "this stack has 4 layers"),
    ],
)
def test_menus_that_do_not_fit_a_stack(settings: dict[str, Any], said: str) -> None:
    model = HOSTS["llama"].build()
    with pytest.raises(UsageError, match=said):
        attach(model, Router(**settings))
    assert not trol.depth.is_attached(model)


def test_a_full_plan_may_be_written_out_and_plans_without_text_are_kept() -> None:
    policy = Router(["0-1", Plan([1, 0], beyond=1), "0-3"], dial=0.7)
    attach(HOSTS["llama"].build(), policy)
    written = json.loads(json.dumps(to_settings(policy)))
    assert written["menu"] == ["0-1", {"visits": [1, 0], "beyond": 1}, "0-3"]
    assert from_settings(written) == policy
    assert policy != Router(policy.menu, dial=0.6)


def test_the_parameters_lie_on_one_layer() -> None:
    model = attach(HOSTS["llama"].build(), Router(["0-1", "0-2", "all"], after=2, hidden=5))
    gates = gates_of(attached(model)[1])
    assert [type(gate) for gate in gates] == [type(None)] * 2 + [RouterHead] + [type(None)]
    assert sum(p.numel() for p in gates[2].parameters()) == 5 * 32 + 5 + 2 * 5 + 2


def test_the_first_sure_level_is_taken() -> None:
    logits = torch.tensor([[3.0, -3.0], [-3.0, 3.0], [-3.0, -3.0], [3.0, 3.0]])
    assert first_sure(logits, 0.5).tolist() == [0, 1, 2, 0]
    assert first_sure(logits, 0.0).tolist() == [0, 0, 0, 0]
    assert first_sure(logits, 0.99).tolist() == [2, 2, 2, 2]
    assert first_sure(torch.full((1, 2), 99.0), 1.0).tolist() == [2]  # its sigmoid is 1


def test_votes_are_a_mean_over_the_question_alone() -> None:
    """Whatever stands at padding, and at whatever scale the states are."""
    head = RouterHead(8, 4, 2)
    states, question = torch.randn(2, 5, 8), torch.ones(2, 5, dtype=torch.bool)
    question[0, :2] = False
    logits = head(states, question)
    assert torch.allclose(logits[:1], head(states[:1, 2:], question[:1, 2:]), atol=1e-6)
    assert torch.allclose(logits, head(100 * states, question), atol=1e-4)
    assert torch.allclose(logits.half(), head.half()(states, question).half(), atol=1e-2)


def test_an_adapter_of_another_host_is_refused(tmp_path: Path) -> None:
    trol.save(attach(HOSTS["llama"].build(), trol.Router(MENU)), tmp_path)
    with pytest.raises(AdapterError, match="load it onto the model it was trained on"):
        trol.load(HOSTS["qwen2"].build(), tmp_path)
    text = json.loads((tmp_path / "depth_config.json").read_text(encoding="utf-8"))
    assert text["menu"] == MENU
