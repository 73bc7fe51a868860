"""Hidden states: what is compared is what transformers reports, and what passes a skipped layer."""

import pytest
import torch

from hosts import HOSTS
from training import standins
from trol.depth import Plan, depth
from trol.errors import DataError
from trol.evaluation.hidden_states import influences, scoped, state_cosines, states
from trol.evaluation.items import Item
from trol.family.loading import load_model
from trol.policies.planned import Planned

ITEMS = [
    Item(None, question, f"{answer}, {standins.ANSWERED[0]}", "words")
    for question, answer in zip(standins.ASKED, standins.ANSWERED, strict=True)
]
FAMILIES = ("llama", "gemma2", "gpt2", "opt", "bloom", "falcon_h1", "qwen3_vl", "llava")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple:
    folder = standins.llm(tmp_path_factory.mktemp("llama"), num_hidden_layers=4)
    model, processor = load_model(folder)
    for weight in model.parameters():
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=0.15)
    return model, processor


@pytest.mark.parametrize("scope", ["all", "answer"])
@pytest.mark.parametrize("name", FAMILIES)
def test_states_are_those_that_transformers_reports(name: str, scope: str) -> None:
    """All but the last, which transformers shows after the final norm."""
    host = HOSTS[name]
    model, inputs = host.build(), host.inputs(batch=2)
    labels = inputs["input_ids"].clone()
    labels[:, :-4] = -100
    batch = inputs | {"labels": labels}
    chosen = scoped(batch, "all")
    policy = Planned(Plan("0 2:2"), scope=scope)  # 1 and 3 are skipped, 2 is visited twice
    values = states(model, batch, policy, chosen)
    with depth(model, policy), torch.no_grad():
        reported = model(**batch, output_hidden_states=True, use_cache=False).hidden_states
    assert len(values) == len(reported) == 5
    for ours, theirs in zip(values[:-1], reported[:-1], strict=True):
        assert torch.equal(ours, theirs[chosen])
    skips = scoped(batch, scope)[chosen]
    if host.picture is not None:  # Qwen3-VL's stack adds to image tokens between its layers
        skips &= (inputs["input_ids"] != host.picture.image_id)[chosen]
    assert torch.equal(values[2][skips], values[1][skips])
    assert torch.equal(values[4][skips], values[3][skips])
    assert not torch.equal(values[3][skips], values[2][skips])
    if scope == "answer":
        runs = ~scoped(batch, scope)[chosen]
        assert not torch.isclose(values[2][runs], values[1][runs]).all(-1).any()


def test_cosines_of_the_plain_model_are_one(llama: tuple) -> None:
    assert state_cosines(*llama, ITEMS, "plain") == pytest.approx([1.0] * 4, abs=1e-6)


def test_cosines_fall_where_a_plan_skips(llama: tuple) -> None:
    values = state_cosines(*llama, ITEMS, Planned("0 2-3", scope="answer"))
    assert len(values) == 4
    assert values[0] == pytest.approx(1, abs=1e-6)
    assert all(-1 < cosine < 0.99 for cosine in values[1:])


def test_a_cosine_is_a_mean_over_answer_tokens_of_all_batches(
    llama: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = Planned("0-1", scope="answer")
    whole = state_cosines(*llama, ITEMS, policy)
    monkeypatch.setattr("trol.evaluation.hidden_states.BATCH", 1)
    assert state_cosines(*llama, ITEMS, policy) == pytest.approx(whole, abs=1e-6)


@pytest.mark.parametrize("scope", ["all", "answer", "question"])
def test_a_layer_that_does_nothing_has_no_influence(llama: tuple, scope: str) -> None:
    model, processor = llama
    idle = model.model.layers[2]
    kept = [part.weight.clone() for part in (idle.self_attn.o_proj, idle.mlp.down_proj)]
    try:
        for part in (idle.self_attn.o_proj, idle.mlp.down_proj):
            part.weight.data.zero_()
        values = influences(model, processor, ITEMS, scope)
    finally:
        for part, weight in zip((idle.self_attn.o_proj, idle.mlp.down_proj), kept, strict=True):
            part.weight.data.copy_(weight)
    assert values[2] == pytest.approx({"mean": 0, "worst": 0}, abs=1e-6)
    assert all(one["mean"] > 0.01 for layer, one in enumerate(values) if layer != 2)


def test_no_items_is_an_error(llama: tuple) -> None:
    with pytest.raises(DataError, match="no tokens to measure"):
        state_cosines(*llama, [], "plain")


def test_influence_by_the_worst_token_sees_a_layer_that_matters_at_one(llama: tuple) -> None:
    """Layer 1 turns the first token alone; with that one left out it has no influence."""
    model, processor = llama

    def turns_first(_: object, __: object, out: object) -> object:
        states = (out[0] if isinstance(out, tuple) else out).clone()  # type: ignore[union-attr,index]
        states[:, 1:] = seen["entered"][:, 1:]
        return (states, *out[1:]) if isinstance(out, tuple) else states

    seen: dict[str, torch.Tensor] = {}

    def enters(_: object, args: tuple, kwargs: dict) -> None:
        seen["entered"] = args[0] if args else kwargs["hidden_states"]

    layer = model.model.layers[1]
    hooks = [
        layer.register_forward_pre_hook(enters, with_kwargs=True),
        layer.register_forward_hook(turns_first),
    ]
    try:
        one = influences(model, processor, ITEMS, "all")[1]
        spared = influences(model, processor, ITEMS, "all", keep_first=1)[1]
    finally:
        for hook in hooks:
            hook.remove()
    assert one["worst"] > 10 * one["mean"] > 0.01
    assert spared == pytest.approx({"mean": 0, "worst": 0}, abs=1e-6)
