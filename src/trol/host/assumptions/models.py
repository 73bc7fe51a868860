"""What is assumed of models, their layers and outputs, and of `generate`."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from transformers import GenerationConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from trol.host.assumptions.table import Table, differs, ids, tiny_model
from trol.host.generation import CONTINUOUS, SHOWN, SLICES_LOGITS
from trol.host.layers import final_norm, head_of, scaled_logits
from trol.host.names import (
    CACHE,
    KNOWN_CACHE_NAMES,
    cache_among,
    cache_key,
    token_wise_parts,
    with_parts,
)

MODELS = Table()


def _parameters(function: Any) -> list[str]:
    return list(inspect.signature(function).parameters)


@MODELS.row("host/names.py CACHE: every pass with a cache", at_attach=True)
def one_name() -> str | None:
    """The cache has one name in layers, stacks, models and prepare_inputs_for_generation."""
    model = LlamaForCausalLM
    takers = (LlamaDecoderLayer.forward, model.forward, model.prepare_inputs_for_generation)  # type: ignore[attr-defined]
    lacking = [one.__qualname__ for one in takers if CACHE not in _parameters(one)]
    return f"{', '.join(lacking)} take no {CACHE!r}" if lacking else None


@MODELS.row("depth/generation.py, speculation: the cache that outlives a pass")
def name_in_outputs() -> str | None:
    """What a pass returns, and what generate returns, has the cache under the same name."""
    model = tiny_model()
    with torch.no_grad():
        out = model(ids(), use_cache=True)
        said = model.generate(ids(), max_new_tokens=2, return_dict_in_generate=True)
    return differs("the cache's names", [cache_key(out), cache_key(said)], [CACHE, CACHE])


@MODELS.row("host/layers.py layer_signature: every visit", at_attach=True)
def layer_takes() -> str | None:
    """A decoder layer takes hidden_states first, and attention_mask and the cache by name."""
    taken = _parameters(LlamaDecoderLayer.forward)[1:]
    wanted = {"attention_mask", "position_embeddings", "position_ids", CACHE}
    if taken[0] != "hidden_states" or not wanted <= set(taken):
        return f"LlamaDecoderLayer.forward takes {taken}"
    return None


class _Asked(LlamaDecoderLayer):
    """A layer that hands something on from its call to its forward, as `LayerMixin` does."""

    seen: tuple[bool, ...] = ()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return super().__call__(*args, **kwargs, own=True)

    def forward(self, *args: Any, own: bool = False, **kwargs: Any) -> Any:
        type(self).seen += (own,)
        return super().forward(*args, **kwargs)


@MODELS.row("depth/stack.py LayerMixin.__call__: who is called past it runs plain")
def enters_by_call() -> str | None:
    """Layers are entered by their call, and keyword arguments reach forward, checkpointed too."""
    _Asked.seen = ()
    model = tiny_model()
    for layer in model.model.layers:
        layer.__class__ = _Asked
    model(ids())
    _checkpoint(model)
    states = torch.ones(1, 3, 8, requires_grad=True)
    model(inputs_embeds=states, use_cache=False).logits.sum().backward()
    return differs("what reached forward", _Asked.seen, (True,) * 6)


def _checkpoint(model: Any) -> None:
    from trol.host.trainer import checkpoint_activations  # noqa: PLC0415 - loads Trainer

    checkpoint_activations(model.train())


@MODELS.row("depth/generation.py HostMixin.forward: roles by labels, penalties", at_attach=True)
def model_takes() -> str | None:
    """A causal model takes labels, attention_mask and logits_to_keep by these names."""
    wanted = {"input_ids", "attention_mask", "inputs_embeds", "labels", SLICES_LOGITS, "use_cache"}
    lacking = sorted(wanted - {*_parameters(LlamaForCausalLM.forward), "use_cache"})
    return f"LlamaForCausalLM.forward takes no {lacking}" if lacking else None


@MODELS.row("depth/generation.py _penalised: penalties join the loss")
def loss_first() -> str | None:
    """A loss is the first of what a model returns, and is divided by num_items_in_batch."""
    model, labels = tiny_model(), ids()
    with torch.no_grad():
        out = model(ids(), labels=labels)
        row = model(ids(), labels=labels, return_dict=False)
        halved = model(ids(), labels=labels, num_items_in_batch=torch.tensor(6)).loss
    if not (torch.equal(out.loss, row[0]) and torch.isclose(halved * 2, out.loss)):
        return (
            f"loss {out.loss:.4f}, first of the tuple {row[0]}, over 6 in place of 3 {halved:.4f}"
        )
    return None


@MODELS.row("host/generation.py reads_last_only: the last layer's last visit")
def keeps_last() -> str | None:
    """logits_to_keep=K gives the logits of the last K positions alone."""
    model = tiny_model()
    with torch.no_grad():
        whole, last = model(ids()).logits, model(ids(), logits_to_keep=1).logits
    same = last.shape[1] == 1 and torch.allclose(whole[:, -1:], last, atol=1e-5)
    return None if same else f"logits of shape {list(last.shape)}"


@MODELS.row("host/generation.py shows_all: where tokens may be left out", at_attach=True)
def shown() -> str | None:
    """A pass can be asked to show hidden states, attentions and router logits, and no more."""
    wanted = {"output_attentions", "output_hidden_states", "output_router_logits"}
    return differs("what can be shown", set(SHOWN), wanted)


@MODELS.row("depth/stack.py _close: attentions of first visits")
def attentions_once() -> str | None:
    """Attentions are captured once each time that a layer's own forward runs."""
    model = tiny_model(attn_implementation="eager")
    layer = model.model.layers[0]
    own = layer.forward
    layer.forward = lambda state, **given: own(own(state, **given), **given)
    with torch.no_grad():
        out = model(ids(), output_attentions=True, use_cache=False)
    return differs("attentions of 3 applications", len(out.attentions), 3)


@MODELS.row("depth/generation.py HostMixin.generate", at_attach=True)
def generate_takes() -> str | None:
    """generate takes the ids, then the generation configuration."""
    taken = _parameters(LlamaForCausalLM.generate)[1:3]  # type: ignore[attr-defined]
    if not hasattr(GenerationConfig(), "return_dict_in_generate"):
        return "GenerationConfig has no return_dict_in_generate"
    return differs("its first parameters", taken, ["inputs", "generation_config"])


class _Told(LlamaForCausalLM):
    """A model that hands something on from prepare_inputs_for_generation, as `HostMixin` does."""

    passes: tuple[tuple[int, int, bool], ...] = ()

    def prepare_inputs_for_generation(self, input_ids: Any, **kwargs: Any) -> Any:
        inputs: Any = super().prepare_inputs_for_generation(input_ids, **kwargs)  # type: ignore[misc]
        has_cache = cache_among(inputs) is not None
        return {**inputs, "own": (input_ids.shape[1], inputs["input_ids"].shape[1], has_cache)}

    def forward(self, *args: Any, own: Any = None, **kwargs: Any) -> Any:
        type(self).passes += (own,)
        return super().forward(*args, **kwargs)


@MODELS.row("depth/generation.py prepare_inputs_for_generation: the roles of every pass")
def prepared() -> str | None:
    """generate makes each pass of what prepare_inputs_for_generation returns for all ids so far."""
    _Told.passes = ()
    with torch.no_grad():
        tiny_model(_Told).generate(ids(), max_new_tokens=3, do_sample=False)
    wanted = ((4, 4, True), (5, 1, True), (6, 1, True))
    return differs("(ids, new ids, cache) of three passes", _Told.passes, wanted)


@MODELS.row("host/generation.py prefill, grown, decoding: speculation", at_attach=True)
def private_steps() -> str | None:
    """generate's own steps are methods that a decoding loop can call."""
    wanted = {
        "_prefill": ("input_ids", "generation_config", "model_kwargs", "is_first_iteration"),
        "_update_model_kwargs_for_generation": ("outputs", "model_kwargs", "num_new_tokens"),
        "_expand_inputs_for_generation": ("expand_size", "is_encoder_decoder", "input_ids"),
        "_optimize_model_for_decode": (),
    }
    for name, parameters in wanted.items():
        taken = _parameters(getattr(LlamaForCausalLM, name))
        if not set(parameters) <= set(taken):
            return f"{name} takes {taken}, not {parameters}"
    return None


@MODELS.row("depth/generation.py: continuous batching is refused", at_attach=True)
def continuous() -> str | None:
    """Continuous batching is entered by methods of ContinuousMixin alone."""
    wanted = {"generate_batch", "init_continuous_batching", "continuous_batching_context_manager"}
    return None if wanted <= set(CONTINUOUS) else f"ContinuousMixin has {CONTINUOUS}"


@MODELS.row("host/names.py: tokens that stay are not computed")
def parts() -> str | None:
    """A layer's token-wise parts are called by their names, so something may stand in for them."""
    model = tiny_model()
    layer, entered = model.model.layers[0], []

    def noting(part: torch.nn.Module) -> Any:
        return lambda *given, **named: (entered.append(part), part(*given, **named))[1]

    model.model.layers[0] = with_parts(layer, token_wise_parts(layer), noting)
    with torch.no_grad():
        model(ids(), use_cache=False)
    wanted = [layer.self_attn.q_proj, layer.self_attn.o_proj, layer.mlp]
    return differs("the parts entered", entered, wanted)


@MODELS.row("host/layers.py: exits, calibration and the exit loss read logits")
def readout() -> str | None:
    """The logits of a Llama are its head on its final norm on what leaves its last layer."""
    model = tiny_model()
    states: list[torch.Tensor] = []
    model.model.layers[-1].register_forward_hook(lambda _layer, _inputs, out: states.append(out))
    with torch.no_grad():
        logits = model(ids(), use_cache=False).logits
        read = scaled_logits(head_of(model)(final_norm(model.model, states[0])), model.config)
    return None if torch.equal(logits, read) else "other logits"


@MODELS.row("host/names.py: a cache handed over under a former name", at_attach=True)
def known_names() -> str | None:
    """No layer of today hands the cache on under a name that is not known."""
    taken = [
        name for name in _parameters(LlamaDecoderLayer.forward) if "cache" in name or "past" in name
    ]
    unknown = sorted(set(taken) - {*KNOWN_CACHE_NAMES, "use_cache", "cache_position"})
    return f"LlamaDecoderLayer.forward also takes {unknown}" if unknown else None
