"""Holes under every attention and mask: what is hidden by trol is what is hidden by hand."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from hosts import HOSTS
from hosts.host import Inputs
from trol.depth import attach, trace
from trol.errors import HostError
from trol.host.layers import hide_keys
from trol.policies.random_tokens import RandomTokens

from .subjects import gap, layers_of

pytestmark = pytest.mark.usefixtures("no_grad")

POLICY = RandomTokens(0.5, visit=1, skipped_kv="hole")
LEAST = torch.finfo(torch.float32).min


def bidirectional(model: PreTrainedModel) -> PreTrainedModel:
    """As llm2vec and EmbeddingGemma have it: no token is hidden from an earlier one."""
    model.config.is_causal = False
    for layer in layers_of(model):
        layer.self_attn.is_causal = False
    return model


def masked(inputs: Inputs, form: str, *, causal: bool) -> dict[str, Any]:
    """The inputs with their mask in one of the forms that a caller may give."""
    ids, padding = inputs["input_ids"], inputs["attention_mask"].bool()
    if form == "none":
        return {"input_ids": ids}
    if form == "padding":
        return {"input_ids": ids, "attention_mask": padding.long()}
    seen = _allowed(padding, causal=causal)
    if form == "boolean":
        return {"input_ids": ids, "attention_mask": seen}
    return {"input_ids": ids, "attention_mask": torch.where(seen, 0.0, LEAST)}


def _allowed(padding: Tensor, *, causal: bool) -> Tensor:
    """Who sees whom: each token itself, and real tokens. Shape: [B, 1, T, T]."""
    tokens = padding.shape[1]
    seen = torch.ones(tokens, tokens, dtype=torch.bool)
    seen = (seen.tril() if causal else seen) & padding[:, None, :]
    return (seen | torch.eye(tokens, dtype=torch.bool))[:, None]


def by_hand(model: PreTrainedModel, inputs: Inputs, visits: Tensor, *, causal: bool) -> Tensor:
    """Logits of a bare model whose layers are handed masks and states by hooks.

    visits: who visits which layer. Shape: [L, B, T].
    """
    seen = _allowed(inputs["attention_mask"].bool(), causal=causal)
    own = torch.eye(seen.shape[-1], dtype=torch.bool)
    hooks = []
    for layer, goes in zip(layers_of(model), visits.bool(), strict=True):
        shown = torch.where(seen & (goes[:, None, None, :] | own), 0.0, LEAST)

        def enter(_m: Any, args: Any, kwargs: Any, shown: Tensor = shown) -> Any:
            return args, {**kwargs, "attention_mask": shown}

        def leave(_m: Any, args: Any, _kwargs: Any, out: Any, goes: Tensor = goes) -> Any:
            return torch.where(goes[..., None], out, args[0])

        hooks.append(layer.register_forward_pre_hook(enter, with_kwargs=True))
        hooks.append(layer.register_forward_hook(leave, with_kwargs=True))
    logits = model(**inputs, use_cache=False).logits
    for hook in hooks:
        hook.remove()
    return logits


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("form", ["none", "padding", "boolean", "additive"])
def test_holes_are_hidden_and_nothing_else(attn: str, causal: bool, form: str) -> None:
    """Of padded rows those that are no padding; with no mask given there is none."""
    if form == "boolean" and attn == "eager":
        pytest.skip("transformers itself adds a boolean mask of a caller there")
    host = HOSTS["llama"]
    inputs = host.inputs(batch=2) if form == "none" else host.left_padded().batch
    model, bare = host.build(attn), host.build("eager")
    if not causal:
        model, bare = bidirectional(model), bidirectional(bare)
    attach(model, POLICY)
    with trace(model) as seen:
        given = masked(inputs, form, causal=causal)
        model(**given, use_cache=False)
    got = model(**given, use_cache=False).logits
    real = inputs["attention_mask"].bool()
    wanted = by_hand(bare, inputs, seen.visits, causal=causal)
    assert 0 < seen.visits.sum() < seen.visits.numel()
    assert gap(got[real], wanted[real]) <= host.default_exact


@pytest.mark.parametrize(
    ("attention", "said"),
    [
        ("flash_attention_2", "padding alone"),
        ("flex_attention", "compiles its mask anew"),
        ("somebodys_own", "was given no mask"),
    ],
)
def test_attentions_that_cannot_be_told_are_refused(attention: str, said: str) -> None:
    hidden, earlier = torch.zeros(1, 1, 2, 2, dtype=torch.bool), torch.ones(2, 2).tril().bool()
    with pytest.raises(HostError, match=rf"{said}.*sdpa.*skipped_kv"):
        hide_keys(None, hidden, earlier, attention=attention, causal=True, dtype=torch.float32)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's own, while it compiles
def test_flex_attention_is_refused_by_name() -> None:
    model = attach(HOSTS["llama"].build("flex_attention"), POLICY, probe=False)
    with pytest.raises(HostError, match=r'flex_attention .*attn_implementation="sdpa"'):
        model(**HOSTS["llama"].inputs())
