"""Caches that quantise, offload or hold still: planes are made of whatever the host's cache is."""

import pytest
import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel, QuantizedCache
from transformers.cache_utils import DynamicLayer, QuantizedLayer

from hosts import HOSTS
from hosts.host import Inputs
from hosts.releases import FP8
from trol.depth.attachment import executor
from trol.depth.call import Executor
from trol.depth.planes import PlanedCache
from trol.host.names import CACHE

from .subjects import answer_masks, assert_same, attach_settled, cuts, gap, made, recomputed, spoken

pytestmark = pytest.mark.usefixtures("no_grad")

DEEP = (
    "trol",
    "trol_all",
    "trol_tau",
    "trol_answer",
    "repeat",
    "skip_answer",
    "skip_first",
    "exit_sure",
    "hole_answer",
)


class Lossless(QuantizedLayer):
    """Quantises as transformers' own layers do, flush after flush, and loses nothing by it."""

    def __init__(self) -> None:
        super().__init__(residual_length=3)

    def _quantize(self, tensor: Tensor, axis: int) -> Tensor:
        return tensor.clone()

    def _dequantize(self, q_tensor: Tensor) -> Tensor:
        return q_tensor


class Elsewhere(DynamicLayer):
    """Refuses to be written while it is offloaded, as a layer on another device would."""

    away = False

    def offload(self) -> None:
        self.away = self.is_initialized

    def prefetch(self) -> None:
        self.away = False

    def update(self, *args, **kwargs):
        assert not self.away, "written while it lies elsewhere"
        return super().update(*args, **kwargs)


class _Stream:
    """What offloading asks of a device's stream, without a device."""

    def wait_stream(self, other: object) -> None:
        del other

    __enter__ = __exit__ = lambda self, *_: None


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers offloads on CUDA streams; nothing else of its code path needs a GPU."""
    monkeypatch.setattr(torch, "Stream", _Stream)
    monkeypatch.setattr(torch.cuda, "default_stream", lambda _: _Stream())


def in_pieces(
    model: PreTrainedModel, inputs: Inputs, roles: Tensor, cache: Cache, *, told: bool = True
) -> Tensor:
    """Logits of two tokens at a time; `told`: of a model that is told the roles."""
    ids, parts = inputs["input_ids"], []
    for cut in cuts(ids.shape[1], 2):
        masks = {"assistant_masks": roles[:, cut]} if told else {}
        parts.append(model(ids[:, cut], **masks, **{CACHE: cache}).logits)
    return torch.cat(parts, 1)


def _fp8(model: PreTrainedModel) -> Cache:
    return QuantizedCache("fp8", model.config)


@pytest.mark.parametrize("name", DEEP)
@pytest.mark.parametrize("who", ["dense", "token-wise"])
def test_a_cache_that_quantises_without_loss_is_uncached(who: Executor, name: str) -> None:
    """Planes fork, flush and merge with what lies quantised below them."""
    host = HOSTS["llama"]
    model, inputs = attach_settled(host.build(), made(name)), host.inputs(batch=2)
    expected = recomputed(host, model, inputs, new=5)
    cache = Cache(layers=[Lossless() for _ in range(4)])
    with executor(model, who):
        told = spoken(model, inputs, **{CACHE: cache}, max_new_tokens=5)
    assert_same(told, expected, host.default_exact)
    roles = answer_masks({"input_ids": inputs["input_ids"][:, :5]}, inputs)
    whole = model(**inputs, assistant_masks=roles, use_cache=False).logits
    pieces = in_pieces(model, inputs, roles, Cache(layers=[Lossless() for _ in range(4)]))
    assert gap(pieces, whole) <= host.default_exact


@pytest.mark.skipif(not FP8, reason="this transformers quantises by another library alone")
@pytest.mark.parametrize("name", ["trol", "trol_all", "skip_answer"])
def test_a_quantised_cache_errs_as_the_bare_host_does(name: str) -> None:
    """fp8: each visit adds its own error, so two visits of each layer may err twice as much."""
    host = HOSTS["llama"]
    model, inputs = host.build(), host.inputs(batch=2, length=12)
    roles = answer_masks({"input_ids": inputs["input_ids"][:, :8]}, inputs)
    exact = model(**inputs, use_cache=False).logits
    bare = gap(in_pieces(model, inputs, roles, _fp8(model), told=False), exact)
    attach_settled(model, made(name))
    whole = model(**inputs, assistant_masks=roles, use_cache=False).logits
    assert bare > 1e-3
    assert gap(in_pieces(model, inputs, roles, _fp8(model)), whole) <= 2 * bare


@pytest.mark.usefixtures("streams")
@pytest.mark.parametrize("name", DEEP)
@pytest.mark.parametrize("who", ["dense", "token-wise"])
def test_an_offloaded_cache_is_uncached(who: Executor, name: str) -> None:
    """Planes are fetched before they are written, and put away after it."""
    host = HOSTS["llama"]
    model, inputs = attach_settled(host.build(), made(name)), host.inputs(batch=2)
    expected = recomputed(host, model, inputs)
    cache = Cache(layers=[Elsewhere() for _ in range(4)], offloading=True)
    with executor(model, who):
        assert_same(spoken(model, inputs, **{CACHE: cache}), expected, host.default_exact)
    planes = cache.planes.values() if isinstance(cache, PlanedCache) else ()
    slots = [slot for slot in (*cache.layers, *planes) if isinstance(slot, Elsewhere)]
    assert all(slot.away for slot in slots if slot.is_initialized and slot is not cache.layers[0])
