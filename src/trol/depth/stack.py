"""The three mixins that make a transformers model traverse: layer, stack of layers, host."""

from __future__ import annotations

import inspect
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trol.depth.call import (
    CALL,
    STEP,
    UNTOLD,
    Ambience,
    Call,
    Step,
    ambience_of,
    generating,
    outermost_prompt,
    prompt_of,
    told,
)
from trol.depth.families import LayerSite
from trol.depth.planes import HOLES, PlanedCache, adopt, drop_planes
from trol.depth.policy import AbstractPolicy
from trol.depth.roles import Prompt
from trol.depth.saving import mark
from trol.depth.specialise import Specialised
from trol.depth.visits import LayerRun, traverse
from trol.errors import HostError, UsageError


class LayerMixin(Specialised):
    """A decoder layer whose tokens may visit it zero, one or several times."""

    depth_index: int
    depth_site: LayerSite
    depth: nn.Module
    """The policy's parameters on this layer; present only where the policy has any."""
    depth_beside: int | None = None
    """How many things the family returns beside the hidden states, -1 where it returns a bare
    tensor; None until a layer of the class ran."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # As an argument, because gradient checkpointing runs forward again when the call is over.
        kwargs["depth_call"] = CALL.get()
        return super().__call__(*args, **kwargs)  # type: ignore[misc]

    def forward(
        self, state: Tensor, *args: Any, depth_call: Call | None = None, **kwargs: Any
    ) -> Any:
        """The layer's output after as many visits as the policy wants. Shape: [B, T, D]."""
        forward = super().forward  # type: ignore[misc]
        call, layer = depth_call, self.depth_index
        if call is None:
            return forward(state, *args, **kwargs)
        if call.is_absent(layer):
            if call.recorder is not None:
                call.recorder.skipped(layer, state)
            return self._passed_by(state, args, kwargs)
        run = LayerRun(forward, self.depth_site, args, kwargs)
        if call.runs_once(layer, run.cache):
            call.applied[layer] = 1
            return forward(state, *args, **kwargs)
        out = traverse(run, state, layer, getattr(self, "depth", None), call)
        call.applied[layer] = run.applied
        return out if run.applied else self._passed_by(state, args, kwargs)

    def _passed_by(self, state: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The skipped layer's output, in the form that its family returns."""
        if self.depth_beside is None:
            # The form shows only in a real output: one run on a cache of nothing, then remembered.
            args, kwargs = self.depth_site.with_cache(args, kwargs, None)
            with torch.no_grad():
                out = super().forward(state, *args, **kwargs)  # type: ignore[misc]
            type(self).depth_beside = len(out) - 1 if isinstance(out, tuple) else -1
        beside = self.depth_beside
        return state if beside is None or beside < 0 else (state, *(None,) * beside)


class StackMixin(Specialised):
    """The decoder that owns the layers: opens a `Call` around each of its forward passes."""

    depth_policy: AbstractPolicy
    depth_layers: int
    depth_recurrent: bool
    """Whether some layer keeps a recurrent state, which every token must advance."""
    depth_ambiences: int = 0
    """How many `trol.depth` and `trol.trace` blocks are open on this stack, in all threads."""
    training: bool
    config: Any

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The host's own forward pass, with a `Call` for its layers to read."""
        ambience = self._ambience()
        step = STEP.get() or UNTOLD
        call = self._open(step, ambience, args, kwargs)
        token = CALL.set(call)
        try:
            with self._recorded(ambience, step, args, kwargs):
                out = super().forward(*args, **kwargs)  # type: ignore[misc]
        finally:
            CALL.reset(token)
        return out if call is None else self._close(call, out)

    def depth_policy_in_force(self) -> AbstractPolicy:
        """The attached policy, or the one that `trol.depth` put in its place for a while."""
        return self._ambience().policy or self.depth_policy

    def depth_absent(self, policy: AbstractPolicy) -> frozenset[int]:
        """The layers that the whole batch always skips."""
        if policy.scope_in(training=self.training) != "all":
            return frozenset()
        return frozenset(i for i in range(self.depth_layers) if policy.skips(i))

    def _ambience(self) -> Ambience:
        if not self.depth_ambiences:
            return Ambience()
        if torch.compiler.is_compiling():
            raise HostError(
                "trol.depth and trol.trace cannot reach into a compiled model; attach the policy "
                "before torch.compile, or run the model uncompiled."
            )
        return ambience_of(self)

    def _open(self, step: Step, ambience: Ambience, args: Any, kwargs: Any) -> Call | None:
        """The call for this pass, or None where every token visits every layer once."""
        policy = ambience.policy or self.depth_policy
        scope = policy.scope_in(training=self.training)
        cache = self._argument("past_key_values", args, kwargs)
        absent = self.depth_absent(policy)
        if cache is not None and (absent or (isinstance(cache, PlanedCache) and cache.absent)):
            adopt(cache, absent)
        in_scope = step.roles.in_scope(scope)
        keep = scope != "question" or step.keep
        if ambience.recorder is None and self._all_plain(policy, in_scope, keep, cache):
            return None
        start = int(cache.get_seq_length()) if policy.reads_start and cache is not None else 0
        return Call(
            policy,
            in_scope,
            keep,
            start,
            everywhere=scope == "all",
            recorder=ambience.recorder,
            config=self.config,
            applied=[0] * self.depth_layers,
            last_only=self._last_only(step, ambience),
        )

    def _last_only(self, step: Step, ambience: Ambience) -> bool:
        """Not in training or compiled code, nor where a trace wants to see all visits."""
        observed = ambience.recorder is not None or torch.is_grad_enabled()
        return step.last_only and not observed and not torch.compiler.is_compiling()

    def _all_plain(self, policy: AbstractPolicy, in_scope: Any, keep: bool, cache: Any) -> bool:
        planed = isinstance(cache, PlanedCache) and bool(cache.planes)
        if planed and not keep and in_scope is False:
            drop_planes(cache)
            planed = any(plane == HOLES for _, plane in cache.planes)
        if planed:
            return False
        if in_scope is False and not (self.depth_recurrent and keep and cache is not None):
            return policy.skipped_kv != "hole"
        return all(policy.is_plain(layer) for layer in range(self.depth_layers))

    def _recorded(self, ambience: Ambience, step: Step, args: Any, kwargs: Any) -> Any:
        if ambience.recorder is None:
            return nullcontext()
        cache = self._argument("past_key_values", args, kwargs)
        # Some hosts hand their decoder ready masks of 4 dimensions: then only the caller's tells.
        own = self._argument("attention_mask", args, kwargs)
        real = own if step.real is None else step.real
        images = kwargs.get("image_tokens") is not None
        return ambience.recorder.one_pass(cache, real, images=images)

    def _close(self, call: Call, out: Any) -> Any:
        cache = getattr(out, "past_key_values", None)
        absent = self.depth_absent(call.policy)
        if cache is not None and absent:
            adopt(cache, absent)  # so that whoever asks for its length next is told the truth
        if call.recorder is not None:
            call.recorder.holding(cache)
        attentions = getattr(out, "attentions", None)
        if attentions is not None and len(attentions) == sum(call.applied):
            firsts = [sum(call.applied[:i]) for i in range(self.depth_layers) if call.applied[i]]
            out.attentions = tuple(attentions[i] for i in firsts)  # those of the first visits
        return out

    def _argument(self, name: str, args: Any, kwargs: Any) -> Any:
        if name in kwargs or not args:
            return kwargs.get(name)
        names = list(inspect.signature(self.trol_original.forward).parameters)[1:]
        where = names.index(name) if name in names else len(args)
        return args[where] if where < len(args) else None


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
        if self._reads_last_only(kwargs):
            depth_step = replace(depth_step, last_only=True)
        token = STEP.set(depth_step)
        try:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        finally:
            STEP.reset(token)

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
        start = 0 if cache is None else int(cache.get_seq_length())
        rows, count = tokens.shape[:2]
        roles = prompt.roles(start, count, rows, tokens.device)
        keep = prompt.may_ask_again(start, count)
        inputs["depth_step"] = Step(roles, keep=keep, real=kwargs.get("attention_mask"))
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


def _prompt_length(inputs: Tensor | None, kwargs: dict[str, Any]) -> int:
    ids = inputs if inputs is not None else kwargs.get("input_ids")
    embeds = kwargs.get("inputs_embeds")
    lengths = [x.shape[1] for x in (ids, embeds, kwargs.get("attention_mask")) if x is not None]
    if ids is not None and ids.numel() == 0 and embeds is None:
        raise UsageError("an empty prompt: input_ids has no tokens; give at least one.")
    return max(lengths, default=1)
