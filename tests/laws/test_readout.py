"""Reading a state where it stands: behind the last layer it is what the host says."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hosts import HOSTS, Host
from trol.depth.readout import Readout
from trol.errors import HostError

from .subjects import gap, layers_of, some_hosts

pytestmark = pytest.mark.usefixtures("no_grad")


@pytest.mark.parametrize("host", some_hosts(*HOSTS))
def test_the_last_output_reads_as_the_host_s_logits(host: Host) -> None:
    """Norm, head, and what a family does to logits; a host that it forgot would fail here."""
    model, inputs = host.build(), host.inputs(batch=2)
    left: list[Tensor] = []

    def keep(_: nn.Module, __: Any, out: Any) -> None:
        left.append(out[0] if isinstance(out, tuple) else out)

    handle = layers_of(model)[-1].register_forward_hook(keep)
    expected = model(**inputs).logits
    handle.remove()
    read = Readout(model)
    assert gap(read(left[0]), expected) <= 1e-5
    assert gap(read(left[0][:, -1]), expected[:, -1]) <= 1e-5  # any shape [..., D]
    assert read.flops == 2 * 32 * expected.shape[-1]


@pytest.mark.parametrize(
    ("settings", "name"),
    [({"logit_scale": 0.3}, "cohere"), ({"logits_scaling": 4.0}, "granite")],
)
def test_families_that_scale_their_logits(settings: dict, name: str) -> None:
    """Cohere multiplies, Granite divides; Gemma 2's cap and Falcon-H1's factor are in the zoo."""
    llama = HOSTS["llama"]
    host = Host(name=name, model_type=name, settings=dict(llama.settings) | settings)
    test_the_last_output_reads_as_the_host_s_logits(host)


def test_no_head_and_no_norm() -> None:
    model = HOSTS["llama"].build()
    state = torch.zeros(1, 2, 32)
    with pytest.raises(HostError, match="LlamaModel has no head"):
        Readout(model.model)(state)
    del model.model.norm
    with pytest.raises(HostError, match="no final norm named norm, "):
        Readout(model)(state)
