"""Packed = dense: leaving out what nobody reads changes nothing of what is read."""

import pytest
import torch

from hosts import HOSTS, Host
from hosts.checks import greedy
from trol.depth import visits

from .subjects import attach_settled, gap, hosts_and_attns, layers_of, made

pytestmark = pytest.mark.usefixtures("no_grad")

DENSE = ("lfm2", "falcon_h1")
"""Hosts whose last layer keeps a recurrent state."""


@pytest.fixture
def packed(monkeypatch) -> list[bool]:
    """Whether each last visit that could be packed was."""
    made_packed, own = [], visits.last_visit

    def noted(*args):
        out = own(*args)
        made_packed.append(out is not None)
        return out

    monkeypatch.setattr(visits, "last_visit", noted)
    return made_packed


@pytest.mark.parametrize(("host", "attn"), hosts_and_attns())
@pytest.mark.parametrize("name", ["trol", "trol_all", "trol_three", "repeat"])
def test_the_last_visit_of_the_last_layer_needs_only_the_last_token(
    host: Host, attn: str, name: str, packed: list[bool]
) -> None:
    """Hidden states are asked for by one of the two, so that it computes all of them."""
    model = attach_settled(host.build(attn), made(name))
    batches = [host.inputs()]
    if "left_padding" not in host.cannot:
        batches.append(host.left_padded().batch)
    for inputs in batches:
        packed.clear()
        tokens, logits = greedy(model, inputs)
        assert any(packed) == (host.name not in DENSE), packed
        packed.clear()
        dense_tokens, dense_logits = greedy(model, inputs, output_hidden_states=True)
        assert not packed
        assert torch.equal(tokens, dense_tokens)
        assert gap(logits, dense_logits) <= host.default_exact


def test_a_layer_with_an_unknown_side_input_computes_all_tokens(packed: list[bool]) -> None:
    host = HOSTS["llama"]
    model = attach_settled(host.build(), made("trol"))
    inputs = host.inputs()
    last = layers_of(model)[-1]
    own = type(last).forward
    hook = last.register_forward_pre_hook(
        lambda _m, args, kwargs: (args, {**kwargs, "strange": torch.zeros(1)}), with_kwargs=True
    )
    strange = greedy(model, inputs)
    hook.remove()
    assert type(last).forward is own
    assert packed
    assert not any(packed)
    assert torch.equal(strange[0], greedy(model, inputs)[0])
