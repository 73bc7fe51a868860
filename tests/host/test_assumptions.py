"""What trol assumes of transformers, torch, PEFT and bitsandbytes holds here; run before all else.

A failure names the assumption, the files that use it, the version, and what is the case instead.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Cache, LlamaForCausalLM, LogitsProcessor, Trainer
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, StaticLayer
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaModel

import trol
from hosts import HOSTS
from trol.errors import HostError
from trol.host import assumptions
from trol.host.assumptions import ASSUMPTIONS, failure, page
from trol.host.cache import copy_on_write
from trol.host.trial import Assumption

ROOT = Path(__file__).parents[2]
BY_LOOK = {one.look.__name__: one for one in ASSUMPTIONS}

pytestmark = pytest.mark.filterwarnings("ignore:.*gemm_4bit_forward.*")


@pytest.mark.parametrize("one", ASSUMPTIONS, ids=lambda one: one.look.__name__)
def test_it_holds(one: Assumption) -> None:
    finding = one.finding()
    assert finding is None, failure(one, finding or "")


def test_every_row_has_a_sentence_and_names_files_that_exist() -> None:
    assert len({one.name for one in ASSUMPTIONS}) == len(ASSUMPTIONS) > 40
    for one in ASSUMPTIONS:
        assert one.name[0].isupper() or one.name.startswith(("crop", "generate", "get_", "from_",
            "logits", "bitsandbytes", "accelerate", "_init", "_tied"))  # fmt: skip
        for file in re.findall(r"[a-z_/]+\.py", one.used_by):
            assert any((ROOT / "src" / "trol").rglob(file)), (one.name, file)


def test_the_page_is_the_table() -> None:
    written = ROOT / "docs" / "host-assumptions.md"
    assert written.read_text(encoding="utf-8") == page()


def written_in_place(layer: Any, keys: Any, values: Any, *_: Any, **__: Any) -> Any:
    """The `update` of a dynamic layer that writes into spare room: what upstream may do one day."""
    if not layer.is_initialized:
        layer.lazy_initialization(keys, values)
        layer.room = torch.zeros(*keys.shape[:2], 64, keys.shape[-1])
        layer.length = 0
    layer.room[:, :, layer.length : layer.length + keys.shape[-2]] = keys
    layer.length += keys.shape[-2]
    layer.keys = layer.values = layer.room[:, :, : layer.length]
    return layer.keys, layer.values


def renamed(name: str) -> Callable[..., Any]:
    def forward(self: Any, hidden_states: Any, attention_mask: Any = None, **kwargs: Any) -> Any:
        raise AssertionError(name)

    return forward


def cropped_to(layer: Any, tokens: int) -> None:
    """What `crop` meant in earlier releases: keep so many tokens."""
    layer.keys = layer.keys[..., : abs(tokens), :]
    layer.values = layer.values[..., : abs(tokens), :]


def calls_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    """The forward of a stack that calls its layers' forward, not the layers."""
    for layer in self.layers:
        layer.forward(args[0] if args else kwargs["inputs_embeds"])


CHANGES: dict[str, tuple[tuple[Any, str, Any], ...]] = {
    "replaces": ((DynamicLayer, "update", written_in_place),),
    "writes_in_place": ((StaticLayer, "update", DynamicLayer.update),),
    "crops": ((DynamicLayer, "crop", cropped_to),),
    "mask_sizes": ((DynamicLayer, "get_mask_sizes", lambda layer, n: (0, n)),),
    "methods": ((Cache, "trim", lambda cache, n: None),),
    "kinds": ((CacheLayerMixin, "is_sliding", True), (DynamicLayer, "is_sliding", True)),
    "layer_takes": ((LlamaDecoderLayer, "forward", renamed("layer")),),
    "one_name": ((LlamaDecoderLayer, "forward", renamed("layer")),),
    "enters_by_call": ((LlamaModel, "forward", calls_forward),),
    "tied": ((LlamaForCausalLM, "_tied_weights_keys", ["lm_head.weight"]),),
    "private_steps": ((LlamaForCausalLM, "_prefill", lambda self, ids: None),),
    "generate_takes": ((LlamaForCausalLM, "generate", lambda self, config, ids: None),),
    "trainer_divides": ((Trainer, "compute_loss", lambda self, model, inputs: None),),
}
"""Look -> what a new release might change, one thing at a time, without an error of its own."""


@pytest.mark.parametrize("look", CHANGES)
def test_a_change_is_noticed(look: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for owner, name, value in CHANGES[look]:
        monkeypatch.setattr(owner, name, value, raising=False)
    assert BY_LOOK[look].finding() is not None


def test_attach_names_the_first_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """In one line: the assumption, what is the case, the files that use it, the command for all."""
    monkeypatch.setattr(Cache, "trim", lambda cache, n: None, raising=False)
    assumptions.check_at_attach.cache_clear()
    model = HOSTS["llama"].build()
    try:
        with pytest.raises(HostError) as raised:
            trol.attach(model, "0-3:2")
    finally:
        monkeypatch.undo()
        assumptions.check_at_attach.cache_clear()
    for part in (BY_LOOK["methods"].name, "trim", "depth/planes.py", "trol info"):
        assert part in str(raised.value)
    assert "\n" not in str(raised.value)
    assert type(model).__mro__[0] is type(model)
    assert not hasattr(model.model, "depth_policy")
    trol.attach(model, "0-3:2")


class Roomy(DynamicLayer):
    """A cache layer of another library, which writes into spare room."""

    update = written_in_place


def test_layers_of_other_makers_share_nothing() -> None:
    """What a copy stores, the original does not see, whatever its `update` does."""
    layer = Roomy()
    layer.update(torch.ones(1, 1, 3, 2), torch.ones(1, 1, 3, 2))
    twin = copy_on_write(layer)
    twin.update(torch.full((1, 1, 1, 2), 5.0), torch.zeros(1, 1, 1, 2))
    layer.update(torch.full((1, 1, 1, 2), 7.0), torch.zeros(1, 1, 1, 2))
    assert (twin.keys[0, 0, :, 0].tolist(), layer.keys[0, 0, :, 0].tolist()) == (
        [1, 1, 1, 5],
        [1, 1, 1, 7],
    )


def test_a_forward_that_was_replaced_on_the_object_is_refused() -> None:
    """Calling it would bypass the class, and so trol; accelerate's hooks are known."""
    model = HOSTS["llama"].build()
    layer = model.model.layers[1]
    layer.forward = lambda *args, **kwargs: args[0]
    with pytest.raises(HostError, match="was replaced on the object itself"):
        trol.attach(model, "0-3:2")


def test_a_pass_inside_generate_without_roles_is_refused() -> None:
    """A processor that calls the model itself: its tokens must not be question by default."""
    model, inputs = HOSTS["llama"].build(), HOSTS["llama"].inputs()

    class CallsModel(LogitsProcessor):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            return scores + 0 * model(input_ids.flip(1)).logits[:, -1]

    settings = {"max_new_tokens": 2, "logits_processor": [CallsModel()]}
    trol.attach(model, trol.TrolMixer(scope="all"))
    model.generate(**inputs, **settings)
    trol.detach(model)
    trol.attach(model, trol.TrolMixer())
    with pytest.raises(HostError, match="called inside generate"):
        model.generate(**inputs, **settings)


def test_layers_called_past_trol_are_refused() -> None:
    """A stack that calls `layer.forward` would run without the policy, and without an error."""
    model, inputs = HOSTS["llama"].build(), HOSTS["llama"].inputs()
    trol.attach(model, "0-3:2")
    kind = type(model.model)
    real = kind.trol_original.forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls = [type(layer).__call__ for layer in self.layers]
        for layer in self.layers:
            type(layer).__call__ = torch.nn.Module.__call__
        try:
            return real(self, *args, **kwargs)
        finally:
            for layer, call in zip(self.layers, calls, strict=True):
                type(layer).__call__ = call

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kind.trol_original, "forward", forward)
        with pytest.raises(HostError, match="calls its layers past trol"):
            model(**inputs)
