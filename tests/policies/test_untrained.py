"""Untrained parts give a warning when they are first used, and no others do."""

import copy
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import trol
from hosts import HOSTS
from trol.depth import attach, attached, depth, detach
from trol.depth.attachment import gates_of
from trol.depth.policy import AbstractPolicy
from trol.family.loading import load_model
from trol.policies.controller import Controller
from trol.policies.exits import EarlyExit
from trol.policies.mixer import TrolMixer
from trol.policies.router import Router
from trol.training import adapters

LEARNT: dict[str, Callable[[], AbstractPolicy]] = {
    "mixer": lambda: TrolMixer(scope="all"),
    "published_mixer": lambda: TrolMixer(scope="all", initial_gate=None),
    "shared": lambda: TrolMixer(scope="all", sharing="shared", tau=0.5),
    "heads": lambda: EarlyExit("margin", 0.5, heads=True, scope="all"),
    "controller": lambda: Controller(scope="all"),
    "random_controller": lambda: Controller(scope="all", initial=None, hidden_layers=1),
    "router": lambda: Router(["0 3", "all"]),
}
"""All policies with parts that learn."""

every = pytest.mark.parametrize("policy", [made() for made in LEARNT.values()], ids=list(LEARNT))


@pytest.fixture
def model() -> Any:
    return HOSTS["llama"].build("eager")


def warnings_of(model: Any, *, training: bool = False) -> list[str]:
    """The warnings of two passes."""
    ids = torch.tensor([[5, 6, 7, 8]])
    answer = torch.tensor([[0, 0, 1, 1]])
    model.train(training)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            model(input_ids=ids, assistant_masks=answer)
    model.eval()
    return [str(one.message) for one in caught if one.category is trol.UntrainedWarning]


@every
def test_one_warning_in_one_line_with_the_cure(model: Any, policy: AbstractPolicy) -> None:
    attach(model, policy)
    (line,) = warnings_of(model)
    assert line.startswith(type(policy).__name__)
    assert "never trained" in line
    assert "Train them (`trol train`), or load them (trol.load, trol.load_model)." in line
    assert "\n" not in line
    assert not warnings_of(model)


@every
def test_generating_warns_as_well(model: Any, policy: AbstractPolicy) -> None:
    attach(model, policy)
    with pytest.warns(trol.UntrainedWarning, match="never trained"):
        model.generate(torch.tensor([[5, 6, 7, 8]]), max_new_tokens=2, do_sample=False)


@every
def test_the_warning_points_at_the_line_that_called_the_model(
    model: Any, policy: AbstractPolicy
) -> None:
    attach(model, policy)
    with pytest.warns(trol.UntrainedWarning) as caught:
        model.generate(torch.tensor([[5, 6, 7, 8]]), max_new_tokens=2, do_sample=False)
    assert [one.filename for one in caught] == [__file__]


PLACES: dict[str, Callable[[Any, str], Any]] = {
    "attach": attach,
    "depth": lambda model, name: depth(model, name).__enter__(),
}


@pytest.mark.parametrize("place", PLACES)
def test_exits_by_name_alone_are_not_calibrated(model: Any, place: str) -> None:
    with pytest.warns(trol.UntrainedWarning, match="not calibrated on this model") as caught:
        PLACES[place](model, "early_exit")
    assert [one.filename for one in caught] == [__file__]


@pytest.mark.parametrize("spec", ["plain", "0-1", EarlyExit("margin", 0.9), "layer_dropout"])
@pytest.mark.filterwarnings("error::trol.errors.UntrainedWarning")
def test_what_needs_no_calibration_gives_no_warning(model: Any, spec: Any) -> None:
    attach(model, spec)


@every
def test_no_warning_in_training_or_under_another_policy(model: Any, policy: AbstractPolicy) -> None:
    attach(model, policy)
    assert not warnings_of(model, training=True)
    with depth(model, "plain"):
        assert not warnings_of(model)
    assert warnings_of(model)


@every
def test_unused_parts_give_no_warning(model: Any, policy: AbstractPolicy) -> None:
    attach(model, TrolMixer(1, scope="all"))
    assert not warnings_of(model)


def stepped(model: Any, _: Path) -> Any:
    learns = {p for gate in gates_of(attached(model)[1]) if gate for p in gate.parameters()}
    optimiser = torch.optim.AdamW([*learns], lr=1e-4)
    for parameter in learns:
        parameter.grad = torch.ones_like(parameter)
    optimiser.step()
    return model


def saved_and_loaded(model: Any, folder: Path) -> Any:
    trol.save(model, folder)
    return trol.load(detach(model), folder)


def states_loaded(model: Any, _: Path) -> Any:
    other = attach(HOSTS["llama"].build("eager"), attached(model)[1].depth_policy)
    stepped(other, _)
    model.load_state_dict(other.state_dict())
    return model


def trained_then(change: Callable[[Any], Any]) -> Callable[[Any, Path], Any]:
    return lambda model, folder: change(stepped(model, folder))


CURES: dict[str, Callable[[Any, Path], Any]] = {
    "a step": stepped,
    "trol.load": saved_and_loaded,
    "load_state_dict": states_loaded,
    "a step, deepcopy": trained_then(copy.deepcopy),
    "a step, pickle": trained_then(lambda model: pickle.loads(pickle.dumps(model))),
    "a step, other type": trained_then(lambda model: model.to(torch.bfloat16)),
}


@every
@pytest.mark.parametrize("cure", CURES)
def test_trained_or_loaded_parts_give_no_warning(
    model: Any, policy: AbstractPolicy, cure: str, tmp_path: Path
) -> None:
    attach(model, policy)
    assert not warnings_of(CURES[cure](model, tmp_path))


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "other type": lambda model: model.to(torch.bfloat16),
    "its own state": lambda model: (model.load_state_dict(model.state_dict()), model)[1],
    "PEFT": lambda model: get_peft_model(model, LoraConfig(target_modules=["q_proj"])),
    "PEFT's copies": lambda model: get_peft_model(
        model, LoraConfig(target_modules=["q_proj"], modules_to_save=["depth"])
    ),
}


@every
@pytest.mark.parametrize("change", COPIES)
def test_a_copy_is_no_training(model: Any, policy: AbstractPolicy, change: str) -> None:
    assert len(warnings_of(COPIES[change](attach(model, policy)))) == 1


@pytest.mark.parametrize(
    ("start", "says"), [(None, "at random"), (0.01, "counts for 0.01"), (0.3, "counts for 0.3")]
)
def test_the_warning_says_what_untrained_gates_do(
    model: Any, start: float | None, says: str
) -> None:
    attach(model, TrolMixer(scope="all", initial_gate=start))
    (line,) = warnings_of(model)
    assert says in line


def test_a_saved_model_gives_no_warning(model: Any, tmp_path: Path) -> None:
    stepped(attach(model, TrolMixer(scope="all")), tmp_path).save_pretrained(tmp_path)
    opened = trol.family.loading.load_host(tmp_path)
    assert not warnings_of(opened)


def test_the_shipped_model_gives_no_warning() -> None:
    opened, _ = load_model("trol-tiny")
    assert not warnings_of(opened)


def test_a_run_of_adapters_gives_no_warning(model: Any, tmp_path: Path) -> None:
    adapters.save_adapters(attach(model, TrolMixer(scope="all")), tmp_path)
    assert not warnings_of(adapters.open_adapters(HOSTS["llama"].build("eager"), tmp_path))


def test_parts_without_memory_are_left_alone(model: Any) -> None:
    attach(model, TrolMixer(scope="all"))
    for layer in attached(model)[1].layers:
        layer.depth = nn.Sequential(nn.Linear(model.config.hidden_size, 1), nn.Flatten(1))
    assert not warnings_of(model)
