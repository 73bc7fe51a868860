"""`with trol.speculate(model, draft)`, and what speculation refuses, by name and with the cure."""

from collections.abc import Generator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from trol.depth import PolicyLike
from trol.depth.attachment import decoding as decoding_with
from trol.depth.policy import check_share, check_whole, resolve
from trol.errors import HostError, UsageError
from trol.host.generation import STEPWISE, decoding, generate_output
from trol.host.layers import find_decoder
from trol.host.names import cache_among
from trol.speculation.loop import ForwardPasses, Loop, Speculation, check_cache

ELSEWHERE = "call generate outside `with trol.speculate`"


@contextmanager
def speculate(
    model: nn.Module,
    draft: PolicyLike = "exit@4",
    *,
    tokens: int = 4,
    confidence: float | None = None,
) -> Generator[Speculation]:
    """Has `generate` draft with another policy of the same model and verify with its own.

    A round drafts k tokens, one after another, on a fork of the cache, so that they attend to the
    model's own keys and values of all that is verified. One pass over these k tokens then tells
    how many a of them the model would have generated, and the next one as well: a + 1 tokens.
    Greedy tokens are those of plain `generate`, up to the rounding of equal logits; sampled ones
    are of the same distribution (https://arxiv.org/abs/2211.17192, algorithm 1; drafting by
    skipping layers: https://arxiv.org/abs/2309.08168). In a batch all rows advance by what the
    slowest row gained, and the others keep what they have verified. RoPE that changes with the
    length is left to plain steps where a round could cross its switch, and `dynamic` RoPE beyond
    it.

    Args:
        model: a model, plain or attached; the policy it carries is its own.
        draft: plan text, a plan, a policy or the name of one.
        tokens: k, at least 1.
        confidence: ends a draft early, in [0, 1); None for always k tokens.

    Yields:
        The figures of all `generate` calls of this thread inside the block.

    Raises:
        UsageError: the draft does not fit, or `tokens` or `confidence` is out of range; from
            `generate`: beams, or something else that cannot be drafted.
        HostError: the model keeps a recurrent state; from `generate`: a cache that cannot be cut.
    """
    check_whole("tokens", tokens, 1)
    if confidence is not None:
        check_share("confidence", confidence)
    stats = Speculation(resolve(draft), tokens, confidence)
    with decoding_with(model, partial(_with_loop, stats), stats.draft):
        stack: Any = find_decoder(model)
        if stack.depth_recurrent:
            raise HostError(
                f"{stack.config.model_type} keeps a recurrent state, which cannot take drafted "
                f"tokens back; {ELSEWHERE}."
            )
        yield stats


def _with_loop(stats: Speculation, host: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of `generate` with the drafting loop among them."""
    stack: Any = find_decoder(host)
    _check_arguments(host, kwargs)
    own = stack.depth_policy_in_force()
    missing = sorted(stack.depth_absent(own) - stack.depth_absent(stats.draft))
    if missing:
        raise UsageError(
            f"the draft visits layers {missing}, which the model's own policy {own!r} skips, so "
            "they hold no keys and values; name a draft without these layers."
        )
    loop = partial(_decode, stack=stack, stats=stats, streamer=kwargs.get("streamer"))
    return {**kwargs, "custom_generate": loop}


def _decode(
    model: Any,
    input_ids: Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    *,
    stack: Any,
    stats: Speculation,
    streamer: Any = None,
    **model_kwargs: Any,
) -> Any:
    """What `generate` gives, in fewer passes: a `custom_generate` of transformers.

    Raises:
        UsageError, HostError: drafts cannot be verified here; before anything has run.
    """
    _check_config(generation_config, model_kwargs, logits_processor)
    check_cache(cache_among(model_kwargs))
    loop = Loop(
        passes=ForwardPasses(model, model_kwargs),
        stack=stack,
        stats=stats,
        processor=logits_processor,
        criteria=stopping_criteria,
        config=generation_config,
        streamer=streamer,
        ids=input_ids,
    )
    with decoding(model):
        loop.run()
    if streamer is not None:
        streamer.end()
    if not generation_config.return_dict_in_generate:
        return loop.ids
    scores = tuple(loop.scores) if generation_config.output_scores else None
    logits = tuple(loop.logits) if generation_config.output_logits else None
    return generate_output(loop.ids, loop.passes.cache, scores=scores, logits=logits)


def _check_arguments(host: Any, arguments: dict[str, Any]) -> None:
    """Raises `UsageError` for what `generate` would not hand to a decoding loop of ours."""
    for name in ("custom_generate", "assistant_model"):
        if arguments.get(name) is not None:
            raise UsageError(f"{name} and trol.speculate both decode; drop one of them.")
    config = arguments.get("generation_config") or host.generation_config
    if arguments.get("stop_strings", config.stop_strings) is not None:
        raise UsageError(
            "stop_strings do not reach a decoding loop of ours; pass "
            "stopping_criteria=[StopStringCriteria(tokenizer, stop_strings)] instead."
        )
    if arguments.get("synced_gpus"):
        raise UsageError(
            "synced_gpus: the ranks of a sharded model would make different numbers of passes; "
            f"{ELSEWHERE}."
        )


def _check_config(config: Any, kwargs: dict[str, Any], processors: Any) -> None:
    """Raises `UsageError` where this way to generate has no drafts."""
    mode = config.get_generation_mode()
    if mode not in ("greedy_search", "sample"):
        raise UsageError(
            f"drafts are verified in greedy decoding and sampling, not in {mode.value}; set "
            f"num_beams=1 and no other strategy, or {ELSEWHERE}."
        )
    if not kwargs.get("use_cache"):
        raise UsageError("use_cache=False leaves no keys and values to draft on; set use_cache.")
    for name in ("output_attentions", "output_hidden_states"):
        if config.return_dict_in_generate and getattr(config, name):
            raise UsageError(f"{name} is not given together with drafts; drop it, or {ELSEWHERE}.")
    for processor in processors:
        if isinstance(processor, STEPWISE):
            raise UsageError(
                f"{type(processor).__name__} must see every token exactly once, which drafts break;"
                f" {ELSEWHERE}."
            )
