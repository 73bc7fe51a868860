"""torch.compile takes an attached model whole: no tensor decides where the program goes."""

import pytest
import torch
from transformers import StaticCache

from hosts import HOSTS, Host
from trol import depth
from trol.depth import AbstractPolicy, trace
from trol.errors import HostError
from trol.host.names import CACHE
from trol.policies.mixer import TrolMixer
from trol.policies.planned import Planned

from .subjects import attach_settled, gap, made, some_hosts

pytestmark = pytest.mark.usefixtures("no_grad")


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("host", some_hosts("llama", "gpt2", "internvl"))
def test_one_graph(host: Host) -> None:
    """Question and answer in one call; then as a chunk on a cache that holds planes."""
    model, inputs = host.build(layers=1), host.inputs(batch=2)
    key, given = "input_ids", inputs["input_ids"]
    if host.kind == "vlm":  # its decoder alone: towers compile or not for reasons of their own
        key, given = "inputs_embeds", model.get_input_embeddings()(given)
        model = model.get_decoder()
    attach_settled(model, made("trol"))
    roles = torch.zeros_like(inputs["input_ids"])
    roles[:, 4:6] = 1
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    question = model(**{key: given}, use_cache=False)[0]
    talk = model(**{key: given}, assistant_masks=roles, use_cache=False)[0]
    assert gap(question, talk) > 1e-2
    told = compiled(**{key: given}, assistant_masks=roles, use_cache=False)[0]
    assert gap(told, talk) <= host.default_exact
    if host.name != "llama":
        return
    # A fresh cache gets its planes outside the graph.
    cache = StaticCache(model.config, max_cache_len=20)
    model(**{key: given[:, :3]}, **{CACHE: cache})
    rest = {key: given[:, 3:], "assistant_masks": roles[:, 3:]}
    assert gap(compiled(**rest, **{CACHE: cache})[0], talk[:, 3:]) <= host.default_exact


@pytest.mark.parametrize("policy", [TrolMixer(tau=0.5), Planned("1")], ids=["tau", "skip"])
def test_thresholds_and_skips_in_one_graph(policy: AbstractPolicy) -> None:
    """A threshold selects with torch.where; a skipped layer is not in the graph at all."""
    host = HOSTS["llama"]
    model, inputs = attach_settled(host.build(layers=2), policy), host.inputs()
    expected = model(**inputs, use_cache=False).logits
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert gap(compiled(**inputs, use_cache=False).logits, expected) <= host.default_exact


def test_another_depth_inside_a_compiled_model_is_refused() -> None:
    """It would be compiled in for ever, or silently not be seen."""
    host = HOSTS["llama"]
    model, inputs = attach_settled(host.build(layers=1), made("trol")), host.inputs()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    expected = compiled(**inputs, use_cache=False).logits
    for block in (depth(model, "exit@0"), trace(model)):
        with pytest.raises(Exception, match="cannot reach into a compiled model") as caught, block:
            compiled(**inputs, use_cache=False)
        assert isinstance(caught.value, HostError) or "HostError" in str(caught.value)
    assert gap(compiled(**inputs, use_cache=False).logits, expected) == 0
