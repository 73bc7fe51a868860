"""What traversal keeps in memory: planes while somebody can still read them, and no more."""

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from hosts import HOSTS, Host
from hosts.releases import FP8
from trol.depth import AbstractPolicy, trace
from trol.depth.planes import cache_bytes
from trol.depth.policy import Plain
from trol.host.names import CACHE
from trol.host.trainer import checkpoint_activations
from trol.policies.mixer import TrolMixer
from trol.policies.planned import Planned

from .subjects import attach_settled, some_hosts

CACHES = {
    "dynamic": {},
    "static": {"cache_implementation": "static", "disable_compile": True},
    "chunked": {"prefill_chunk_size": 4},  # planes live from chunk to chunk
    "quantised": {"cache_implementation": "quantized", "cache_config": {"backend": "fp8"}},
}

ON = {
    "dynamic": ("llama", "mistral", "gemma3", "qwen3_next", "falcon_h1", "qwen3_vl"),
    "static": ("llama", "mistral", "gemma3", "qwen3_next", "falcon_h1", "qwen3_vl"),
    "chunked": ("llama", "mistral", "qwen3_next"),
    "quantised": ("llama", "qwen3_vl"),  # transformers quantises whole rows alone
}
"""Whole rows, windows, both in turn; recurrent states instead of some of them, or beside all."""

CASES = [
    pytest.param(HOSTS[host], cache, id=f"{host}-{cache}")
    for cache in ON
    for host in ON[cache]
    if cache != "quantised" or FP8
]


def kept_bytes(model: PreTrainedModel, host: Host, **settings) -> int:
    """What the cache holds after a `generate` that keeps it to itself."""
    with torch.no_grad(), trace(model) as seen:
        model.generate(**host.inputs(batch=2), max_new_tokens=3, do_sample=False, **settings)
    return seen.cost.kv_bytes


@pytest.mark.parametrize(("host", "cache"), CASES)
def test_planes_are_kept_while_somebody_can_read_them(host: Host, cache: str) -> None:
    """Traversal of the question: the plain model's bytes. Of all: those of every visit."""
    settings = CACHES[cache]
    with torch.no_grad():
        told = host.build().generate(
            **host.inputs(batch=2),
            **{"max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True},
            **settings,
        )
    plain = cache_bytes(told[CACHE])
    assert plain > 0

    def kept(policy: AbstractPolicy) -> int:
        return kept_bytes(attach_settled(host.build(), policy), host, **settings)

    assert kept(Plain()) == plain
    assert kept(TrolMixer()) == plain
    assert kept(TrolMixer(scope="all")) == 2 * plain
    assert kept(TrolMixer(3, scope="all")) == 3 * plain
    if host.name == "llama":  # all layers hold as much: 2, 1, 0 and 3 visits of four
        assert kept(Planned("0:2 1 3:3")) == plain * 6 // 4


def saved_bytes(model: PreTrainedModel, host: Host, *, checkpointing: bool) -> int:
    """What a training pass holds for its backward pass, parameters not counted."""
    inputs = host.inputs(batch=4, length=32)
    if checkpointing:
        checkpoint_activations(model)
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    held: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        held[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = model.train()(**inputs, labels=inputs["input_ids"], use_cache=False)
    assert out.loss.requires_grad  # and the graph is alive while its tensors are counted
    storages = {where: tensor.untyped_storage() for where, tensor in held.items()}
    return sum(storages[where].nbytes() for where in storages if where not in parameters)


@pytest.mark.parametrize("host", some_hosts("llama", "gpt2", "internvl"))
@pytest.mark.parametrize("policy", [TrolMixer(), TrolMixer(training_scope="question")])
def test_checkpointed_traversal_holds_one_more_layer(host: Host, policy: AbstractPolicy) -> None:
    """Between the passes: what the plain model holds. While a layer runs again: two visits of it.

    The mixture, its gate, and merged keys and values come on top; nothing of other layers does.
    """

    def held(policy: AbstractPolicy | None, layers: int, *, checkpointing: bool) -> int:
        model = host.build(layers=layers)
        if policy is not None:
            attach_settled(model, policy)
        return saved_bytes(model, host, checkpointing=checkpointing)

    plain = held(None, 3, checkpointing=True)
    assert held(policy, 3, checkpointing=True) == plain

    def layer(policy: AbstractPolicy | None) -> int:
        one, two = (held(policy, layers, checkpointing=False) for layers in (2, 3))
        return two - one

    tokens = host.inputs(batch=4, length=32)["input_ids"].numel()
    mixture = 4 * tokens * (6 * host.config().get_text_config().hidden_size + 8)
    assert plain < layer(None) * 3  # there is something that checkpointing saves
    assert layer(None) * 1.5 < layer(policy) <= 2 * layer(None) + mixture
