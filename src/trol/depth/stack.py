"""The two mixins that make a decoder traverse: one for its layers, one for their stack."""

import warnings
from contextlib import nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn

from trol.depth.call import (
    CALL,
    NO_INFO,
    NO_OVERRIDES,
    PASS_INFO,
    Call,
    CallReference,
    Overrides,
    PassInfo,
    overrides_of,
    started_inside,
)
from trol.depth.layer_run import LayerRun
from trol.depth.planes import HOLES, PlanedCache, check_cache, drop_planes, install_planes
from trol.depth.policy import AbstractPolicy, StackBounds
from trol.depth.roles import Context
from trol.depth.trace import StackCost, stack_cost
from trol.depth.visits import check_rows, traverse
from trol.errors import HostError
from trol.host.classes import Specialised
from trol.host.layers import LayerSignature, argument, attention_of, layer_list, text_positions
from trol.host.names import CACHE, cache_among, returned_cache
from trol.host.torch_internals import captured_by_layer


class LayerMixin(Specialised):
    """A decoder layer whose tokens may visit it zero, one or several times."""

    depth_index: int
    depth_signature: LayerSignature
    depth: nn.Module
    """The policy's parameters on this layer; present only where the policy has any."""
    depth_extra_outputs: int | None = None
    """How many outputs the family returns beside the hidden states, -1 where it returns a bare
    tensor; None until a layer of the class has run."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call = CALL.get()
        if call is not None:
            # As an argument: gradient checkpointing runs forward again after the call has ended.
            kwargs["depth_call"] = CallReference(call)
        return super().__call__(*args, **kwargs)  # type: ignore[misc]

    def forward(
        self, state: Tensor, *args: Any, depth_call: CallReference | None = None, **kwargs: Any
    ) -> Any:
        """The layer's output after as many visits as the policy wants. Shape: [B, T, D]."""
        forward = super().forward  # type: ignore[misc]
        if depth_call is None:
            out = forward(state, *args, **kwargs)
            return out if self.depth_extra_outputs is not None else self._form_noted(out)
        call, layer = depth_call.call, self.depth_index
        cache = self.depth_signature.cache_in(args, kwargs)
        call.cache, call.entered = cache, True
        if layer == 0:
            call.begin(state)
        if layer in call.absent:
            call.times_applied[layer] = 0
            if call.recorder is not None:
                call.recorder.skipped(layer, state)
            return self._skipped(state, args, kwargs)
        if call.runs_once(layer, cache):
            call.times_applied[layer] = 1
            return self._form_noted(forward(state, *args, **kwargs))
        given, attention = (args, kwargs), attention_of(call.config)
        run = LayerRun(
            cast(nn.Module, self), forward, self.depth_signature, given, cache, attention=attention
        )
        out = traverse(run, state, layer, getattr(self, "depth", None), call)
        call.times_applied[layer] = run.times_applied
        if not run.times_applied:
            return self._skipped(out, args, kwargs)
        out = run.wrap(out)
        return out if self.depth_extra_outputs is not None else self._form_noted(out)

    def _form_noted(self, out: Any) -> Any:
        """Notes the form of an output of this class, which a skipped layer must return as well."""
        if self.depth_extra_outputs is None and not torch.compiler.is_compiling():
            type(self).depth_extra_outputs = len(out) - 1 if isinstance(out, tuple) else -1
        return out

    def _skipped(self, state: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The skipped layer's output, in the form that its family returns."""
        if self.depth_extra_outputs is None:
            # Seen by the probe at attach; without the probe, by one run without a cache.
            args, kwargs = self.depth_signature.with_cache(args, kwargs, None)
            with torch.no_grad():
                self._form_noted(super().forward(state, *args, **kwargs))  # type: ignore[misc]
        beside = self.depth_extra_outputs
        return state if beside is None or beside < 0 else (state, *(None,) * beside)


class StackMixin(Specialised):
    """The decoder that owns the layers: opens a `Call` around each of its forward passes."""

    depth_policy: AbstractPolicy
    depth_layers: int
    depth_recurrent: bool
    """Whether some layer keeps a recurrent state, which every token must advance."""
    depth_readers: tuple[nn.Module, ...]
    """Its last layer, and the modules that read the output of that layer."""
    depth_blocks: int = 0
    """How many `trol.depth` and `trol.trace` blocks are open on this stack, in all threads."""
    depth_costs: StackCost | None = None
    """What visits of the layers cost; None until it is needed."""
    depth_unreadable: str = ""
    """Why logits cannot be read off its states, as far as that was probed."""
    depth_entangled: str = ""
    """Why its layers' parts cannot compute some tokens alone, as far as that was probed."""
    depth_bounds: tuple[AbstractPolicy, StackBounds]
    """The last policy in force, and its bounds."""
    training: bool
    config: Any

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The host's own forward pass, with a `Call` for its layers to read."""
        overrides = self._overrides() if self.depth_blocks else NO_OVERRIDES
        info = PASS_INFO.get() or NO_INFO
        call = self._open(info, overrides, args, kwargs)
        if call is None and not torch.compiler.is_compiling() and CALL.get() is None:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        token = CALL.set(call)
        try:
            with self._recorded(overrides, info, args, kwargs):
                out = super().forward(*args, **kwargs)  # type: ignore[misc]
        finally:
            CALL.reset(token)
        return out if call is None else self._close(call, out)

    def _init_weights(self, module: nn.Module) -> None:
        """Initial values of weights that a checkpoint lacks: the host's own, or the policy's."""
        if getattr(module, "sets_first_values", False):
            cast(Any, module).reset_parameters()
        else:
            super()._init_weights(module)  # type: ignore[misc]

    def depth_policy_in_force(self) -> AbstractPolicy:
        """The attached policy, or the one that `trol.depth` put in its place for a while."""
        return self._overrides().policy or self.depth_policy

    def depth_bounds_of(self, policy: AbstractPolicy) -> StackBounds:
        """The bounds of a policy on all layers."""
        last, bounds = self.depth_bounds
        if last is not policy:
            bounds = StackBounds.of(policy, self.depth_layers)
            if not torch.compiler.is_compiling():
                self.depth_bounds = policy, bounds
        return bounds

    def depth_absent(self, policy: AbstractPolicy) -> frozenset[int]:
        """The layers that the whole batch always skips."""
        everywhere = policy.applies_to_all(training=self.training)
        return self.depth_bounds_of(policy).never if everywhere else frozenset()

    def _overrides(self) -> Overrides:
        if not self.depth_blocks:
            return NO_OVERRIDES
        if torch.compiler.is_compiling():
            raise HostError(
                "trol.depth and trol.trace cannot reach into a compiled model; attach the policy "
                "before torch.compile, or run the model uncompiled."
            )
        overrides = overrides_of(self)
        if overrides is NO_OVERRIDES and started_inside(self):
            warnings.warn(
                "a trol.depth, trol.trace or trol.speculate block is open on this model, but not "
                "in this thread, which was started inside it; if it should be, start the thread by "
                "Thread(target=contextvars.copy_context().run, args=(function, ...)).",
                stacklevel=2,
            )
        return overrides

    def _open(self, info: PassInfo, overrides: Overrides, args: Any, kwargs: Any) -> Call | None:
        """The call for this pass, or None where every token visits every layer once."""
        policy = overrides.policy or self.depth_policy
        scope = policy.scope_in(training=self.training)
        everywhere = policy.applies_to_all(training=self.training)
        cache = self._cache(args, kwargs)
        bounds = self.depth_bounds_of(policy)
        absent = bounds.never if everywhere else frozenset()
        planed = isinstance(cache, PlanedCache)
        if cache is not None and not torch.compiler.is_compiling():
            check_cache(cache)
            if planed:
                check_rows(cache, policy, bounds, everywhere=everywhere)
        if cache is not None and (absent or (planed and cache.absent)):
            install_planes(cache, absent)
        in_scope = info.roles.in_scope(scope)
        keep = scope != "question" or info.keep
        if overrides.recorder is None and self._all_plain(policy, bounds, in_scope, keep, cache):
            return None
        # Kernels have no gradients, and compilers make their own.
        alone = not (torch.is_grad_enabled() or torch.compiler.is_compiling())
        narrows = bool(policy.keep_first) and in_scope is not False and not info.behind_first
        padding, position_ids, start = self._padding(info, args, kwargs), None, info.start
        if padding is None and cache is None and (narrows or policy.reads_start):
            position_ids = text_positions(self._argument("position_ids", args, kwargs))
        if start is None:
            # Without a cache, nothing comes before these tokens.
            asked = policy.reads_start or (narrows and padding is None)
            start = 0 if cache is None or not asked else int(cache.get_seq_length())
        context = Context(
            in_scope,
            start,
            padding,
            position_ids,
            info.readout,
            training=self.training,
            layers=self.depth_layers,
            fuses=alone and overrides.fuses,
            notes={} if info.notes is None else info.notes,
        )
        return Call(
            policy,
            bounds,
            context,
            keep,
            everywhere=everywhere,
            narrows=narrows,
            recorder=overrides.recorder,
            config=self.config,
            times_applied=[None] * self.depth_layers,
            absent=absent,
            asks_last_only=info.asks_last_only if overrides.recorder is None else None,
            # Dropout draws other numbers for some tokens alone than for these among all others.
            free=alone and not self.training,
            executor=overrides.executor,
            parts=not self.depth_entangled,
            arguments=kwargs,
            costs=self._costs,
        )

    def _costs(self) -> StackCost:
        """What visits of the layers cost, computed from their modules once."""
        if self.depth_costs is None:
            layers = list(layer_list(cast(nn.Module, self)) or ())
            self.depth_costs = stack_cost(layers, [None] * len(layers), self.config)
        return self.depth_costs

    def _padding(self, info: PassInfo, args: Any, kwargs: Any) -> Tensor | None:
        """The padding mask [B, S]; None where there is none."""
        # Some hosts hand their decoder masks of 4 dimensions: then the caller's own is needed.
        own = self._argument("attention_mask", args, kwargs)
        mask = own if info.real is None else info.real
        return mask if isinstance(mask, Tensor) and mask.ndim == 2 else None

    def _all_plain(
        self, policy: AbstractPolicy, bounds: StackBounds, in_scope: Any, keep: bool, cache: Any
    ) -> bool:
        planed = isinstance(cache, PlanedCache) and bool(cache.planes)
        if planed and not keep and in_scope is False:
            drop_planes(cache)
            planed = any(plane <= HOLES for _, plane in cache.planes)
        if planed or policy.observes:
            return False
        if in_scope is False and not (self.depth_recurrent and keep and cache is not None):
            return policy.skipped_kv != "hole"
        return bounds.plain

    def _recorded(self, overrides: Overrides, info: PassInfo, args: Any, kwargs: Any) -> Any:
        if overrides.recorder is None:
            return nullcontext()
        cache = self._cache(args, kwargs)
        real = self._padding(info, args, kwargs)
        images = kwargs.get("image_tokens") is not None
        return overrides.recorder.one_pass(cache, real, images=images)

    def _close(self, call: Call, out: Any) -> Any:
        cache: Any = call.cache
        if not call.entered or (cache is None and returned_cache(out) is not None):
            what = "calls its layers past" if not call.entered else "hands them no cache through"
            raise HostError(
                f"{type(self).__name__} {what} trol, so this pass was not what the policy says; "
                "run `trol info`, which checks what is assumed of this transformers."
            )
        if cache is not None and call.absent:
            install_planes(cache, call.absent)  # so that it gives its true length from now on
        if call.recorder is not None:
            call.recorder.holding(cache)
        attentions = getattr(out, "attentions", None)
        if attentions and not torch.compiler.is_compiling():
            layers = list(layer_list(cast(nn.Module, self)) or ())
            out.attentions = captured_by_layer(attentions, layers, call.times_applied, "attentions")
        return out

    def _cache(self, args: Any, kwargs: Any) -> Any:
        cache = cache_among(kwargs)
        return self._argument(CACHE, args, kwargs) if cache is None else cache

    def _argument(self, name: str, args: Any, kwargs: Any) -> Any:
        return argument(self.trol_original.forward, name, args, kwargs)
