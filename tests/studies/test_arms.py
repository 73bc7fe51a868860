"""The arms of studies against loops written by hand over transformers' own layers."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from trol.depth import is_attached
from trol.policies.mixer import TrolMixer
from trol.studies.subject import Subject, leaving_out, make_tiny, planned, twice
from trol.studies.untrained_traversal import HalfSteps, _halved

AMOUNTS = {"windows": 3, "window": 24, "chosen_by": 2}

Layer = Callable[[torch.Tensor], torch.Tensor]


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    place = tmp_path_factory.mktemp("studies")
    subject = Subject(str(make_tiny(place / "model")), AMOUNTS, 1, place)
    for parameter in subject.model.parameters():  # so that layers matter
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return subject


@torch.inference_mode()
def by_hand(subject: Subject, visit: Callable[[int, torch.Tensor, Layer], Any]) -> list[float]:
    """Losses of the windows where layer l's output is visit(l, x, L)."""
    decoder = subject.model.model
    found = []
    for item in subject.windows():
        ids = torch.tensor([item.ids])
        positions = torch.arange(ids.shape[1])[None]
        state = decoder.embed_tokens(ids)
        rope = decoder.rotary_emb(state, positions)
        for number, layer in enumerate(decoder.layers):
            run = partial(layer, position_embeddings=rope, position_ids=positions)
            state = visit(number, state, run)
        logits = subject.model.lm_head(decoder.norm(state))[0, :-1]
        found.append(cross_entropy(logits, ids[0, 1:]).item())
    return found


def spared(new: torch.Tensor, plain: torch.Tensor) -> torch.Tensor:
    """The new states, but the first token's."""
    return torch.cat([plain[:, :1], new[:, 1:]], 1)


def half(x: torch.Tensor, layer: Layer) -> torch.Tensor:
    return x + (layer(x) - x) / 2


LAYER = 3
TAU = [0.0 if layer == LAYER else None for layer in range(8)]
MIXER = TrolMixer(initial_gate=0.5, tau=TAU, scope="all")
CONSTANT = TrolMixer(initial_gate=0.1, scope="all")
CASES: dict[str, tuple[Callable[[Subject], list[float]], Any]] = {
    "full": (lambda s: s.losses("plain"), lambda n, x, f: f(x)),
    "skip": (
        lambda s: s.losses(planned(leaving_out(LAYER, 8))),
        lambda n, x, f: x if n == LAYER else f(x),
    ),
    "skip, first token spared": (
        lambda s: s.losses(planned(leaving_out({LAYER, 5}, 8), keep_first=1)),
        lambda n, x, f: spared(x, f(x)) if n in (LAYER, 5) else f(x),
    ),
    "second visit": (
        lambda s: s.losses(planned(twice(LAYER, 8))),
        lambda n, x, f: f(f(x)) if n == LAYER else f(x),
    ),
    "mean of both": (
        lambda s: s.losses_attached(MIXER),
        lambda n, x, f: (f(x) + f(f(x))) / 2 if n == LAYER else f(x),
    ),
    "constant gates": (
        lambda s: s.losses_attached(CONSTANT),
        lambda n, x, f: 0.9 * f(x) + 0.1 * f(f(x)),
    ),
    "half steps": (
        lambda s: _halved(s, range(2, 4), None),
        lambda n, x, f: half(half(x, f), f) if n in (2, 3) else f(x),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_an_arm_is_what_a_loop_by_hand_gives(name: str, subject: Subject) -> None:
    arm, visit = CASES[name]
    found = arm(subject)
    assert found == pytest.approx(by_hand(subject, visit), abs=2e-5)
    if name != "full":
        assert found != pytest.approx(subject.losses("plain"), abs=1e-3)
    assert not is_attached(subject.model)


def test_a_second_visit_with_the_first_token_spared(subject: Subject) -> None:
    """Keys and values of the first token are those of its only visit, in the second one too."""
    found = subject.losses(planned(twice(LAYER, 8), keep_first=1))
    everywhere = subject.losses(planned(twice(LAYER, 8)))
    assert found != pytest.approx(everywhere, abs=1e-4)
    assert found != pytest.approx(subject.losses("plain"), abs=1e-4)


def test_half_steps_have_no_parameters_and_leave_other_layers_alone() -> None:
    policy = HalfSteps((1, 2))
    assert policy.bounds(0) == (1, 1)
    assert policy.bounds(1) == (0, 1)
