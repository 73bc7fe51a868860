"""The zoo: every bare host does what the laws will ask of an attached one, but for `cannot`."""

from functools import cache

import pytest
import torch
from transformers import PreTrainedModel

from trol.host.names import CACHE

from . import CHECKS, HOSTS, Host
from .releases import EVERY_ATTENTION

BOTH = ("generate", "right_padding")
"""Checks made under every attention; the others only under the last that a host supports."""

CASES = [
    pytest.param(host, attn, check, id=f"{host.name}-{attn}-{check}")
    for host in HOSTS.values()
    for attn in host.attns
    for check in CHECKS
    if check in BOTH or attn == host.attns[-1]
]
every_host = pytest.mark.parametrize("host", [pytest.param(h, id=h.name) for h in HOSTS.values()])


@cache
def built(name: str, attn: str) -> PreTrainedModel:
    """One model for all tests that leave it as it was."""
    return HOSTS[name].build(attn)


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


@pytest.mark.parametrize(("host", "attn", "check"), CASES)
def test_bare_host_can_or_cannot(host: Host, attn: str, check: str) -> None:
    """Each ability holds, and each one named in `cannot` really fails."""
    fails = check in host.cannot
    model = host.build(attn) if fails else built(host.name, attn)
    try:
        difference = CHECKS[check](host, model)
    except Exception:
        if not fails:
            raise
        return
    assert (difference > host.default_exact) == fails, difference


@every_host
def test_attentions_agree_and_others_are_refused(host: Host) -> None:
    inputs = host.inputs(batch=2)
    logits = [built(host.name, attn)(**inputs).logits for attn in host.attns]
    assert all((logits[0] - other).abs().max() <= host.default_exact for other in logits)
    if host.eager_only and host.name not in EVERY_ATTENTION:
        with pytest.raises(ValueError, match="does not support an attention implementation"):
            host.build("sdpa")


@every_host
def test_every_layer_and_the_image_matter(host: Host) -> None:
    model, inputs = built(host.name, host.attns[-1]), host.inputs(batch=2)
    logits = model(**inputs).logits
    (layers,) = (
        m
        for name, m in model.get_decoder().named_children()
        if isinstance(m, torch.nn.ModuleList) and name in ("layers", "h")
    )
    for layer in layers:
        hook = layer.register_forward_hook(_pass_by, with_kwargs=True)
        assert (model(**inputs).logits - logits).abs().max() > 0.5
        hook.remove()
    if host.kind == "vlm":
        swapped = inputs | {"pixel_values": inputs["pixel_values"].flip(0)}
        assert (model(**swapped).logits - logits)[:, -1].abs().max() > 0.5


@every_host
def test_build_is_seeded_and_deep(host: Host) -> None:
    first, again = built(host.name, host.attns[-1]), host.build()
    for (name, a), b in zip(first.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    deeper = host.build(layers=6)
    assert deeper(**host.inputs())[CACHE].layers[5] is not None


def _pass_by(_layer, args, kwargs, output):
    """Replace a layer's result by what entered it."""
    entered = args[0] if args else kwargs["hidden_states"]
    return (entered, *output[1:]) if isinstance(output, tuple) else entered
