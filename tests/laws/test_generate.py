"""Every way to decode agrees with the plain loop."""

import threading
import warnings

import pytest
import torch
from transformers import GenerationConfig, pipeline

from hosts import CHECKS, HOSTS, Host
from hosts.checks import greedy
from hosts.host import VOCABULARY
from hosts.releases import BARE_ONLY
from trol import depth
from trol.depth import attach, detach, trace
from trol.errors import HostError
from trol.host.names import CACHE
from trol.policies.mixer import TrolMixer
from trol.policies.planned import Planned

from .subjects import (
    assert_same,
    attach_settled,
    key_cases,
    made,
    policy_cases,
    recomputed,
    some_hosts,
)

pytestmark = pytest.mark.usefixtures("no_grad")


WAYS = {
    "chunked_prefill": {"prefill_chunk_size": 4},
    "static_cache": {"cache_implementation": "static", "disable_compile": True},
    "assisted": {"prompt_lookup_num_tokens": 2},
    "early_exit_assistant": {"assistant_early_exit": 2},
}
"""The zoo's checks of decoding: the prompt four tokens at a time; a static cache; drafts looked up
in the prompt, or made by the model's own first two layers."""


@pytest.mark.parametrize(("host", "attn", "name"), key_cases(every_attn=False))
def test_ways_to_prefill_and_draft(host: Host, attn: str, name: str) -> None:
    """Each way that the bare host can decode gives the plain loop's tokens and logits."""
    model, inputs = attach_settled(host.build(attn), made(name)), host.inputs()
    expected = recomputed(host, model, inputs)
    cannot = (*host.cannot, *BARE_ONLY.get(host.name, ()))
    ways = [settings for way, settings in WAYS.items() if way not in cannot]
    assert ways
    for settings in ways:
        assert_same(greedy(model, inputs, **settings), expected, host.default_exact)


@pytest.mark.parametrize(("host", "name"), policy_cases("llama", "mistral", "gpt2", "qwen3_vl"))
def test_every_policy_every_way(host: Host, name: str) -> None:
    """All ways of the zoo, and beams: those found with a cache are those found without."""
    model = attach_settled(host.build(), made(name))
    for check in ("chunked_prefill", "static_cache", "assisted", "early_exit_assistant", "beams"):
        if check in host.cannot:
            continue
        assert CHECKS[check](host, model) <= host.default_exact


@pytest.mark.parametrize("name", ["trol", "trol_all", "skip_first", "skip_answer"])
@pytest.mark.parametrize("host", some_hosts(*HOSTS))
def test_beams(host: Host, name: str) -> None:
    model = attach_settled(host.build(), made(name))
    inputs = host.inputs(batch=2)
    search = {"num_beams": 3, "max_new_tokens": 4, "do_sample": False, "num_return_sequences": 2}
    cached = model.generate(**inputs, **search)
    assert cached.tolist() == model.generate(**inputs, **search, use_cache=False).tolist()
    detach(model)
    assert cached.tolist() != model.generate(**inputs, **search).tolist()


@pytest.mark.parametrize(("host", "name"), policy_cases("llama", "idefics3"))
def test_sampling_with_a_seed(host: Host, name: str) -> None:
    """The same seed draws the same tokens with a cache and without; another seed does not."""
    model, inputs = attach_settled(host.build(), made(name)), host.inputs(batch=2)
    drawn = []
    for seed, settings in ((7, {}), (7, {"use_cache": False}), (8, {})):
        torch.manual_seed(seed)
        draw = {"do_sample": True, "top_k": 5, "temperature": 2.0, "max_new_tokens": 6}
        drawn.append(model.generate(**inputs, **draw, **settings).tolist())
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.parametrize(
    "target", ["trol", "trol_all", "trol_answer", "skip_answer", "repeat", None]
)
@pytest.mark.parametrize("draft", ["trol", "exit", "skip_question", None])
def test_assistant_models(target: str | None, draft: str | None) -> None:
    """Drafts by another model change nothing, whichever of the two has a policy."""
    host = HOSTS["llama"]
    model, helper = host.build(), host.build()
    inputs = host.inputs()
    if target:
        attach_settled(model, made(target))
    if draft:
        attach_settled(helper, made(draft))
    expected = greedy(model, inputs, max_new_tokens=6)
    assert_same(greedy(model, inputs, max_new_tokens=6, assistant_model=helper), expected, 5e-5)
    dropped = model.generate(**inputs, max_new_tokens=6, do_sample=False, assistant_model=helper)
    assert dropped[:, -6:].tolist() == expected[0].tolist()


def test_an_assistant_with_the_same_policy_is_always_right() -> None:
    """The assistant's prompt grows with every draft; its question stays the caller's prompt."""
    host = HOSTS["llama"]
    model, helper = (attach_settled(host.build(), made("trol")) for _ in range(2))
    helper.generation_config.num_assistant_tokens = 3
    helper.generation_config.num_assistant_tokens_schedule = "constant"
    helper.generation_config.assistant_confidence_threshold = 0.0
    with trace(model) as seen:
        model.generate(**host.inputs(), max_new_tokens=8, do_sample=False, assistant_model=helper)
    # 9 of the prompt; then two rounds of 3 drafts and one of 1, none refused, each with its root.
    assert seen.visits.shape[-1] <= 9 + 8
    assert seen.visits[0, 0, :9].tolist() == [2] * 9
    assert set(seen.visits[0, 0, 9:].tolist()) == {1}


@pytest.mark.parametrize("host", some_hosts("llama", "qwen3_vl"))
def test_a_generation_config_object(host: Host) -> None:
    """Whether the cache is handed out may stand in a GenerationConfig too."""
    model, inputs = attach_settled(host.build(), made("trol")), host.inputs()
    settings = GenerationConfig(
        max_new_tokens=3,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
        pad_token_id=0,
    )
    said = model.generate(**inputs, generation_config=settings)
    assert_same(
        (said.sequences[:, -3:], torch.stack(said.logits, 1)),
        recomputed(host, model, inputs),
        host.default_exact,
    )
    assert said[CACHE].planes  # kept for the caller


def test_two_threads_do_not_mix() -> None:
    """One model, two plans and the attached policy, at the same time, over and over."""
    host = HOSTS["llama"]
    model, inputs = attach_settled(host.build(), made("trol")), host.inputs(length=12)
    plans = {"skip": "0 3", "repeat": "all:2", "attached": None}
    alone = {name: _under(model, inputs, plan) for name, plan in plans.items()}
    assert len({str(tokens) for tokens in alone.values()}) == 3
    start, mixed = threading.Barrier(len(plans)), []

    def work(name: str) -> None:
        torch.set_grad_enabled(False)
        start.wait()
        for _ in range(15):
            if _under(model, inputs, plans[name]) != alone[name]:
                mixed.append(name)

    threads = [threading.Thread(target=work, args=(name,)) for name in plans]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not mixed


def _under(model, inputs, plan: str | None) -> list:
    settings = {"max_new_tokens": 5, "do_sample": False}
    if plan is None:
        return model.generate(**inputs, **settings).tolist()
    with depth(model, plan):
        return model.generate(**inputs, **settings).tolist()


def test_text_generation_pipeline() -> None:
    host = HOSTS["llama"]
    model, tokenizer = host.build(), _tokenizer()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        speak = pipeline("text-generation", model=model, tokenizer=tokenizer)
    ask = {"max_new_tokens": 5, "do_sample": False, "return_full_text": False}
    texts = ["w10 w20 w30", "w40 w50"]
    bare = [speak(text, **ask)[0]["generated_text"] for text in texts]
    attach_settled(model, made("trol"))
    alone = [speak(text, **ask)[0]["generated_text"] for text in texts]
    batched = [out[0]["generated_text"] for out in speak(texts, **ask, batch_size=2)]
    assert alone == batched != bare
    ids = tokenizer(texts[0], return_tensors="pt")
    new = model.generate(**ids, max_new_tokens=5, do_sample=False)[0, 3:]
    assert tokenizer.decode(new) == alone[0].strip()


def _tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="w0", unk_token="w0", padding_side="left"
    )


@pytest.mark.parametrize(
    "door", ["generate_batch", "init_continuous_batching", "continuous_batching_context_manager"]
)
def test_continuous_batching_is_refused(door: str) -> None:
    model = attach(HOSTS["llama"].build(), TrolMixer())
    with pytest.raises(HostError, match="continuous batching"):
        getattr(model, door)([[5, 6, 7]])
    assert hasattr(detach(model), door)  # the host's own again


def test_a_plan_for_a_while_in_generate() -> None:
    host = HOSTS["llama"]
    model, inputs = attach_settled(host.build(), made("trol")), host.inputs()
    before = greedy(model, inputs)
    with depth(model, "0 2-3"):
        inside = greedy(model, inputs)
        with depth(model, "exit@1"):
            nested = greedy(model, inputs)
        assert_same(greedy(model, inputs), inside, 0)
    assert_same(greedy(model, inputs), before, 0)
    for plan, got in (("0 2-3", inside), ("exit@1", nested)):
        assert_same(greedy(attach(host.build(), Planned(plan)), inputs), got, 5e-5)
