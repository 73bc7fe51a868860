"""A row's output depends on that row alone: not on its batch mates, its padding, their plans."""

import pytest
import torch
from torch import Tensor

from hosts import CHECKS, HOSTS, Host
from hosts.checks import greedy
from trol.depth import attach, detach
from trol.policies.planned import Planned

from .subjects import attach_settled, gap, key_cases, made, policy_cases, some_hosts

pytestmark = pytest.mark.usefixtures("no_grad")

PLANS = ("0:2 1 3", "1-3", "exit@2")
"""One for each row; together every layer is skipped by one and visited by another."""


@pytest.mark.parametrize(("host", "attn", "name"), key_cases())
def test_padding_changes_nothing(host: Host, attn: str, name: str) -> None:
    """Left-padded (decoding too) and right-padded rows are the rows alone."""
    model = attach_settled(host.build(attn), made(name))
    assert CHECKS["left_padding"](host, model) <= host.default_exact
    assert CHECKS["right_padding"](host, model) <= host.default_exact


@pytest.mark.parametrize(("host", "name"), policy_cases("llama", "gemma3", "gpt2", "llava"))
def test_every_policy_padded(host: Host, name: str) -> None:
    model = attach_settled(host.build(), made(name))
    for check in ("left_padding", "right_padding", "causal"):
        assert CHECKS[check](host, model) <= host.default_exact


@pytest.mark.parametrize(("host", "attn", "name"), key_cases(every_attn=False))
def test_a_later_token_never_changes_an_earlier_output(host: Host, attn: str, name: str) -> None:
    assert (
        CHECKS["causal"](host, attach_settled(host.build(attn), made(name))) <= host.default_exact
    )


@pytest.mark.parametrize("scope", ["all", "question", "answer"])
@pytest.mark.parametrize("host", some_hosts(*HOSTS))
def test_rows_with_different_plans(host: Host, scope: str) -> None:
    """Left-padded, decoding; each row's plan makes its row differ from its neighbours'."""
    model, rows = host.build(), host.left_padded()
    alone = []
    for plan, row in zip(PLANS, rows.alone, strict=True):
        attach(model, Planned(plan, scope=scope))
        alone.append(greedy(model, row)[1])
        detach(model)
    attach(model, Planned(PLANS, scope=scope))
    together = greedy(model, rows.batch)[1]
    assert gap(together, torch.cat(alone)) <= host.default_exact
    detach(model)
    attach(model, Planned(PLANS[::-1], scope=scope))
    assert gap(greedy(model, rows.batch)[1][:, 1], together[:, 1]) > 1e-2


@pytest.mark.parametrize("host", some_hosts("llama", "mistral", "gpt_oss", "qwen2_5_vl"))
@pytest.mark.parametrize("scope", ["all", "answer"])
def test_rows_with_different_holes(host: Host, scope: str) -> None:
    model, rows = host.build(), host.left_padded()
    settings = {"scope": scope, "skipped_kv": "hole"}
    alone = []
    for plan, row in zip(PLANS, rows.alone, strict=True):
        attach(model, Planned(plan, **settings))
        alone.append(greedy(model, row)[1])
        detach(model)
    attach(model, Planned(PLANS, **settings))
    assert gap(greedy(model, rows.batch)[1], torch.cat(alone)) <= host.default_exact


@pytest.mark.parametrize("host", some_hosts("llama", "gemma3", "gpt2", "internvl"))
@pytest.mark.parametrize("scope", ["all", "question"])
def test_beams_of_rows_with_different_plans(host: Host, scope: str) -> None:
    """Each row's beams follow that row's plan."""
    model, rows = host.build(), host.left_padded()
    search = {"num_beams": 3, "max_new_tokens": 4, "do_sample": False}
    alone = []
    for plan, row in zip(PLANS, rows.alone, strict=True):
        attach(model, Planned(plan, scope=scope))
        alone.append(model.generate(**row, **search)[0, -4:])
        detach(model)
    attach(model, Planned(PLANS, scope=scope))
    together = model.generate(**rows.batch, **search)[:, -4:]
    assert together.tolist() == torch.stack(alone).tolist()
    assert len({tuple(row) for row in together.tolist()}) == 3


@pytest.mark.parametrize("host", some_hosts("llama", "gemma2", "opt", "smolvlm"))
def test_row_plans_padded_on_the_right(host: Host) -> None:
    model, rows = host.build(), host.right_padded()
    alone: list[Tensor] = []
    for plan, row in zip(PLANS, rows.alone, strict=True):
        attach(model, Planned(plan))
        alone.append(model(**row).logits[0])
        detach(model)
    attach(model, Planned(PLANS))
    together = model(**rows.batch).logits
    for i, one in enumerate(alone):
        assert gap(together[i, : len(one)], one) <= host.default_exact


@pytest.mark.parametrize("host", some_hosts("llama", "falcon", "qwen3_moe"))
@pytest.mark.parametrize("name", ["trol", "trol_three", "repeat", "skip_answer"])
def test_batch_mates_do_not_matter(host: Host, name: str) -> None:
    """Other mates, the same row: bit for bit where sizes agree."""
    model = attach_settled(host.build(), made(name))
    ours, others = host.inputs(batch=3, seed=1), host.inputs(batch=3, seed=2)
    mixed = {k: torch.cat([ours[k][:1], others[k][1:]]) for k in ours}
    a, b = greedy(model, ours)[1][0], greedy(model, mixed)[1][0]
    assert gap(a, b) <= host.default_exact
