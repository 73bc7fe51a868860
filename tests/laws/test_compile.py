"""torch.compile takes an attached model whole: no tensor decides where the program goes."""

import pytest
import torch
from hosts import HOSTS, Host

from trol import depth
from trol.depth import trace
from trol.errors import HostError

from .subjects import attach_settled, gap, made, some_hosts

pytestmark = pytest.mark.usefixtures("no_grad")


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("host", some_hosts("llama", "gpt2", "internvl"))
@pytest.mark.parametrize("name", ["trol", "trol_tau", "skip_first"])
def test_prefill_compiles_in_one_graph(host: Host, name: str) -> None:
    model = attach_settled(host.build(), made(name))
    inputs = {k: v for k, v in host.inputs(batch=2).items() if k != "pixel_values"}
    if host.kind == "vlm":  # its decoder, as towers compile or not for reasons of their own
        embeds = model.get_input_embeddings()(inputs.pop("input_ids"))
        inputs = {"inputs_embeds": embeds, "attention_mask": inputs["attention_mask"]}
        model = model.get_decoder()
    expected = model(**inputs, use_cache=False)[0]
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert gap(compiled(**inputs, use_cache=False)[0], expected) <= host.default_exact
    cached = compiled(**inputs, use_cache=True)
    assert gap(cached[0], expected) <= host.default_exact
    assert gap(model(**inputs, use_cache=False)[0], expected) == 0  # nothing stays behind


def test_roles_reach_a_compiled_model() -> None:
    host = HOSTS["llama"]
    model, inputs = attach_settled(host.build(), made("trol")), host.inputs()
    roles = torch.zeros_like(inputs["input_ids"])
    roles[:, 4:] = 1
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    told = compiled(**inputs, assistant_masks=roles, use_cache=False).logits
    assert gap(told, model(**inputs, assistant_masks=roles, use_cache=False).logits) <= 5e-5
    assert gap(told, compiled(**inputs, use_cache=False).logits) > 1e-2


def test_another_depth_inside_a_compiled_model_is_refused() -> None:
    """It would be compiled in for ever, or silently not be seen."""
    host = HOSTS["llama"]
    model, inputs = attach_settled(host.build(), made("trol")), host.inputs()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    expected = compiled(**inputs, use_cache=False).logits
    for block in (depth(model, "exit@1"), trace(model)):
        with pytest.raises(Exception, match="cannot reach into a compiled model") as caught, block:
            compiled(**inputs, use_cache=False)
        assert isinstance(caught.value, HostError) or "HostError" in str(caught.value)
    assert gap(compiled(**inputs, use_cache=False).logits, expected) == 0
