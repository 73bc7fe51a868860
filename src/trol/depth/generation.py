"""The mixin of the model that trol is attached to: it knows question from answer."""

from __future__ import annotations

import inspect
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn

from trol.depth.call import (
    STEP,
    Step,
    ambience_of,
    generating,
    outermost_prompt,
    prompt_of,
    told,
)
from trol.depth.families import find_decoder
from trol.depth.planes import prepare
from trol.depth.readout import Readout
from trol.depth.roles import IGNORED_LABEL, Prompt
from trol.depth.saving import mark
from trol.depth.specialise import Specialised
from trol.depth.stack import StackMixin
from trol.errors import HostError, UsageError


class HostMixin(Specialised):
    """The model that trol is attached to: knows question from answer."""

    modules: Any
    config: Any
    generation_config: Any

    def forward(
        self,
        *args: Any,
        depth_step: Step | None = None,
        assistant_masks: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """The host's own forward pass; `assistant_masks` or `labels` tell who is answer."""
        if depth_step is None:
            depth_step = told(assistant_masks, kwargs.get("labels"), kwargs.get("attention_mask"))
        notes: dict[Any, Any] = {}
        last_only = self._reads_last_only(kwargs)
        token = STEP.set(
            replace(depth_step, last_only=last_only, readout=Readout(self), notes=notes)
        )
        try:
            out = super().forward(*args, **kwargs)  # type: ignore[misc]
        finally:
            STEP.reset(token)
        if not notes or kwargs.get("labels") is None:
            return out
        stack: Any = find_decoder(cast(nn.Module, self))
        penalty = stack.depth_policy_in_force().penalty(notes)
        return out if penalty is None else _penalised(out, penalty, kwargs)

    def _reads_last_only(self, kwargs: dict[str, Any]) -> bool:
        shown = ("output_hidden_states", "output_attentions")
        if any(kwargs.get(name, getattr(self.config, name, False)) for name in shown):
            return False
        kept = kwargs.get("logits_to_keep", 0)
        return isinstance(kept, int) and kept == 1

    def generate(
        self, inputs: Tensor | None = None, *args: Any, assistant_masks: Any = None, **kwargs: Any
    ) -> Any:
        """The host's own `generate`: the prompt is question, what is new is answer."""
        length = _prompt_length(inputs, kwargs)
        outer = outermost_prompt()
        if outer is not None:  # as the assistant of another generate, whose prompt is the question
            length = min(length, outer.length)
        config = (args[0] if args else kwargs.get("generation_config")) or self.generation_config
        returned = kwargs.get("return_dict_in_generate", config.return_dict_in_generate)
        callers = kwargs.get("past_key_values") is not None or bool(returned)
        prompt = Prompt.of(length, assistant_masks, cache_is_the_callers=callers)
        decoding = ambience_of(find_decoder(cast(nn.Module, self))).decoding
        if decoding is not None and outer is None:
            kwargs = decoding(self, kwargs)
        with generating(self, prompt):
            return super().generate(inputs, *args, **kwargs)  # type: ignore[misc]

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The host's own inputs, and the roles of the tokens among them."""
        inputs = super().prepare_inputs_for_generation(*args, **kwargs)  # type: ignore[misc]
        prompt = prompt_of(self)
        if prompt is None:
            return inputs
        ids = inputs.get("input_ids")
        tokens = inputs["inputs_embeds"] if ids is None else ids
        cache = inputs.get("past_key_values")
        rows, count = tokens.shape[:2]
        start = _columns_before(cache, kwargs.get("attention_mask"), count)
        roles = prompt.roles(start, count, rows, tokens.device)
        keep = prompt.may_ask_again(start, count)
        step = Step(roles, keep=keep, real=kwargs.get("attention_mask"))
        if cache is not None and cache.is_compileable:
            stack: Any = find_decoder(cast(nn.Module, self))
            step = _for_compiled(stack, cache, step, start)
        inputs["depth_step"] = step
        return inputs

    def save_pretrained(self, folder: str | Path, *args: Any, **kwargs: Any) -> Any:
        """The host's own saving; the configuration then says that the model needs trol."""
        parameters = inspect.signature(self.trol_original.save_pretrained).parameters
        if "save_original_format" in parameters:  # names as they are, for trol.load_model to find
            kwargs.setdefault("save_original_format", False)
        saved = super().save_pretrained(folder, *args, **kwargs)  # type: ignore[misc]
        # The TroL family's own configuration says already that it needs trol.
        in_config = getattr(self.trol_original, "depth_in_config", False)
        if not in_config and (Path(folder) / "config.json").is_file():
            stack = next(m for m in self.modules() if isinstance(m, StackMixin))
            mark(folder, stack.depth_policy)
        return saved

    def generate_batch(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: the paged cache of continuous batching cannot hold planes."""
        del args, kwargs
        raise HostError(
            "continuous batching (generate_batch) writes keys and values past trol's planes, so "
            "its answers would be wrong; call generate with a padded batch."
        )

    init_continuous_batching = generate_batch
    continuous_batching_context_manager = generate_batch


def _for_compiled(stack: Any, cache: Any, step: Step, start: int) -> Step:
    """The step, with what compiled code could not find out, and its cache made ready."""
    policy = stack.depth_policy_in_force()
    scope = policy.scope_in(training=stack.training)
    keep = step.keep or scope != "question"
    # A recurrent state has no positions to copy: its planes begin where the row begins.
    visits = step.roles.in_scope(scope) is not False or stack.depth_recurrent
    make_ready(stack, cache, planes=keep and visits)
    return replace(step, start=start if policy.reads_start else None)


def make_ready(stack: Any, cache: Any, *, planes: bool) -> None:
    """Puts into a cache what the policy in force will keep there, because compiled code could not.

    `planes`: whether planes above 1 are among it.
    """
    policy = stack.depth_policy_in_force()
    visits = [policy.bounds(i).most for i in range(stack.depth_layers)] if planes else []
    absent = stack.depth_absent(policy)
    beside = policy.skipped_kv == "hole" or policy.observes
    if absent or beside or max(visits, default=1) > 1:
        prepare(cache, visits, absent)


def _columns_before(cache: Any, mask: Any, count: int) -> int:
    """Columns before the last `count`; `mask` [B, S] covers those in the cache and these."""
    if cache is None:
        return 0
    held = cache.get_seq_length()
    on_device = isinstance(held, Tensor)  # a static cache's: to read it is to wait for the device
    if on_device and isinstance(mask, Tensor) and mask.ndim == 2:
        return mask.shape[-1] - count
    return int(held)


def _penalised(out: Any, penalty: Tensor, kwargs: dict[str, Any]) -> Any:
    """The host's output with the policy's penalty in its loss.

    A loss that is divided by the answer tokens of a whole batch gets this part's share of it.
    """
    whole = kwargs.get("num_items_in_batch")
    if whole is not None:
        penalty = penalty * ((kwargs["labels"] != IGNORED_LABEL).sum() / whole)
    if isinstance(out, tuple):
        return (out[0] + penalty, *out[1:])
    out.loss = out.loss + penalty
    return out


def _prompt_length(inputs: Tensor | None, kwargs: dict[str, Any]) -> int:
    ids = inputs if inputs is not None else kwargs.get("input_ids")
    embeds = kwargs.get("inputs_embeds")
    lengths = [x.shape[1] for x in (ids, embeds, kwargs.get("attention_mask")) if x is not None]
    if ids is not None and ids.numel() == 0 and embeds is None:
        raise UsageError("an empty prompt: input_ids has no tokens; give at least one.")
    return max(lengths, default=1)
