"""Compiled decoding on static caches: one graph, no recompiling, tensors that stay in place."""

import pytest
import torch
from torch import Tensor
from transformers import CompileConfig, PreTrainedModel, StaticCache

from hosts import HOSTS, Host
from hosts.checks import greedy
from hosts.host import Inputs
from hosts.releases import GRAPHS
from trol.depth import AbstractPolicy, planes, prepare_cache
from trol.depth.planes import PlanedCache
from trol.depth.policy import Plain
from trol.errors import HostError, UsageError
from trol.host.cache import is_static
from trol.host.names import CACHE
from trol.policies.exits import EarlyExit
from trol.policies.mixer import TrolMixer
from trol.policies.planned import Planned
from trol.policies.router import Router

from .subjects import NO_HOLES, attach_settled, gap, made, some_hosts, spoken

pytestmark = pytest.mark.usefixtures("no_grad")

KINDS: dict[str, AbstractPolicy] = {
    "plain": Plain(),
    "trol": TrolMixer(),
    "trol_all": TrolMixer(3, scope="all"),
    "tau": TrolMixer(scope="all", tau=0.5),
    "skip": Planned("1"),
    "skip_answer": Planned("1:2", scope="answer"),
    "skip_kept": Planned("1", keep_first=2),
    "exit": EarlyExit("margin", 0.3, scope="all"),
    "hole": Planned("0", scope="answer", skipped_kv="hole"),
    "router": Router(["0", "all"], hidden=8),
}
"""For stacks of two layers."""

NOT_ONE_GRAPH = {
    ("falcon_h1", "skip_answer"): "its layers ask what their slot of the cache is, which the "
    "compiler asks the slot of a visit in another way; transformers does not promise one graph "
    "for it either"
}
"""Hosts, and policies, whose decoding breaks into several graphs."""

EVERY = [
    pytest.param(host, name, id=f"{host.name}-{name}")
    for host in HOSTS.values()
    for name in ("trol", "trol_all", "trol_answer", "skip_answer", "hole_answer")
    if (host.name, name) not in NOT_ONE_GRAPH
    and not (name == "hole_answer" and host.name in NO_HOLES)
]

ROOM = 24


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def graphs() -> int:
    """How many graphs were compiled since the test began."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def one_graph(backend: str = "eager") -> CompileConfig:
    """Has `generate` compile its decoding, on a CPU too, and bear no graph break."""
    config = CompileConfig(fullgraph=True, backend=backend, mode=None)
    config._compile_all_devices = True
    return config


def decoded(
    model: PreTrainedModel, inputs: Inputs, config: CompileConfig | None, new: int = 6
) -> tuple[Tensor, Tensor]:
    """`generate` on a static cache, compiled or, without a config, not."""
    how = {"disable_compile": True} if config is None else {"compile_config": config}
    settings = {"cache_implementation": "static", "max_new_tokens": new}
    return spoken(model, inputs, **settings, **how)


def assert_decodes_compiled(
    host: Host, policy: AbstractPolicy, *, layers: int, bare: int, backend: str = "eager"
) -> None:
    """Decoding takes no more graphs than the bare host's, and gives the uncompiled answers."""
    inputs = host.inputs(batch=2, length=5)
    model = attach_settled(host.build(layers=layers), policy)
    expected = decoded(model, inputs, None)
    before = graphs()
    tokens, logits = decoded(model, inputs, one_graph(backend))
    assert tokens.tolist() == expected[0].tolist()
    assert gap(logits, expected[1]) <= host.default_exact
    # What a policy sums over all positions grows by one each step, which is seen at the second.
    grows = isinstance(policy, Router)
    assert 1 <= graphs() - before <= bare + grows


SLOW = ("plain", "tau", "skip", "exit", "router")


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in KINDS],
)
def test_generate_compiles_its_decoding(name: str) -> None:
    """One graph for all steps."""
    assert_decodes_compiled(HOSTS["llama"], KINDS[name], layers=2, bare=GRAPHS)


@pytest.mark.slow
@pytest.mark.filterwarnings(  # torch's own, of a function of Bloom's own
    "ignore:<class 'torch.autograd.function.Function'> should not:DeprecationWarning"
)
@pytest.mark.parametrize(("host", "name"), EVERY)
def test_generate_compiles_its_decoding_on_every_host(host: Host, name: str) -> None:
    decoded(host.build(), host.inputs(batch=2, length=5), one_graph())
    bare = graphs()
    torch._dynamo.reset()
    assert_decodes_compiled(host, made(name), layers=4, bare=bare, backend="aot_eager")


@pytest.mark.slow
@pytest.mark.parametrize(("name", "policy"), NOT_ONE_GRAPH)
def test_hosts_that_break_the_graph_are_right_in_pieces(name: str, policy: str) -> None:
    host = HOSTS[name]
    model, inputs = attach_settled(host.build(), made(policy)), host.inputs(length=5)
    expected = decoded(model, inputs, None)
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"VisitCacheLayer|Observed exception"):
        decoded(model, inputs, one_graph())
    pieces = one_graph()
    pieces.fullgraph = False
    told = decoded(model, inputs, pieces)
    assert told[0].tolist() == expected[0].tolist()
    assert gap(told[1], expected[1]) <= host.default_exact


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is:DeprecationWarning")
@pytest.mark.parametrize("name", ["trol_all", "skip_answer"])
def test_inductor_decodes_as_python_does(name: str) -> None:
    host = HOSTS["llama"]
    model, inputs = attach_settled(host.build(layers=2), KINDS[name]), host.inputs(length=5)
    expected = decoded(model, inputs, None)
    told = decoded(model, inputs, one_graph("inductor"))
    assert told[0].tolist() == expected[0].tolist()
    assert gap(told[1], expected[1]) <= host.default_exact


@pytest.mark.parametrize(
    "policy",
    [
        pytest.param(TrolMixer(), id="question"),
        pytest.param(Planned("0:2", scope="answer"), id="answer", marks=pytest.mark.slow),
    ],
)
def test_a_prepared_cache_takes_a_whole_talk_compiled(policy: AbstractPolicy) -> None:
    """Question, answer and question again, then used anew: one graph to read, one to say."""
    host = HOSTS["llama"]
    model, inputs = attach_settled(host.build(layers=1), policy), host.inputs(batch=2)
    ids, roles = inputs["input_ids"], torch.zeros_like(inputs["input_ids"])
    roles[:, 5:8] = 1
    whole = model(ids, assistant_masks=roles, use_cache=False).logits
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    cache = StaticCache(model.config, max_cache_len=ROOM)
    cache.early_initialization(2, 2, 8, torch.float32, ids.device)
    prepare_cache(model, cache)
    for _ in range(2):
        parts = [
            compiled(ids[:, cut], assistant_masks=roles[:, cut], **{CACHE: cache}).logits
            for cut in (slice(0, 5), *(slice(i, i + 1) for i in range(5, 9)))
        ]
        assert gap(torch.cat(parts, 1), whole) <= host.default_exact
        cache.reset()
    assert graphs() == 2


@pytest.mark.parametrize("policy", [TrolMixer(), Planned("0:2", scope="answer")])
def test_the_roles_of_tokens_compile_nothing_anew(policy: AbstractPolicy) -> None:
    """Whoever is question, or answer, or all of one: the graph is the same."""
    host = HOSTS["llama"]
    model, inputs = attach_settled(host.build(layers=1), policy), host.inputs(batch=2)
    ids, nobody = inputs["input_ids"], torch.zeros_like(inputs["input_ids"])
    some, others = nobody.clone(), nobody.clone()
    some[:, 4:6], others[0, 2:] = 1, 1
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for roles in (some, others, nobody, 1 - nobody):
        told = compiled(ids, assistant_masks=roles, use_cache=False).logits
        expected = model(ids, assistant_masks=roles, use_cache=False).logits
        assert gap(told, expected) <= host.default_exact
    assert graphs() == 1


def test_an_unprepared_cache_is_refused_with_the_cure() -> None:
    model = attach_settled(HOSTS["llama"].build(layers=1), TrolMixer())
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    ids = HOSTS["llama"].inputs()["input_ids"]
    with pytest.raises(Exception, match=r"prepare_cache\(model, cache\)"):
        compiled(ids, **{CACHE: StaticCache(model.config, max_cache_len=ROOM)})
    cache = prepare_cache(model, StaticCache(model.config, max_cache_len=ROOM))
    told = compiled(ids, **{CACHE: cache}).logits
    assert gap(told, model(ids, use_cache=False).logits) <= HOSTS["llama"].default_exact


def test_what_cannot_be_prepared_is_refused() -> None:
    model = HOSTS["llama"].build(layers=1)
    cache = StaticCache(model.config, max_cache_len=ROOM)
    with pytest.raises(UsageError, match=r"call trol.attach\(model, policy\) first"):
        prepare_cache(model, cache)
    attach_settled(model, Plain())
    with pytest.raises(HostError, match="got a tuple as the cache"):
        prepare_cache(model, ())
    assert type(prepare_cache(model, cache)) is StaticCache  # a plain model's is left alone


@pytest.mark.parametrize(
    ("host", "name"),
    [("gemma3", "trol_all"), ("gemma3", "trol_answer"), ("llama", "hole_answer")],
)
def test_planes_stay_where_they_are(host: str, name: str) -> None:
    """CUDA graphs write to addresses: all that decoding writes is marked, and never moves."""
    model, inputs = attach_settled(HOSTS[host].build(), made(name)), HOSTS[host].inputs(batch=2)
    ids = inputs["input_ids"]
    cache = StaticCache(model.config, max_cache_len=ROOM)
    model(ids, **{CACHE: cache})
    prepare_cache(model, cache)  # for answers: planes that start from what was read
    seen = {k: t.data_ptr() for k, t in _written(cache).items()}
    assert seen
    for _ in range(3):
        token = {"input_ids": ids[:, :1], "assistant_masks": torch.ones_like(ids[:, :1])}
        model(**token, **{CACHE: cache})
    assert {k: t.data_ptr() for k, t in _written(cache).items()} == seen


def _written(cache: PlanedCache) -> dict[object, Tensor]:
    """The tensors of the planes that decoding writes; all must be marked for the compiler."""
    found = {
        (place, name): value
        for place, slot in cache.planes.items()
        for name, value in vars(slot).items()
        if isinstance(value, Tensor) and is_static(slot)
    }
    assert all(hasattr(t, "_dynamo_static_input_type") for t in found.values())
    return found


@pytest.mark.parametrize("name", ["trol", "trol_all", "trol_answer", "skip_answer"])
def test_decoding_copies_no_plane(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planes are forked while the question is read, or before the first answer token."""
    host, forks = HOSTS["llama"], []
    fork = planes.copy_on_write
    monkeypatch.setattr(planes, "copy_on_write", lambda slot: forks.append(slot) or fork(slot))
    model, inputs = attach_settled(host.build(), made(name)), host.inputs()
    counts = []
    for new in (2, 6):
        forks.clear()
        decoded(model, inputs, None, new)
        counts.append(len(forks))
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize("host", some_hosts("llama", "mistral", "qwen3_next"))
@pytest.mark.parametrize("name", ["trol", "trol_all", "trol_answer", "repeat"])
def test_beams_on_a_static_cache(host: Host, name: str) -> None:
    """Planes of a static cache are reordered with it."""
    model, inputs = attach_settled(host.build(), made(name)), host.inputs()
    beams = {"num_beams": 3, "max_new_tokens": 5}
    static, _ = greedy(model, inputs, cache_implementation="static", disable_compile=True, **beams)
    assert static.tolist() == greedy(model, inputs, use_cache=False, **beams)[0].tolist()


def test_a_compiled_prefill_in_chunks() -> None:
    """`generate` compiles the reading of a prompt that it cuts into chunks."""
    host = HOSTS["llama"]
    model = attach_settled(host.build(layers=1), TrolMixer())
    inputs = host.inputs(length=8)
    expected = decoded(model, inputs, None, 3)
    settings = {"cache_implementation": "static", "prefill_chunk_size": 4}
    told = spoken(model, inputs, **settings, compile_config=one_graph())
    assert told[0].tolist() == expected[0].tolist()
    assert gap(told[1], expected[1]) <= host.default_exact
