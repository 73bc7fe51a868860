"""Packed = dense: whoever makes a visit alone gets what he gets among all others."""

import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from hosts import HOSTS, Host
from hosts.checks import greedy
from hosts.host import Inputs
from hosts.releases import NEVER_PACKED
from trol.depth import AbstractPolicy, attach, attached, detach, executor, selection
from trol.depth import packed as packed_
from trol.host.names import CACHE
from trol.policies.planned import Planned

from .subjects import HOLED, NO_HOLES, POLICIES, attach_settled, gap, hosts_and_attns

pytestmark = pytest.mark.usefixtures("no_grad")

PLANS = ("0:2 1 3", "1-3", "exit@2")
"""One for each of three rows: no visit, one visit and two of them in the same layer."""

ROWS: dict[str, Callable[[], AbstractPolicy]] = {
    "rows": lambda: Planned(PLANS),
    "rows_question": lambda: Planned(PLANS, scope="question"),
    "hole_rows": lambda: Planned(PLANS, skipped_kv="hole"),
    "hole_rows_answer": lambda: Planned(PLANS, scope="answer", skipped_kv="hole"),
}
"""Policies under which every row has a plan of its own."""

ALL = {**POLICIES, **HOLED, **ROWS}
del ALL["plain"]  # leaves nobody out

STATIC = {"cache_implementation": "static", "disable_compile": True}


def cases() -> list[object]:
    """Every host, every attention, every policy that the host can have."""
    return [
        pytest.param(*case.values, name, id=f"{case.id}-{name}")
        for case in hosts_and_attns()
        for name in ALL
        if not (name.startswith("hole") and case.values[0].name in NO_HOLES)
    ]


DRAWN = ("some_twice", "some_skip", "hole_some")
PACKED = {*DRAWN, "trol_tau", "rows", "rows_question", "hole_rows"}
"""Policies under which tokens go alone on every host that can have it."""


class Trusting(dict):
    """Verdicts of somebody who compares nothing: every visit that can be packed is."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: set[object] = set()

    def __contains__(self, kind: object) -> bool:
        if not isinstance(kind, tuple):
            return False
        self.asked.add(kind)
        return True


def trusting(model: PreTrainedModel) -> Trusting:
    """Takes the comparison of packed visits with dense ones out of a model."""
    attached(model)[1].depth_verdicts = verdicts = Trusting()
    return verdicts


@functools.lru_cache(maxsize=2)  # cases come host by host
def built(host: str, attn: str) -> tuple[PreTrainedModel, Tensor]:
    """A bare host, and its logits for three rows."""
    model = HOSTS[host].build(attn)
    return model, forward(model, HOSTS[host].inputs(batch=3), told=False)


def forward(model: PreTrainedModel, inputs: Inputs, *, told: bool = True) -> Tensor:
    """Logits of the real tokens, of a pass without a cache; two tokens of it are answer."""
    roles = torch.zeros_like(inputs["input_ids"])
    roles[:, -3:-1] = 1
    said = {"assistant_masks": roles} if told else {}
    return model(**inputs, **said, use_cache=False).logits[inputs["attention_mask"].bool()]


def runs(host: Host, model: PreTrainedModel) -> list[Callable[[], Tensor]]:
    """Ways to make logits: without padding, or padded on the right and without a cache, ..."""
    rows = host.inputs(batch=3)
    right = rows if "right_padding" in host.cannot else host.right_padded().batch
    return [lambda: forward(model, rows), lambda: forward(model, right)]


def caches(host: Host, model: PreTrainedModel) -> list[Callable[[], Tensor]]:
    """... padded on the left, by turns on every class of cache."""
    left = host.inputs(batch=3) if "left_padding" in host.cannot else host.left_padded().batch
    pieces = {} if "chunked_prefill" in host.cannot else {"prefill_chunk_size": 5}
    found = [lambda: greedy(model, left, max_new_tokens=2, **pieces)[1]]
    if "static_cache" not in host.cannot:
        found.append(lambda: greedy(model, left, max_new_tokens=2, **STATIC)[1])
    return found


@pytest.mark.parametrize(("host", "attn", "name"), cases())
def test_packed_is_dense(host: Host, attn: str, name: str) -> None:
    """Whatever the policy, the cache and the padding."""
    model, plain = built(host.name, attn)
    verdicts = trusting(attach_settled(model, ALL[name]()))
    try:
        for number, same in enumerate([*([run] for run in runs(host, model)), caches(host, model)]):
            with executor(model, "dense"):
                dense = same[0]()
            if not number:
                assert gap(dense, plain) > 1e-2  # the policy matters
            for run in same:
                with executor(model, "packed"):
                    assert gap(run(), dense) <= host.default_exact
        assert verdicts.asked or name not in PACKED or host.name in NEVER_PACKED
    finally:
        detach(model)


@pytest.mark.parametrize(("host", "attn"), hosts_and_attns())
def test_no_host_is_found_out_wrongly(host: Host, attn: str) -> None:
    """Every comparison ends well, also the first that pads or lies on a static cache."""
    for name in DRAWN[: 2 if host.name in NO_HOLES else 3]:
        model, _ = built(host.name, attn)
        for run in (runs(host, model)[1], *caches(host, model)):
            attach_settled(model, ALL[name]())
            with executor(model, "packed"):
                run()
            verdicts = attached(model)[1].depth_verdicts
            detach(model)
            assert all(verdicts.values())
            assert verdicts or host.name in NEVER_PACKED


@pytest.mark.parametrize("host", [HOSTS[name] for name in ("llama", "gemma3", "gpt2")])
@pytest.mark.parametrize("name", ["trol", "trol_tau", "some_twice", "some_skip", "hole_rows"])
def test_a_conversation_on_one_cache(host: Host, name: str) -> None:
    """Turn after turn, by executors that take turns as well."""
    model, inputs = attach_settled(host.build(), ALL[name]()), host.inputs(batch=3)
    trusting(model)
    said = []
    for turns in (("dense", "dense", "dense"), ("packed", "packed", "packed"), ("packed", "dense")):
        talk, kept, logits = inputs, {}, []
        for who in turns:
            with executor(model, who):
                out = model.generate(
                    **talk,
                    **kept,
                    max_new_tokens=2,
                    do_sample=False,
                    output_logits=True,
                    return_dict_in_generate=True,
                )
            kept = {CACHE: out[CACHE]}
            new = torch.cat([out.sequences[:, -2:], inputs["input_ids"][:, :3]], 1)
            talk = host.extend(talk, new)
            logits.append(torch.stack(out.logits, 1))
        said.append(torch.cat(logits, 1))
    dense, packed, mixed = said
    assert gap(packed, dense) <= host.default_exact
    assert gap(mixed, dense[:, :4]) <= host.default_exact


@pytest.mark.parametrize("name", ["trol", "trol_all", "trol_three", "repeat"])
def test_the_last_visit_of_the_last_layer_needs_only_the_last_token(name: str) -> None:
    """While `generate` reads a prompt; not where hidden states are asked for."""
    host = HOSTS["llama"]
    model, inputs = attach(host.build(), ALL[name]()), host.inputs(batch=2)
    widths: list[int] = []
    layer = attached(model)[1].layers[-1]
    layer.mlp.register_forward_pre_hook(lambda _m, args: widths.append(args[0].shape[1]))
    with executor(model, "packed"):
        for settings in ({}, {"output_hidden_states": True}):
            greedy(model, inputs, max_new_tokens=1)  # compares, where nobody has yet
            widths.clear()
            greedy(model, inputs, max_new_tokens=1, **settings)
            assert (widths[-1] == 1) == (not settings), widths
    with executor(model, "dense"):
        widths.clear()
        greedy(model, inputs, max_new_tokens=1)
        assert set(widths) == {9}


@pytest.mark.parametrize(
    ("host", "attn", "name"),
    [
        case
        for case in cases()
        if case.values[0].name in ("llama", "gemma3", "bloom", "qwen3_vl")
        and case.values[2] in ("trol_tau", "trol_three", "exit_sure", "rows", *DRAWN)
    ],
)
def test_rows_of_unlike_length_go_in_groups(
    host: Host, attn: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Were padding forbidden: rows with as many tokens to go are one call of the layer."""
    model, _ = built(host.name, attn)
    monkeypatch.setattr(selection, "SLACK", 0)
    monkeypatch.setattr(selection, "WASTE", 0.0)
    groups: list[int] = []

    def noted(*args, **kwargs):
        found = selection.groups_of(*args, **kwargs)
        groups.append(len(found))
        return found

    monkeypatch.setattr(packed_, "groups_of", noted)
    verdicts = trusting(attach_settled(model, ALL[name]()))
    try:
        for same in (*([run] for run in runs(host, model)), caches(host, model)):
            with executor(model, "dense"):
                dense = same[0]()
            for run in same:
                with executor(model, "packed"):
                    assert gap(run(), dense) <= host.default_exact
    finally:
        detach(model)
    assert verdicts.asked
    assert max(groups) > 1 or name == "rows"  # whose rows are whole
