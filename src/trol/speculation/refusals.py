"""What speculation cannot do rightly, refused by name with the cure."""

from __future__ import annotations

from typing import Any

from trol.depth import AbstractPolicy
from trol.errors import HostError, UsageError
from trol.host.cache import can_take_back
from trol.host.generation import STEPWISE

MODES = ("greedy_search", "sample")

NOT_GIVEN = ("output_attentions", "output_hidden_states")
"""Parts of a returned dictionary that drafting does not keep."""

ELSEWHERE = "call generate outside `with trol.speculate`"


def check_stack(stack: Any) -> None:
    """Raises `HostError` where tokens cannot be taken back."""
    if stack.depth_recurrent:
        raise HostError(
            f"{stack.config.model_type} keeps a recurrent state, which cannot take drafted tokens "
            f"back; {ELSEWHERE}."
        )


def check_draft(stack: Any, draft: AbstractPolicy) -> None:
    """Raises `UsageError` where the draft needs layers that the model's own policy never runs."""
    own = stack.depth_policy_in_force()
    missing = sorted(stack.depth_absent(own) - stack.depth_absent(draft))
    if missing:
        raise UsageError(
            f"the draft visits layers {missing}, which the model's own policy {own!r} skips, so "
            "they hold no keys and values; name a draft without these layers."
        )


def check_arguments(host: Any, given: dict[str, Any]) -> None:
    """Raises `UsageError` for what `generate` would not hand to a decoding loop of ours."""
    for name in ("custom_generate", "assistant_model"):
        if given.get(name) is not None:
            raise UsageError(f"{name} and trol.speculate both decode; drop one of them.")
    config = given.get("generation_config") or host.generation_config
    if given.get("stop_strings", config.stop_strings) is not None:
        raise UsageError(
            "stop_strings do not reach a decoding loop of ours; pass "
            "stopping_criteria=[StopStringCriteria(tokenizer, stop_strings)] instead."
        )
    if given.get("synced_gpus"):
        raise UsageError(
            "synced_gpus: the ranks of a sharded model would make different numbers of passes; "
            f"{ELSEWHERE}."
        )


def check_config(config: Any, kwargs: dict[str, Any], processors: Any) -> None:
    """Raises `UsageError` where this way to generate has no drafts."""
    mode = config.get_generation_mode()
    if mode not in MODES:
        raise UsageError(
            f"drafts are verified in greedy decoding and sampling, not in {mode.value}; set "
            f"num_beams=1 and no other strategy, or {ELSEWHERE}."
        )
    if not kwargs.get("use_cache"):
        raise UsageError("use_cache=False leaves no keys and values to draft on; set use_cache.")
    for name in NOT_GIVEN:
        if config.return_dict_in_generate and getattr(config, name):
            raise UsageError(f"{name} is not given together with drafts; drop it, or {ELSEWHERE}.")
    for processor in processors:
        if isinstance(processor, STEPWISE):
            raise UsageError(
                f"{type(processor).__name__} must see every token exactly once, which drafts break;"
                f" {ELSEWHERE}."
            )


def check_cache(cache: Any) -> None:
    """Raises `HostError` where tokens cannot be cut off this cache again."""
    layers = getattr(cache, "layers", None)
    if layers is None or cache.offloading or not all(can_take_back(layer) for layer in layers):
        raise HostError(
            f"drafted tokens cannot be cut off this {type(cache).__name__} (static, quantised and "
            "offloaded caches stay as they are); use the dynamic cache, which is the default."
        )
