"""Where speculation has to take care, and what it refuses."""

import threading
from functools import partial
from typing import Any

import pytest
import torch
from transformers import StaticCache

from hosts import HOSTS, Host
from hosts.host import PAD
from hosts.releases import SWITCHES_ROPE
from trol import depth, speculate
from trol.depth import Plan, detach, is_attached, trace
from trol.errors import HostError, UsageError
from trol.family import TrolForConditionalGeneration, tiny
from trol.host.names import CACHE
from trol.policies.mixer import TrolMixer

from .drafting import assert_equal, greedily, settled
from .subjects import some_hosts

pytestmark = pytest.mark.usefixtures("no_grad")


def test_the_trol_family() -> None:
    """Images in the prompt, the family's own gates, an early exit as the draft."""
    torch.manual_seed(0)
    config = tiny(60, hidden_size=32, layers=4)
    model: Any = TrolForConditionalGeneration(config).eval()
    side = config.vision_config.image_size
    marks = [config.image_token_id] * config.tokens_per_image
    ids = torch.tensor([[5, 6, *marks, 7, 8], [9, 10, *marks, 11, 12]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    inputs["attention_mask"][1, 0] = 0
    inputs["pixel_values"] = torch.randn(2, 3, side, side)
    run = partial(model.generate, **inputs, max_new_tokens=10, do_sample=False, pad_token_id=0)
    wanted = run()
    for draft in ("exit@2", "0 2", TrolMixer()):
        with speculate(model, draft, tokens=3) as stats:
            assert run().tolist() == wanted.tolist()
        assert stats.rounds


@pytest.mark.parametrize("kind", ["longrope"] * SWITCHES_ROPE + ["dynamic"])
def test_rope_that_changes_with_the_length(kind: str) -> None:
    """Rounds keep clear of the length at which plain steps would rotate otherwise."""
    host = HOSTS["phi3" if kind == "longrope" else "llama"]
    config: Any = host.config()
    rope: dict[str, Any] = {"rope_type": kind, "rope_theta": 10000.0}
    if kind == "longrope":
        config.original_max_position_embeddings = 16
        rope |= {"short_factor": [1.0] * 4, "long_factor": [3.0] * 4}
        rope["original_max_position_embeddings"] = 16
    else:
        config.max_position_embeddings = 16
        rope["factor"] = 4.0
    config.rope_parameters = rope
    model = type(host.build())(config).eval()
    model.load_state_dict(host.build().state_dict())
    model.generation_config.pad_token_id = PAD
    model.generation_config.eos_token_id = None
    inputs = host.inputs()
    run = partial(greedily, model, inputs, max_new_tokens=20)
    wanted = run()
    with speculate(model, "all", tokens=4) as stats:
        assert_equal(run(), wanted, 1e-4)
    assert 0 < stats.drafted < 4 * stats.rounds


def test_another_policy_for_a_while() -> None:
    """`trol.depth` inside the block changes what verifies, not what drafts; traces see both."""
    model, inputs = settled(HOSTS["llama"], "trol"), HOSTS["llama"].inputs()
    with depth(model, "0-2"):
        wanted = greedily(model, inputs)
    with speculate(model, "exit@1", tokens=2), depth(model, "0-2"), trace(model) as seen:
        got = greedily(model, inputs)
    assert_equal(got, wanted, 1e-4)
    visited = seen.visits.sum(-1).squeeze()
    assert visited[0] > visited[1] == visited[2] > visited[3] == 0


def test_threads_draft_for_themselves() -> None:
    model, inputs = settled(HOSTS["llama"], "trol"), HOSTS["llama"].inputs(length=12)
    wanted = model.generate(**inputs, max_new_tokens=8, do_sample=False).tolist()
    wrong, rounds, start = [], [], threading.Barrier(3)

    def work(draft: str | None) -> None:
        torch.set_grad_enabled(False)
        start.wait()
        for _ in range(8):
            with speculate(model, draft or "all") as stats:
                if model.generate(**inputs, max_new_tokens=8, do_sample=False).tolist() != wanted:
                    wrong.append(draft)
            rounds.append(stats.rounds)

    drafts = ("exit@1", "0 3", "all")
    threads = [threading.Thread(target=work, args=(draft,)) for draft in drafts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert len(rounds) == 24
    assert len(set(rounds)) > 1


def test_an_exception_leaves_the_model_as_it_was() -> None:
    model, inputs = settled(HOSTS["llama"], "trol"), HOSTS["llama"].inputs()
    wanted = greedily(model, inputs)
    bare = HOSTS["llama"].build()
    for one in (model, bare):
        with pytest.raises(ZeroDivisionError), speculate(one, "exit@1"):
            one.generate(**inputs, max_new_tokens=9, stopping_criteria=[_Failing()])
    assert not is_attached(bare)
    assert_equal(greedily(model, inputs), wanted, 0)
    assert is_attached(detach(model)) is False


class _Failing:
    def __call__(self, ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        return torch.tensor([ids.shape[1] / (13 - ids.shape[1]) < 0])


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "beams": ({"num_beams": 2}, "num_beams=1"),
    "no_cache": ({"use_cache": False}, "use_cache"),
    "static": ({"cache_implementation": "static"}, "dynamic cache"),
    "states": ({"output_hidden_states": True, "return_dict_in_generate": True}, "hidden_states"),
    "lookup": ({"prompt_lookup_num_tokens": 2}, "assisted"),
    "strings": ({"stop_strings": "x"}, "StopStringCriteria"),
    "another": ({"custom_generate": print}, "drop one"),
    "guidance": ({"guidance_scale": 2.0}, "exactly once"),
    "synced": ({"synced_gpus": True}, "ranks"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_drafted_is_refused(case: str) -> None:
    model, inputs = HOSTS["llama"].build(), HOSTS["llama"].inputs()
    settings, cure = REFUSED[case]
    with (
        speculate(model, "exit@1") as stats,
        pytest.raises((UsageError, HostError), match=cure),
    ):
        model.generate(**inputs, max_new_tokens=4, **settings)
    assert stats.rounds == 0


@pytest.mark.parametrize(
    ("draft", "settings", "cure"),
    [
        ("exit@9", {}, "4 layers"),
        (Plan([1] * 6), {}, "4 layers"),
        ("exit@1", {"tokens": 0}, "1 or more"),
        ("exit@1", {"tokens": 1.5}, "tokens is 1.5; give a whole number, 1 or more"),
        ("exit@1", {"confidence": 1.5}, "confidence"),
        ("trol_mixer", {}, "parameters"),
        ("nothing", {}, "unknown policy"),
    ],
)
def test_a_draft_that_does_not_fit_is_refused(
    draft: Any, settings: dict[str, Any], cure: str
) -> None:
    model = HOSTS["llama"].build()
    with pytest.raises(UsageError, match=cure), speculate(model, draft, **settings):
        pass
    assert not is_attached(model)


def test_layers_that_the_model_never_runs_cannot_draft() -> None:
    model, inputs = settled(HOSTS["llama"], "skip"), HOSTS["llama"].inputs()
    with speculate(model, "exit@2"), pytest.raises(UsageError, match=r"visits layers \[1\]"):
        model.generate(**inputs, max_new_tokens=4)


@pytest.mark.parametrize("host", some_hosts("qwen3_next", "falcon_h1"))
def test_recurrent_hosts_are_refused(host: Host) -> None:
    model = host.build()
    with pytest.raises(HostError, match="recurrent state"), speculate(model, "exit@1"):
        pass
    assert not is_attached(model)


def test_a_cache_that_cannot_be_cut_is_refused() -> None:
    model, inputs = HOSTS["llama"].build(), HOSTS["llama"].inputs()
    static = StaticCache(config=model.config, max_cache_len=40)
    with speculate(model, "exit@1"), pytest.raises(HostError, match="StaticCache"):
        model.generate(**inputs, max_new_tokens=4, **{CACHE: static})
