"""The mixin of the model that trol is attached to: it knows question from answer."""

import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from trol.depth.call import (
    PASS_INFO,
    PassInfo,
    generating,
    overrides_of,
    pass_info,
    prompt_of,
    prompts,
)
from trol.depth.planes import prepare
from trol.depth.policy import settings_to_save
from trol.depth.readout import Readout
from trol.depth.roles import IGNORED_LABEL, Prompt
from trol.errors import HostError, UsageError
from trol.host.classes import Specialised, mark_as_trol_host, saves_adapters_alone
from trol.host.generation import CONTINUOUS, predicts_tokens, reads_last_only, returns_cache
from trol.host.layers import argument
from trol.host.names import cache_among, generation_cache


class HostMixin(Specialised):
    """The model that trol is attached to: knows question from answer."""

    depth_stack: tuple[Any]
    """The decoder that owns the layers; in a tuple, so that it is registered where it is alone."""
    config: Any
    generation_config: Any

    def forward(
        self,
        *args: Any,
        depth_info: PassInfo | None = None,
        assistant_masks: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """The host's own forward pass; `assistant_masks` or `labels` mark the answer tokens."""
        given = partial(argument, self.trol_original.forward, args=args, kwargs=kwargs)
        labels, mask = given("labels"), given("attention_mask")
        tokens = given("input_ids") if given("input_ids") is not None else given("inputs_embeds")
        # A classifier's tell nothing of who speaks.
        targets = labels if labels is not None and predicts_tokens(self) else None
        if depth_info is not None:
            depth_info = self._with_virtual_tokens(depth_info, tokens, mask, cache_among(kwargs))
        elif targets is None and assistant_masks is None and not torch.compiler.is_compiling():
            depth_info = self._info_inside_generate(tokens, mask)
        else:
            depth_info = pass_info(assistant_masks, targets, mask)
        notes: dict[Any, Any] = {}
        readers = self.depth_stack[0].depth_readers
        asks_last_only = partial(reads_last_only, self.config, kwargs, readers)
        token = PASS_INFO.set(
            replace(depth_info, asks_last_only=asks_last_only, readout=Readout(self), notes=notes)
        )
        try:
            out = super().forward(*args, **kwargs)  # type: ignore[misc]
        finally:
            PASS_INFO.reset(token)
        if not notes or labels is None:
            return out
        stack = self.depth_stack[0]
        penalty = stack.depth_policy_in_force().penalty(notes)
        return (
            out
            if penalty is None
            else _penalised(out, penalty, labels, kwargs.get("num_items_in_batch"))
        )

    def _with_virtual_tokens(self, info: PassInfo, tokens: Any, mask: Any, cache: Any) -> PassInfo:
        """The step of tokens [B, T, ...], before which PEFT may have put virtual ones: question.

        Raises:
            HostError: they are put before tokens that follow others in the cache.
        """
        more = 0 if info.tokens is None or tokens is None else tokens.shape[1] - info.tokens
        if more <= 0:
            return info
        if not torch.compiler.is_compiling() and cache is not None and cache.get_seq_length():
            raise HostError(
                f"{more} virtual tokens were put before a token in the middle of a text: this PEFT "
                "does not see the cache of this transformers, and answers wrongly without trol as "
                "well; pass use_cache=False to generate, or install releases that go together."
            )
        real = info.real if info.real is None else mask
        return replace(info, roles=info.roles.behind(more), real=real)

    def _info_inside_generate(self, tokens: Tensor | None, mask: Tensor | None) -> PassInfo:
        """What is known of a pass without roles: outside `generate`, all its tokens are question.

        Raises:
            HostError: it is made inside `generate`, and cannot be told from what it holds.
        """
        info = pass_info(None, None, mask)
        open_prompts = prompts()
        if not open_prompts:
            return info
        stack = self.depth_stack[0]
        scope = stack.depth_policy_in_force().scope_in(training=stack.training)
        if scope == "all":
            return info
        ids = tokens is not None and not tokens.is_floating_point()
        roles = open_prompts[-1].roles_beside(cast(Tensor, tokens)) if ids else None
        if roles is None:
            raise HostError(
                f"{type(self).__name__} was called inside generate (by a logits processor, say) on "
                "tokens that do not go on as the answer does, so trol cannot know which of them "
                "are question; pass assistant_masks in that call, or give the policy scope='all' "
                f"(it has {scope!r})."
            )
        return replace(info, roles=roles)

    def generate(
        self, inputs: Tensor | None = None, *args: Any, assistant_masks: Any = None, **kwargs: Any
    ) -> Any:
        """The host's own `generate`: the prompt is question, what is new is answer."""
        columns, ids = _prompt_columns(inputs, kwargs)
        outer = next(iter(prompts()), None)
        # As the assistant of another generate, the prompt of that one is the question.
        length = columns if outer is None else min(columns, outer.length)
        callers = returns_cache(self, args[0] if args else None, kwargs)
        prompt = Prompt.of(
            length, assistant_masks, columns=columns, ids=ids, cache_is_the_callers=callers
        )
        decoding = overrides_of(self.depth_stack[0]).decoding
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
        all_ids = prompt.ids_so_far = argument(prepare, "input_ids", args, kwargs)
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
        policy = stack.depth_policy_in_force()
        info = PassInfo(
            roles,
            keep=keep,
            start=start if policy.reads_start else None,
            behind_first=prompt.holds_first(policy.keep_first, start, mask),
            tokens=count,
            real=mask,
        )
        if cache is not None and cache.is_compileable:
            _ready_for_compiled(stack, cache, info)
        inputs["depth_info"] = info
        return inputs

    def save_pretrained(self, folder: str | Path, *args: Any, **kwargs: Any) -> Any:
        """The host's own saving; the configuration then says that the model needs trol.

        Raises:
            UsageError: `push_to_hub`, which would push before the configuration says so.
        """
        if kwargs.get("push_to_hub"):
            raise UsageError(
                "save_pretrained(push_to_hub=True) would push a configuration that hides the "
                "policy; call model.push_to_hub(name)."
            )
        settings = settings_to_save(self.depth_stack[0].depth_policy)
        saved = super().save_pretrained(folder, *args, **kwargs)  # type: ignore[misc]
        # The TroL family's own configuration says already that it needs trol.
        in_config = getattr(self.trol_original, "depth_in_config", False)
        if not in_config and (Path(folder) / "config.json").is_file():
            mark_as_trol_host(folder, settings)
        elif saves_adapters_alone(self):
            warnings.warn(
                f"{folder} holds PEFT's adapters alone, as save_pretrained writes them beside a "
                "policy's own parameters; trol.save(model, folder) keeps those too.",
                stacklevel=2,
            )
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


def _ready_for_compiled(stack: Any, cache: Any, info: PassInfo) -> None:
    """Puts into the cache what compiled code could not."""
    policy = stack.depth_policy_in_force()
    scope = policy.scope_in(training=stack.training)
    keep = info.keep or scope != "question"
    # A recurrent state has no positions to copy: its planes begin where the row begins.
    visits = info.roles.in_scope(scope) is not False or stack.depth_recurrent
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
