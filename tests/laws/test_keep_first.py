"""The first tokens of each sequence visit every layer once, wherever that sequence stands."""

from typing import Any

import pytest
import torch

from hosts import CHECKS, HOSTS, Host
from hosts.checks import greedy
from trol.depth import AbstractPolicy, attach, trace
from trol.depth.roles import Context, positions_in_sequences
from trol.errors import UsageError
from trol.host.names import CACHE
from trol.policies.controller import Controller
from trol.policies.exits import EarlyExit
from trol.policies.mixer import TrolMixer
from trol.policies.planned import Planned
from trol.policies.random_tokens import RandomTokens
from trol.policies.router import Router

from .subjects import attach_settled, gap, some_hosts

pytestmark = pytest.mark.usefixtures("no_grad")

KEPT: dict[str, AbstractPolicy] = {
    "skip": Planned("0 3", keep_first=2),
    "repeat": Planned("0:2 1:3 3", keep_first=3),
    "question": Planned("0:2 3", scope="question", keep_first=2),
    "hole": Planned("1-3", skipped_kv="hole", keep_first=2),
    "exit": EarlyExit("margin", 0.0, scope="all", keep_first=2),
    "mixer": TrolMixer(scope="all", keep_first=2),
    "controller": Controller(scope="all", training_scope="all", initial=None, keep_first=2),
    "random": RandomTokens(0.2, visit=1, keep_first=2),
    "router": Router(["0 3", "0 2-3", "all"], hidden=8, dial=0.0, keep_first=2),
}
"""Every policy that has a scope, on stacks of four layers."""


def packed(host: Host, lengths: tuple[int, ...] = (4, 6, 3)) -> tuple[dict[str, Any], list[Any]]:
    """Sequences one after the other in one row, and each alone."""
    alone = [host.inputs(length=n, seed=seed)["input_ids"][:, :n] for seed, n in enumerate(lengths)]
    places = torch.cat([torch.arange(n) for n in lengths])[None]
    return {"input_ids": torch.cat(alone, 1), "position_ids": places, "use_cache": False}, alone


def test_positions_begin_anew_where_one_does_not_follow() -> None:
    places = torch.tensor([[0, 1, 2, 0, 1, 5], [7, 8, 9, 10, 11, 12]])
    counted = [[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 4, 5]]
    assert positions_in_sequences(places).tolist() == counted
    context = Context(position_ids=places)
    assert context.past_first(2, torch.zeros(2, 6, 1)).long().tolist() == [
        [0, 0, 1, 0, 0, 0],
        [0, 0, 1, 1, 1, 1],
    ]


@pytest.mark.parametrize("name", KEPT)
@pytest.mark.parametrize("host", some_hosts("llama", "gemma3", "qwen3"))
def test_packed_sequences_are_the_sequences_alone(host: Host, name: str) -> None:
    model = attach_settled(host.build(), KEPT[name])
    together, alone = packed(host)
    got = model(**together).logits
    apart = [model(input_ids=ids, use_cache=False).logits for ids in alone]
    assert gap(got, torch.cat(apart, 1)) <= host.default_exact


@pytest.mark.parametrize("name", KEPT)
def test_visits_are_those_of_the_scope_behind_the_first(name: str) -> None:
    """Left-padded rows, cached and in one pass: the first real tokens visit every layer once."""
    host, policy = HOSTS["llama"], KEPT[name]
    model, rows = attach_settled(host.build(), policy), host.left_padded()
    with trace(model) as seen:
        greedy(model, rows.batch)
    real = rows.batch["attention_mask"].bool()
    places = torch.where(real, real.long().cumsum(-1) - 1, -1)
    first = (places >= 0) & (places < policy.keep_first)
    assert (seen.visits[:, :, : real.shape[1]][:, first] == 1).all()
    free = attach_settled(host.build(), type(policy)(**{**policy.settings(), "keep_first": 0}))
    with trace(free) as unkept:
        greedy(free, rows.batch)
    assert (
        name in ("mixer", "router")
        or (
            seen.visits[:, :, : real.shape[1]][:, first]
            != unkept.visits[:, :, : real.shape[1]][:, first]
        ).any()
    )


@pytest.mark.parametrize("host", some_hosts(*HOSTS))
@pytest.mark.parametrize("name", ["skip", "repeat"])
def test_every_family(host: Host, name: str) -> None:
    """Chunks, caches, padding and batches give what one pass gives."""
    model = attach_settled(host.build(), KEPT[name])
    for check in ("generate", "left_padding", "masked_chunks", "chunked_prefill"):
        if check not in host.cannot:
            assert CHECKS[check](host, model) <= host.default_exact


def test_a_decoding_loop_of_ones_own() -> None:
    """Token by token on a cache, without `generate` and without a mask."""
    host = HOSTS["llama"]
    model, ids = attach(host.build(), KEPT["skip"]), host.inputs()["input_ids"]
    whole, cache, steps = model(input_ids=ids, use_cache=False).logits, None, []
    for token in ids.split(1, dim=1):
        out = model(input_ids=token, use_cache=True, **{CACHE: cache})
        cache = out[CACHE]
        steps.append(out.logits)
    assert gap(torch.cat(steps, 1), whole) <= host.default_exact


def test_new_tokens_look_at_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind the first tokens, all are known to be in scope: no mask is made in any step."""
    model = attach(HOSTS["llama"].build(), Planned("0:2 3", keep_first=2))
    scopes, again = [], Planned.again

    def watched(policy: Planned, visit: Any) -> Any:
        scopes.append(visit.context.in_scope)
        return again(policy, visit)

    monkeypatch.setattr(Planned, "again", watched)
    greedy(model, HOSTS["llama"].left_padded().batch)
    assert isinstance(scopes[0], torch.Tensor)
    assert scopes[-1] is True


@pytest.mark.parametrize("name", KEPT)
@pytest.mark.parametrize("value", [-1, 1.5, "1", None, True, False])
def test_bad_numbers_are_refused(name: str, value: Any) -> None:
    policy = KEPT[name]
    with pytest.raises(UsageError, match=rf"keep_first is {value!r}; give a whole number, 0 or"):
        type(policy)(**{**policy.settings(), "keep_first": value})
