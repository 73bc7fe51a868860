"""What the arms of the study `real` are equal in, and what they start from."""

import pytest
import torch

import trol
from trol.studies import study_of
from trol.studies.real import AS_LONG, AS_MANY, BOTH, GATES, LORA, SIZES, _few_maps
from trol.studies.subject import Subject, make_tiny
from trol.studies.tuned import untuned
from trol.training.adapters import learner_of
from trol.training.recipe import Stage


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    place = tmp_path_factory.mktemp("real")
    amounts = {**study_of("real").amounts["tiny"], "steps": 50}
    return Subject(str(make_tiny(place / "model")), amounts, 1, place)


def learning(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_equal_parameters_and_equal_compute_are_what_they_say(subject: Subject) -> None:
    (arm,) = (one for one in study_of("real").arms(subject) if one.name == SIZES)
    sizes = arm.measure({})
    mixer = learner_of(
        trol.attach(trol.load_model(subject.name)[0], "trol_mixer"),
        Stage(train=("mixers",), data="docstrings", steps=1),
    )
    assert sizes[GATES]["parameters"] == learning(mixer)
    few = learner_of(
        trol.attach(trol.load_model(subject.name)[0], "plain"),
        Stage(("decoder",), "docstrings", steps=1, lora=1, lora_targets=tuple(_few_maps(subject))),
    )
    assert sizes[AS_MANY]["parameters"] == learning(few)
    assert learning(few) == pytest.approx(learning(mixer), abs=max(_few_maps(subject).values()))
    assert sizes[BOTH]["parameters"] - sizes[LORA]["parameters"] == learning(mixer)
    assert sizes[AS_LONG]["compute"] == pytest.approx(sizes[BOTH]["compute"], abs=0.5)
    assert sizes[AS_LONG]["steps"] > 1.5 * sizes[BOTH]["steps"]


def test_arms_start_from_rounded_weights_in_float32(subject: Subject) -> None:
    model = untuned(subject)
    for name, weights in subject.model.state_dict().items():
        assert torch.equal(model.state_dict()[name], weights.bfloat16().float())
