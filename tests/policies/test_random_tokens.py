"""RandomTokens: a share of the tokens, the same ones for the same positions."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from trol.depth import AbstractPolicy, Bounds, Visit
from trol.depth.policy import from_settings, to_settings
from trol.depth.roles import Context
from trol.errors import UsageError
from trol.policies.random_tokens import RandomTokens


def goes(
    policy: AbstractPolicy,
    tokens: int,
    *,
    layer: int = 0,
    start: int = 0,
    rows: int = 1,
    padding: Tensor | None = None,
) -> Tensor:
    """Who makes the visit that is drawn for. Shape: [B, T]."""
    context = Context(start=start, padding=padding, layers=4)
    state = torch.zeros(rows, tokens, 2)
    number = policy.bounds(layer).least
    answer = policy.again(Visit(layer, number, state, None, context))
    assert isinstance(answer, Tensor)
    assert answer.shape == (rows, tokens)
    return answer


@given(st.floats(0, 1), st.integers(0, 2**31), st.integers(0, 200), st.sampled_from([1, 2]))
def test_about_the_share_goes(share: float, seed: int, layer: int, visit: int) -> None:
    policy = RandomTokens(share, visit=visit, seed=seed)
    drawn = goes(policy, 4000, layer=layer)
    assert set(drawn.unique().tolist()) <= {0.0, 1.0}
    assert abs(drawn.mean().item() - share) < 0.05  # six standard deviations


@given(st.integers(1, 30), st.integers(0, 30), st.integers(0, 9))
def test_a_position_is_drawn_for_alike_in_every_call(cut: int, more: int, seed: int) -> None:
    """In one call or in pieces, and with padding in front."""
    policy = RandomTokens(0.5, seed=seed)
    whole = goes(policy, cut + more + 1)
    assert torch.equal(goes(policy, more + 1, start=cut), whole[:, cut:])
    padding = torch.cat([torch.zeros(1, 3), torch.ones(1, cut + more + 1)], 1)
    assert torch.equal(goes(policy, cut + more + 4, padding=padding)[:, 3:], whole)
    assert torch.equal(goes(policy, more + 1, start=3 + cut, padding=padding), whole[:, cut:])
    assert torch.equal(goes(policy, cut, rows=2), whole[:, :cut].expand(2, -1))


def test_layers_and_seeds_differ() -> None:
    """No two of them draw the same tokens, and each pair agrees by chance alone."""
    drawn = [
        goes(RandomTokens(0.5, seed=seed), 4000, layer=layer)
        for seed in range(4)
        for layer in range(8)
    ]
    for i, one in enumerate(drawn):
        for other in drawn[:i]:
            assert abs((one == other).float().mean().item() - 0.5) < 0.06


def test_neighbours_are_independent() -> None:
    """Nor does a position tell of the next ones."""
    drawn = goes(RandomTokens(0.5), 8000)[0] - 0.5
    for apart in range(1, 8):
        assert abs((drawn[apart:] * drawn[:-apart]).mean().item()) < 0.02


def test_who_makes_no_visit_that_is_drawn_for() -> None:
    assert RandomTokens(0.3, visit=1).bounds(0) == Bounds(0, 1)
    assert RandomTokens(0.3).bounds(0) == Bounds(1, 2)
    first = Visit(0, 0, torch.zeros(1, 4, 2), None, Context(layers=4))
    assert RandomTokens(0.0).again(first) == 1.0  # everybody makes the first
    assert goes(RandomTokens(0.0), 50).sum() == 0
    assert goes(RandomTokens(1.0), 50).sum() == 50


@pytest.mark.parametrize("visit", [1, 2])
def test_settings_make_the_policy_again(visit: int) -> None:
    policy = RandomTokens(0.25, visit=visit, seed=3, scope="question", skipped_kv="hole")
    assert from_settings(to_settings(policy)) == policy
    assert policy != RandomTokens(0.25, visit=visit, seed=4, scope="question", skipped_kv="hole")


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_a_share_that_is_none_is_refused(share: float) -> None:
    with pytest.raises(UsageError, match=r"share is .* must be a number in \[0, 1\]"):
        RandomTokens(share)


@pytest.mark.parametrize("visit", [0, 3])
def test_a_visit_that_is_not_drawn_for_is_refused(visit: int) -> None:
    with pytest.raises(UsageError, match="give 1 to skip layers, or 2 to repeat"):
        RandomTokens(visit=visit)


def test_an_unknown_scope_is_refused() -> None:
    with pytest.raises(UsageError, match="scope"):
        RandomTokens(scope="prompt")  # type: ignore[arg-type]
