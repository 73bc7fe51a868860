"""The mixin of the model that trol is attached to: it knows question from answer."""

from __future__ import annotations

import inspect
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trol.depth.call import (
    STEP,
    Step,
    ambience_of,
    generating,
    outermost_prompt,
    prompt_of,
    told,
)
from trol.depth.planes import prepare
from trol.depth.readout import Readout
from trol.depth.registry import to_settings
from trol.depth.roles import IGNORED_LABEL, Prompt
from trol.errors import HostError, UsageError
from trol.host.classes import Specialised
from trol.host.generation import CONTINUOUS, reads_last_only, returns_cache
from trol.host.layers import argument
from trol.host.names import cache_among, generation_cache
from trol.host.saving import mark


class HostMixin(Specialised):
    """The model that trol is attached to: knows question from answer."""

    depth_stack: tuple[Any]
    """The decoder that owns the layers; in a tuple, so that it is registered where it is alone."""
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
        labels = argument(self.trol_original.forward, "labels", args, kwargs)
        if depth_step is None:
            mask = argument(self.trol_original.forward, "attention_mask", args, kwargs)
            depth_step = told(assistant_masks, labels, mask)
            if labels is None and assistant_masks is None:
                self._check_untold()
        notes: dict[Any, Any] = {}
        last_only = partial(reads_last_only, self.config, kwargs, self.depth_stack[0].depth_readers)
        token = STEP.set(
            replace(depth_step, last_only=last_only, readout=Readout(self), notes=notes)
        )
        try:
            out = super().forward(*args, **kwargs)  # type: ignore[misc]
        finally:
            STEP.reset(token)
        if not notes or labels is None:
            return out
        stack = self.depth_stack[0]
        penalty = stack.depth_policy_in_force().penalty(notes)
        return (
            out
            if penalty is None
            else _penalised(out, penalty, labels, kwargs.get("num_items_in_batch"))
        )

    def _check_untold(self) -> None:
        """Raises `HostError` for a pass inside `generate` whose roles nobody has told."""
        if torch.compiler.is_compiling() or prompt_of(self) is None:
            return
        stack = self.depth_stack[0]
        policy = stack.depth_policy_in_force()
        scope = policy.scope_in(training=stack.training)
        if scope != "all":
            raise HostError(
                f"{type(self).__name__} was called inside generate without "
                "prepare_inputs_for_generation (by a logits processor: guidance_scale has one), so "
                "trol cannot know which of its tokens are question; give the policy scope='all' "
                f"(it has {scope!r}), or, where the call is your own, pass assistant_masks in it."
            )

    def generate(
        self, inputs: Tensor | None = None, *args: Any, assistant_masks: Any = None, **kwargs: Any
    ) -> Any:
        """The host's own `generate`: the prompt is question, what is new is answer."""
        columns, ids = _prompt_columns(inputs, kwargs)
        outer = outermost_prompt()
        # As the assistant of another generate, the prompt of that one is the question.
        length = columns if outer is None else min(columns, outer.length)
        callers = returns_cache(self, args[0] if args else None, kwargs)
        prompt = Prompt.of(
            length, assistant_masks, columns=columns, ids=ids, cache_is_the_callers=callers
        )
        decoding = ambience_of(self.depth_stack[0]).decoding
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
        prepare = self.trol_original.prepare_inputs_for_generation
        all_ids = argument(prepare, "input_ids", args, kwargs)
        mask = argument(prepare, "attention_mask", args, kwargs)
        ids = inputs.get("input_ids")
        tokens = inputs["inputs_embeds"] if ids is None else ids
        generation_cache(kwargs)  # checked: there is one, where there must be
        cache = cache_among(inputs)  # which Phi-3 leaves out where it begins anew
        rows, count = tokens.shape[:2]
        end = prompt.end(all_ids.shape[1])
        start = _chunk_start(cache, mask, count) if end is None else end - count
        roles = prompt.roles(start, count, rows, tokens.device)
        keep = prompt.may_ask_again(start, count)
        stack = self.depth_stack[0]
        # Compiled code would be compiled anew for each start: only policies that read it are told.
        reads_start = stack.depth_policy_in_force().reads_start
        step = Step(roles, keep=keep, start=start if reads_start else None, real=mask)
        if cache is not None and cache.is_compileable:
            _ready_for_compiled(stack, cache, step)
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
            mark(folder, to_settings(self.depth_stack[0].depth_policy))
        return saved


def _refuse_continuous_batching(self: Any, *args: Any, **kwargs: Any) -> Any:
    """Refused: the paged cache of continuous batching cannot hold planes."""
    del self, args, kwargs
    raise HostError(
        "continuous batching (generate_batch) writes keys and values past trol's planes, so "
        "its answers would be wrong; call generate with a padded batch."
    )


for _name in CONTINUOUS:
    setattr(HostMixin, _name, _refuse_continuous_batching)


def _ready_for_compiled(stack: Any, cache: Any, step: Step) -> None:
    """Puts into the cache what compiled code could not."""
    policy = stack.depth_policy_in_force()
    scope = policy.scope_in(training=stack.training)
    keep = step.keep or scope != "question"
    # A recurrent state has no positions to copy: its planes begin where the row begins.
    visits = step.roles.in_scope(scope) is not False or stack.depth_recurrent
    make_ready(stack, cache, planes=keep and visits)


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


def _chunk_start(cache: Any, mask: Any, count: int) -> int:
    """Columns before a chunk of a prompt; `mask` [B, S] covers those in the cache and these."""
    if isinstance(mask, Tensor) and mask.ndim == 2:
        return mask.shape[-1] - count
    return 0 if cache is None else int(cache.get_seq_length())  # no cache: all is in this call


def _penalised(out: Any, penalty: Tensor, labels: Tensor, whole: Any) -> Any:
    """The host's output with the policy's penalty in its loss.

    A loss that is divided by the answer tokens of a whole batch gets this part's share of it.
    """
    if whole is not None:
        penalty = penalty * ((labels != IGNORED_LABEL).sum() / whole)
    if isinstance(out, tuple):
        return (out[0] + penalty, *out[1:])
    out.loss = out.loss + penalty
    return out


def _prompt_columns(inputs: Tensor | None, kwargs: dict[str, Any]) -> tuple[int, int]:
    """Columns that a `generate` call starts from, and how many of them are given as ids."""
    ids = inputs if inputs is not None else kwargs.get("input_ids")
    embeds = kwargs.get("inputs_embeds")
    lengths = [x.shape[1] for x in (ids, embeds, kwargs.get("attention_mask")) if x is not None]
    if ids is not None and ids.numel() == 0 and embeds is None:
        raise UsageError("an empty prompt: input_ids has no tokens; give at least one.")
    # Without either, generate starts from one column: the token that begins a text.
    return max(lengths, default=1), (int(embeds is None) if ids is None else ids.shape[1])
