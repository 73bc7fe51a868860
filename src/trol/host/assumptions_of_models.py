"""Rows of the table of assumptions: models, their layers and outputs, `generate`, and caches."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, GenerationConfig, LlamaForCausalLM, StaticCache
from transformers import cache_utils as theirs
from transformers.cache_utils import (
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionLayer,
    StaticLayer,
)
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from trol.host import cache as caches
from trol.host import names, trial
from trol.host.generation import CONTINUOUS, SHOWN, SLICES_LOGITS
from trol.host.layers import final_norm, head_of, scaled_logits
from trol.host.names import CACHE

MODELS: list[trial.Assumption] = []
used_by = partial(trial.row, MODELS)


@used_by("host/names.py CACHE: every pass with a cache", at_attach=True)
def one_name() -> str | None:
    """The cache has one name in layers, stacks, models and prepare_inputs_for_generation."""
    model: Any = LlamaForCausalLM
    takers = (LlamaDecoderLayer.forward, model.forward, model.prepare_inputs_for_generation)
    return next(filter(None, (trial.lacks(taker, CACHE) for taker in takers)), None)


@used_by("depth/generation.py, speculation: the cache that outlives a pass")
def name_in_outputs() -> str | None:
    """What a pass returns, and what generate returns, has the cache under the same name."""
    model = trial.tiny_model()
    with torch.no_grad():
        out = model(trial.ids(), use_cache=True)
        answer = model.generate(trial.ids(), max_new_tokens=2, return_dict_in_generate=True)
    keys = [names.cache_key(out), names.cache_key(answer)]
    return trial.differs("the cache's names", keys, [CACHE, CACHE])


@used_by("host/layers.py layer_signature: every visit", at_attach=True)
def layer_takes() -> str | None:
    """A decoder layer takes hidden_states first, and attention_mask and the cache by name."""
    forward = LlamaDecoderLayer.forward
    first = trial.differs(
        "the first parameter of a layer", trial.parameters(forward)[1], "hidden_states"
    )
    return first or trial.lacks(
        forward, "attention_mask", "position_embeddings", "position_ids", CACHE
    )


@used_by("depth/roles.py positions_in_sequences: the first tokens of packed sequences")
def packed_rows() -> str | None:
    """Without a mask, a position that does not follow the one before begins another sequence."""
    model, ids = trial.tiny_model(), trial.ids(5)
    places = torch.tensor([[0, 1, 0, 1, 2]])
    with torch.no_grad():
        packed = model(ids, position_ids=places, use_cache=False).logits[:, 2:]
        alone = model(ids[:, 2:], use_cache=False).logits
    if trial.difference(packed, alone) > trial.tolerance(alone):
        return "a sequence that is packed behind another does not give what it gives alone"
    return None


class _ArgumentOfCall(LlamaDecoderLayer):
    """A layer whose call hands an argument of its own to its forward, as `LayerMixin` does."""

    arrived: tuple[bool, ...] = ()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return super().__call__(*args, **kwargs, own=True)

    def forward(self, *args: Any, own: bool = False, **kwargs: Any) -> Any:
        type(self).arrived += (own,)
        return super().forward(*args, **kwargs)


@used_by("depth/stack.py LayerMixin.__call__: a layer that is called past it runs plain")
def enters_by_call() -> str | None:
    """Layers are entered by their call, and keyword arguments reach forward, checkpointed too."""
    from trol.host.trainer import checkpoint_activations  # noqa: PLC0415 - loads Trainer

    _ArgumentOfCall.arrived = ()
    model = trial.tiny_model()
    for layer in model.model.layers:
        layer.__class__ = _ArgumentOfCall
    model(trial.ids())
    checkpoint_activations(model.train())
    states = torch.ones(1, 3, 8, requires_grad=True)
    model(inputs_embeds=states, use_cache=False).logits.sum().backward()
    return trial.differs("what reached forward", _ArgumentOfCall.arrived, (True,) * 6)


@used_by("depth/generation.py HostMixin.forward: roles by labels, penalties", at_attach=True)
def model_takes() -> str | None:
    """A causal model takes labels, attention_mask and logits_to_keep by these names."""
    wanted = ("input_ids", "attention_mask", "inputs_embeds", "labels", SLICES_LOGITS)
    return trial.lacks(LlamaForCausalLM.forward, *wanted)


@used_by("depth/generation.py _penalised: penalties join the loss")
def loss_first() -> str | None:
    """A loss is the first of what a model returns, and is divided by num_items_in_batch."""
    model, labels = trial.tiny_model(), trial.ids()
    with torch.no_grad():
        loss = model(trial.ids(), labels=labels).loss
        first = model(trial.ids(), labels=labels, return_dict=False)[0]
        halved = model(trial.ids(), labels=labels, num_items_in_batch=torch.tensor(6)).loss
    if torch.equal(loss, first) and torch.isclose(halved * 2, loss):
        return None
    return f"loss {loss:.4f}, first of the tuple {first}, over 6 in place of 3 {halved:.4f}"


@used_by("host/generation.py reads_last_only: the last layer's last visit")
def keeps_last() -> str | None:
    """logits_to_keep=K gives the logits of the last K positions alone."""
    model = trial.tiny_model()
    with torch.no_grad():
        whole, last = model(trial.ids()).logits, model(trial.ids(), logits_to_keep=1).logits
    same = last.shape[1] == 1 and torch.allclose(whole[:, -1:], last, atol=1e-5)
    return None if same else f"logits of shape {list(last.shape)}"


@used_by("host/generation.py shows_all: where tokens may be left out", at_attach=True)
def shown() -> str | None:
    """A pass can be asked to show hidden states, attentions and router logits, and no more."""
    expected = {"output_attentions", "output_hidden_states", "output_router_logits"}
    return trial.differs("what can be shown", set(SHOWN), expected)


@used_by("depth/stack.py _close: attentions of first visits")
def attentions_once() -> str | None:
    """Attentions are captured once each time that a layer's own forward runs."""
    model = trial.tiny_model(attn_implementation="eager")
    layer = model.model.layers[0]
    own = layer.forward
    layer.forward = lambda state, **kwargs: own(own(state, **kwargs), **kwargs)
    with torch.no_grad():
        out = model(trial.ids(), output_attentions=True, use_cache=False)
    return trial.differs("attentions of 3 applications", len(out.attentions), 3)


@used_by("depth/generation.py HostMixin.generate", at_attach=True)
def generate_takes() -> str | None:
    """generate takes the ids, then the generation configuration."""
    if not hasattr(GenerationConfig(), "return_dict_in_generate"):
        return "GenerationConfig has no return_dict_in_generate"
    first = trial.parameters(getattr(LlamaForCausalLM, "generate"))[1:3]  # noqa: B009 - not declared
    return trial.differs("its first parameters", first, ["inputs", "generation_config"])


class _ArgumentOfPass(LlamaForCausalLM):
    """A model whose prepare_inputs_for_generation adds an argument, as `HostMixin` does."""

    passes: tuple[tuple[int, int, bool], ...] = ()

    def prepare_inputs_for_generation(self, input_ids: Any, **kwargs: Any) -> Any:
        inputs: Any = super().prepare_inputs_for_generation(input_ids, **kwargs)  # type: ignore[misc]
        has_cache = names.cache_among(inputs) is not None
        return {**inputs, "own": (input_ids.shape[1], inputs["input_ids"].shape[1], has_cache)}

    def forward(self, *args: Any, own: Any = None, **kwargs: Any) -> Any:
        type(self).passes += (own,)
        return super().forward(*args, **kwargs)


@used_by("depth/generation.py prepare_inputs_for_generation: the roles of every pass")
def prepared() -> str | None:
    """generate makes each pass of what prepare_inputs_for_generation returns for all ids so far."""
    _ArgumentOfPass.passes = ()
    with torch.no_grad():
        trial.tiny_model(_ArgumentOfPass).generate(trial.ids(), max_new_tokens=3, do_sample=False)
    expected = ((4, 4, True), (5, 1, True), (6, 1, True))
    return trial.differs("(ids, new ids, cache) of three passes", _ArgumentOfPass.passes, expected)


@used_by("host/generation.py prefill, extended, decoding: speculation", at_attach=True)
def private_steps() -> str | None:
    """generate's own steps are methods that a decoding loop can call."""
    steps = {
        "_prefill": ("input_ids", "generation_config", "model_kwargs", "is_first_iteration"),
        "_update_model_kwargs_for_generation": ("outputs", "model_kwargs", "num_new_tokens"),
        "_expand_inputs_for_generation": ("expand_size", "is_encoder_decoder", "input_ids"),
        "_optimize_model_for_decode": (),
    }
    faults = (trial.lacks(getattr(LlamaForCausalLM, name), *taken) for name, taken in steps.items())
    return next(filter(None, faults), None)


@used_by("depth/generation.py: continuous batching is refused", at_attach=True)
def continuous() -> str | None:
    """Continuous batching is entered by methods of ContinuousMixin alone."""
    entries = {"generate_batch", "init_continuous_batching", "continuous_batching_context_manager"}
    return None if entries <= set(CONTINUOUS) else f"ContinuousMixin has {CONTINUOUS}"


@used_by("host/names.py with_parts: tokens that stay are not computed")
def parts() -> str | None:
    """A layer's token-wise parts are called by their names, so something may stand in for them."""
    model = trial.tiny_model()
    layer, entered = model.model.layers[0], []

    def noting(part: torch.nn.Module) -> Callable[..., Any]:
        return lambda *args, **kwargs: (entered.append(part), part(*args, **kwargs))[1]

    model.model.layers[0] = names.with_parts(layer, names.token_wise_parts(layer), noting)
    with torch.no_grad():
        model(trial.ids(), use_cache=False)
    expected = [layer.self_attn.q_proj, layer.self_attn.o_proj, layer.mlp]
    return trial.differs("the parts entered", entered, expected)


@used_by("host/layers.py final_norm: exits, calibration and the exit loss read logits")
def readout() -> str | None:
    """The logits of a Llama are its head on its final norm on what leaves its last layer."""
    model = trial.tiny_model()
    states: list[Tensor] = []
    model.model.layers[-1].register_forward_hook(lambda _layer, _inputs, out: states.append(out))
    with torch.no_grad():
        logits = model(trial.ids(), use_cache=False).logits
        read = scaled_logits(head_of(model)(final_norm(model.model, states[0])), model.config)
    return None if torch.equal(logits, read) else "other logits"


@used_by("host/names.py: a cache handed over under a former name", at_attach=True)
def known_names() -> str | None:
    """No layer of today hands the cache on under a name that is not known."""
    taken = {
        name
        for name in trial.parameters(LlamaDecoderLayer.forward)
        if "cache" in name or "past" in name
    }
    unknown = sorted(taken - {*names.KNOWN_CACHE_NAMES, "use_cache", "cache_position"})
    return f"LlamaDecoderLayer.forward also takes {unknown}" if unknown else None


BESIDE_LAYERS = {
    "layers",
    "layer_class_to_replicate",
    "offloading",
    "only_non_sliding",
    "prefetch_stream",
    "_is_user_defined",
}
"""What a cache holds beside its layers; none of it counts tokens."""


def _replacing() -> list[Any]:
    """An empty cache layer of each class that stores by replacing its tensors."""
    indexed = getattr(theirs, "DynamicIndexedLayer", None)
    return [DynamicLayer(), DynamicSlidingWindowLayer(4), *([indexed()] if indexed else [])]


def _step(tokens: int = 1) -> tuple[Tensor, Tensor]:
    """Keys and values of a step. Shape: [1, 1, tokens, 2] each."""
    return torch.ones(1, 1, tokens, 2), torch.ones(1, 1, tokens, 2)


@used_by("depth/planes.py PlanedCache: planes follow what moves rows", at_attach=True)
def methods() -> str | None:
    """The methods of a cache that move rows or positions are those that planes follow."""
    public = {name for name in dir(Cache) if not name.startswith("_")}
    present = {name for name in public if callable(getattr(Cache, name))}
    unknown = sorted(present - {*caches.MOVING_METHODS, *caches.PLAIN_METHODS})
    missing = [name for name in caches.MOVING_METHODS if name not in present]
    return f"Cache also has {unknown} and lacks {missing}" if unknown or missing else None


@used_by("host/cache.py copy_on_write: planes, drafts, oracle prefixes", at_attach=True)
def replaces() -> str | None:
    """A dynamic cache layer replaces its tensors when it stores, and never writes into them."""
    for layer in _replacing():
        layer.update(*_step(3))
        before, content = layer.keys, layer.keys.clone()
        twin = copy.copy(layer)
        twin.update(*(2 * part for part in _step()))
        if layer.keys is not before or not torch.equal(before, content):
            return f"{type(layer).__name__} wrote into keys that a copy of it shares"
        if twin.keys.untyped_storage().data_ptr() == before.untyped_storage().data_ptr():
            return f"{type(layer).__name__} stored the next token into the storage of the last"
    return None


@used_by("host/cache.py copy_on_write, fixed_address: compiled decoding", at_attach=True)
def writes_in_place() -> str | None:
    """A static cache layer writes where its tensors are."""
    layer = StaticLayer(max_cache_len=4)
    layer.update(*_step())
    before = layer.keys
    layer.update(*_step())
    return None if layer.keys is before else "StaticLayer replaced its keys"


@used_by("depth/planes.py crop; speculation", at_attach=True)
def crops() -> str | None:
    """crop(-n) takes the newest n tokens back."""
    layer = DynamicLayer()
    layer.update(*_step(3))
    layer.crop(-2)
    return trial.differs("the length after crop(-2) of 3 tokens", layer.get_seq_length(), 1)


@used_by("depth/planes.py: masks of a layer", at_attach=True)
def mask_sizes() -> str | None:
    """get_mask_sizes(n) tells how many keys n new tokens will see, and the first one's column."""
    layers = DynamicLayer(), DynamicSlidingWindowLayer(4)
    for layer in layers:
        layer.update(*_step(5))
    sizes = [tuple(layer.get_mask_sizes(2)) for layer in layers]
    what = "get_mask_sizes(2) after 5 tokens, whole and in a window of 4"
    return trial.differs(what, sizes, [(7, 0), (5, 2)])


@used_by("depth/visits.py: layers that hold some rows alone", at_attach=True)
def empty_shows_its_own() -> str | None:
    """A cache layer that grows, while it is empty, shows the keys that a step brings."""
    for kind in caches.GROWING:
        layer: Any = kind(*([4] if kind is DynamicSlidingWindowLayer else []))
        step = _step(5)
        shown = layer.update(*step)
        if not all(map(torch.equal, shown, step)):
            return f"{kind.__name__} shows keys of shape {list(shown[0].shape)} after 5 tokens"
    return None


@used_by("host/cache.py has_keys, is_recurrent, is_sliding: everywhere in depth", at_attach=True)
def kinds() -> str | None:
    """A cache layer tells by its class whether it keeps keys, a window, or a recurrent state."""
    layers = (DynamicLayer(), DynamicSlidingWindowLayer(4), StaticLayer(4), LinearAttentionLayer())
    answers = [
        [is_kind(layer) for layer in layers]
        for is_kind in (caches.has_keys, caches.is_sliding, caches.is_recurrent)
    ]
    expected = [[True, True, True, False], [False, True, False, False], [False] * 3 + [True]]
    return trial.differs("keys, window, recurrent state of the four kinds", answers, expected)


@used_by("host/cache.py held_bytes: kv_bytes of every trace", at_attach=True)
def names_of_tensors() -> str | None:
    """What a cache layer holds of its tokens lies under names that are counted."""
    layers: list[Any] = [*_replacing(), StaticLayer(8)]
    for layer in layers:
        layer.update(*_step(3))
        tensors = [(name, v) for name, v in vars(layer).items() if isinstance(v, Tensor)]
        growing = [name for name, tensor in tensors if tensor.ndim >= 3]
        if not growing or not caches.held_bytes([layer]):
            return f"{type(layer).__name__} holds {sorted(vars(layer))}, none of them counted"
        if unknown := [name for name in growing if name not in caches.TENSORS]:
            return f"{type(layer).__name__} holds {unknown}, which held_bytes does not count"
    state, part = LinearAttentionLayer(), torch.ones(1, 2, 3)
    state.update_conv_state(part)
    state.update_recurrent_state(part.clone())
    if caches.held_bytes([state]) < 2 * part.nbytes:
        return f"LinearAttentionLayer holds {sorted(vars(state))}, not all of it counted"
    return None


@used_by("host/cache.py with_layers: a visit sees the cache with its own plane", at_attach=True)
def nothing_beside_layers() -> str | None:
    """A cache counts no tokens beside its layers."""
    config = trial.tiny_config()
    for cache in (DynamicCache(config=config), StaticCache(config=config, max_cache_len=8)):
        before = {name: value for name, value in vars(cache).items() if name != "layers"}
        cache.update(*_step(), 0)
        if unknown := sorted(set(vars(cache)) - BESIDE_LAYERS):
            return f"{type(cache).__name__} also holds {unknown}"
        if any(getattr(cache, name) is not value for name, value in before.items()):
            return f"{type(cache).__name__} changes something beside its layers when it stores"
    return None


@used_by("host/cache.py VisitCacheLayer: what a visit stores is merged", at_attach=True)
def stands_in() -> str | None:
    """A cache calls `update` of a layer and reads its attributes; an object may stand in for it."""
    cache: Any = DynamicCache(config=trial.tiny_config())
    cache.layers[0] = caches.VisitCacheLayer(cache.layers[0], True, None)
    cache.update(*_step(), 0)
    state = (cache.get_seq_length(), cache.get_mask_sizes(1, 0), list(cache.is_sliding))
    return trial.differs("length, mask sizes, windows", state, (1, (2, 0), [False, False]))


@used_by("speculation: what is cut off a window again", at_attach=True)
def records() -> str | None:
    """Windows keep what a crop needs from activate_past_recording on, until record_past is off."""
    cache: Any = DynamicCache(config=trial.tiny_config())
    window: Any = DynamicSlidingWindowLayer(3)
    cache.layers[0] = window
    window.update(*_step(4))
    caches.record_past(cache, cache.layers, on=True)
    window.update(*_step(2))
    recorded = window.keys.shape[-2]
    window.crop(-2)
    caches.record_past(cache, cache.layers, on=False)
    window.update(*_step(1))
    sizes = (recorded, window.get_seq_length(), window.keys.shape[-2])
    return trial.differs("keys while recording, length and keys after", sizes, (4, 5, 2))


@used_by("host/cache.py KeysWritten: a layer that is left at its cache", at_attach=True)
def survives_an_error() -> str | None:
    """An error out of `update` leaves the cache as it was."""
    cache: Any = DynamicCache(config=trial.tiny_config())
    cache.update(*_step(), 0)

    def refuse(*_: Any, **__: Any) -> Any:
        raise KeyError

    cache.layers[1].update = refuse
    try:
        cache.update(*_step(), 1)
    except KeyError:
        return trial.differs("the length of layer 0", cache.get_seq_length(), 1)
    return "Cache.update swallowed an error of its layer"


@used_by("depth/planes.py adopt, visits.py: live caches gain planes", at_attach=True)
def change_class() -> str | None:
    """A live cache and its layers may change their class to a subclass."""
    cache: Any = DynamicCache(config=trial.tiny_config())
    cache.__class__ = type("DynamicCache", (DynamicCache,), {})
    cache.layers[0].__class__ = type("DynamicLayer", (DynamicLayer,), {})
    cache.update(*_step(), 0)
    return trial.differs("the length", cache.get_seq_length(), 1)
