"""Rows with plans of their own: a layer holds the keys and values of the rows that visit it."""

import copy
import io

import pytest
import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel, StaticCache

from hosts import HOSTS, Host
from hosts.checks import greedy
from trol import depth
from trol.depth import attach, detach, executor
from trol.depth.planes import cache_bytes
from trol.errors import HostError, TrolError
from trol.execution.rows import RowSubsetLayer
from trol.host.names import CACHE
from trol.policies.planned import Planned

from .subjects import assert_same, cuts, gap, recomputed, some_hosts, spoken

pytestmark = pytest.mark.usefixtures("no_grad")

PLANS = ("0:2 1 3", "1-3", "exit@2")
"""Layer 0: rows 0, 2 of plane 1, row 0 of plane 2; all layers lack a row, but layer 1."""
KEPT = {0: [0, 2], 1: None, 2: [1], 3: [0, 1]}
HOLDERS = some_hosts("llama", "mistral", "gemma3", "gpt2")


def opened(host: Host, *plans: str, **settings) -> PreTrainedModel:
    """A host whose rows have plans of their own."""
    return attach(host.build(), Planned(plans or PLANS, **settings))


def held(cache: Cache) -> dict[int, list[int] | None]:
    """Which rows each layer holds; None for all."""
    return {
        i: slot.held_rows.tolist() if isinstance(slot, RowSubsetLayer) else None
        for i, slot in enumerate(cache.layers)
    }


def read(
    model: PreTrainedModel, ids: Tensor, cache: Cache | None = None, size: int | None = None
) -> tuple[Tensor, Cache]:
    """Logits of `size` columns at a time, and the cache."""
    cache = DynamicCache(config=model.config) if cache is None else cache
    with executor(model, "token-wise"):
        parts = [
            model(ids[:, cut], **{CACHE: cache}).logits
            for cut in cuts(ids.shape[1], size or ids.shape[1])
        ]
    return torch.cat(parts, 1), cache


def dense(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Logits of one dense pass without a cache."""
    with executor(model, "dense"):
        return model(ids, use_cache=False).logits


@pytest.mark.parametrize("host", HOLDERS)
@pytest.mark.parametrize("kv", ["project", "hole"])
def test_each_row_is_that_row_alone(host: Host, kv: str) -> None:
    """Prompt and steps on a kept cache == uncached == each row alone."""
    model, rows = opened(host, skipped_kv=kv), host.left_padded()
    expected = recomputed(host, model, rows.batch, new=4)
    with executor(model, "token-wise"):
        assert_same(spoken(model, rows.batch, max_new_tokens=4), expected, host.default_exact)
        pieces = spoken(model, rows.batch, max_new_tokens=4, prefill_chunk_size=3)
        assert_same(pieces, expected, host.default_exact)
    detach(model)
    for i, (plan, row) in enumerate(zip(PLANS, rows.alone, strict=True)):
        with depth(model, Planned(plan, skipped_kv=kv)):
            alone = greedy(model, row, max_new_tokens=4)
        assert alone[0].tolist() == expected[0][i : i + 1].tolist()
        assert gap(alone[1], expected[1][i : i + 1]) <= host.default_exact


@pytest.mark.parametrize("host", HOLDERS)
def test_in_pieces_of_any_size(host: Host) -> None:
    model, ids = opened(host), host.inputs(batch=3, length=12)["input_ids"]
    whole = dense(model, ids)
    for size in (1, 5, 12):
        parts, cache = read(model, ids, size=size)
        assert gap(parts, whole) <= host.default_exact
        assert held(cache) == KEPT


@pytest.mark.parametrize("host", HOLDERS)
def test_a_cache_of_kept_rows_is_smaller(host: Host) -> None:
    """Eight rows of twelve, and one of plane 2."""
    model, ids = opened(host), host.inputs(batch=3, length=5)["input_ids"]
    _, cache = read(model, ids)
    bare = DynamicCache(config=model.config)
    with depth(model, "all"):
        model(ids, **{CACHE: bare})
    assert cache_bytes(cache) * 12 == cache_bytes(bare) * 9
    assert cache.planes[0, 2].held_rows.tolist() == [0]


@pytest.mark.parametrize("host", HOLDERS)
@pytest.mark.parametrize("beams", [2, 3])
def test_beams_follow_their_row(host: Host, beams: int) -> None:
    model, rows = opened(host), host.left_padded()
    search = {"num_beams": beams, "max_new_tokens": 4, "do_sample": False}
    with executor(model, "dense"):
        expected = model.generate(**rows.batch, **search, use_cache=False)
    with executor(model, "token-wise"):
        assert model.generate(**rows.batch, **search).tolist() == expected.tolist()
        sampled = {"num_return_sequences": 2, "do_sample": True, "max_new_tokens": 4}
        torch.manual_seed(0)
        drawn = model.generate(**rows.batch, **sampled)
    torch.manual_seed(0)
    with executor(model, "dense"):
        again = model.generate(**rows.batch, **sampled, use_cache=False)
    assert drawn.tolist() == again.tolist()


@pytest.mark.parametrize("host", some_hosts("llama", "gpt2"))
def test_rows_are_repeated_chosen_and_taken_back(host: Host) -> None:
    """What transformers does to a batch's cache reaches the rows that are kept."""
    model, ids = opened(host), host.inputs(batch=3, length=8)["input_ids"]
    head, tail = ids[:, :6], ids[:, 6:]
    whole = dense(model, ids)[:, 6:]
    _, cache = read(model, head)

    twice = copy.deepcopy(cache)
    twice.batch_repeat_interleave(2)
    assert twice.layers[0].held_rows.tolist() == [0, 1, 4, 5]
    found, _ = read(model, tail.repeat_interleave(2, 0), twice)
    assert gap(found, whole.repeat_interleave(2, 0)) <= host.default_exact

    longer = copy.deepcopy(cache)
    read(model, ids[:, :2].flip(1), longer)
    longer.crop(-2)
    assert gap(read(model, tail, longer)[0], whole) <= host.default_exact
    assert gap(read(model, tail, cache)[0], whole) <= host.default_exact  # none touched it


@pytest.mark.parametrize("host", some_hosts("llama", "mistral", "gpt2"))
@pytest.mark.parametrize("as_mask", [False, True])
def test_a_row_that_is_chosen_goes_on_with_its_plan(host: Host, as_mask: bool) -> None:
    """Also where its neighbours alone visited a layer, which then holds nobody."""
    plans = ("0 1 3", "1-3", "exit@2")
    model, ids = opened(host, *plans), host.inputs(batch=3, length=8)["input_ids"]
    whole = dense(model, ids)
    _, cache = read(model, ids[:, :6])
    for rows in ([0], [1], [2], [0, 2]) if as_mask else ([1], [2, 0], [1, 0]):
        indices = torch.tensor(rows)
        if as_mask:
            indices = torch.zeros(3, dtype=torch.bool).index_fill(0, indices, True)
        chosen = copy.deepcopy(cache)
        chosen.batch_select_indices(indices)
        assert chosen.get_seq_length() == 6
        with depth(model, Planned([plans[row] for row in rows])):
            found, _ = read(model, ids[rows, 6:], chosen)
        assert gap(found, whole[rows, 6:]) <= host.default_exact


@pytest.mark.parametrize("host", some_hosts("llama", "gemma3"))
def test_copies_and_pickles_go_on_as_the_cache_itself(host: Host) -> None:
    plans = ("0 1 3", "1-3", "exit@2")
    model, ids = opened(host, *plans), host.inputs(batch=3, length=8)["input_ids"]
    whole = dense(model, ids)[:, 6:]
    _, cache = read(model, ids[:, :6])
    file = io.BytesIO()
    torch.save(cache, file)
    file.seek(0)
    for twin in (copy.deepcopy(cache), torch.load(file, weights_only=False)):
        assert held(twin) == held(cache)
        assert gap(read(model, ids[:, 6:], twin)[0], whole) <= host.default_exact


@pytest.mark.parametrize("host", HOLDERS)
def test_a_second_turn(host: Host) -> None:
    """`generate` again with the same plans: as if all had been said in one row."""
    model, inputs = opened(host), host.inputs(batch=3)
    kept = {"do_sample": False, "max_new_tokens": 2, "return_dict_in_generate": True}
    with executor(model, "token-wise"):
        first = model.generate(**inputs, **kept)
        more = torch.cat([first.sequences[:, -2:], inputs["input_ids"][:, :3]], 1)
        talk = host.extend(inputs, more)
        second = greedy(model, talk, **{CACHE: first[CACHE]}, max_new_tokens=3)
    assert held(first[CACHE]) == KEPT
    with executor(model, "dense"):
        assert_same(second, recomputed(host, model, talk), host.default_exact)


OTHERS = {
    "every row": Planned("all"),
    "other rows": Planned((PLANS[1], PLANS[0], PLANS[2])),
    "as many rows as before": Planned(("1-3", "0 1 3", "0 1 3")),
    "another scope": Planned(PLANS, scope="question"),
    "fewer visits": Planned(("0 1 3", *PLANS[1:])),
}


@pytest.mark.parametrize("who", ["dense", "token-wise", "auto"])
@pytest.mark.parametrize("other", OTHERS)
def test_other_plans_are_refused(other: str, who: str) -> None:
    """By name, and before anything is written."""
    host = HOSTS["llama"]
    model, ids = opened(host), host.inputs(batch=3, length=8)["input_ids"]
    whole = dense(model, ids)
    _, cache = read(model, ids[:, :6])
    with (
        depth(model, OTHERS[other]),
        executor(model, who),
        pytest.raises(HostError, match=r"holds rows \[.*\] of 3.*start a new cache, or keep"),
    ):
        model(ids[:, 6:], **{CACHE: cache})
    assert [slot.get_seq_length() for slot in cache.layers] == [6] * 4
    with executor(model, who):  # the same plans go on, whoever executes them
        found = model(ids[:, 6:], **{CACHE: cache}).logits
    assert gap(found, whole[:, 6:]) <= host.default_exact


def test_fewer_rows_and_a_detached_model_are_refused() -> None:
    host = HOSTS["llama"]
    model, ids = opened(host), host.inputs(batch=3, length=8)["input_ids"]
    _, cache = read(model, ids[:, :6])
    with pytest.raises(TrolError, match="rows"):
        model(ids[:1, 6:], **{CACHE: copy.deepcopy(cache)})
    detach(model)
    with pytest.raises(HostError, match="holds rows"):
        model(ids[:, 6:], **{CACHE: cache})


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
@pytest.mark.parametrize("kv", ["project", "hole"])
def test_a_static_cache_holds_every_row(attn: str, kv: str) -> None:
    """It lies where it is for all rows, so others may go on with it: what they read is there."""
    host = HOSTS["llama"]
    model = attach(host.build(attn), Planned(PLANS, skipped_kv=kv))
    ids = host.inputs(batch=3, length=8)["input_ids"]
    whole, after = dense(model, ids), []
    for who in ("dense", "token-wise"):
        with executor(model, who):
            model(ids[:, :2], **{CACHE: StaticCache(model.config, max_cache_len=12)})
            cache = StaticCache(model.config, max_cache_len=12)
            head = model(ids[:, :6], **{CACHE: cache}).logits
            fork = copy.deepcopy(cache)
            tail = model(ids[:, 6:], **{CACHE: cache}).logits
            assert gap(torch.cat([head, tail], 1), whole) <= host.default_exact
            if kv == "project":
                with depth(model, "all"):
                    after.append(model(ids[:, 6:], **{CACHE: fork}).logits)
    assert not after or gap(*after) <= host.default_exact
