"""Tries a family at attach: whether its layers can be traversed, and its states read as logits.

On five random ids, one layer of each kind visited twice and all others skipped:

    cached     four tokens, then one, on a cache        ==  uncached
    readout    head(norm(state after the last layer))  ==  the logits
    parts      every other token alone                  ==  among all others, in the same visit

This takes a few passes over a few layers, once for each class of model. Where the cost of a model
is needed, one more pass compares FLOPs predicted from shapes with FLOPs counted.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from trol.depth.policy import AbstractPolicy, Answer, Bounds, Visit
from trol.depth.readout import Readout
from trol.depth.trace import StackCost
from trol.errors import HostError
from trol.host import trial
from trol.host.classes import original_class
from trol.host.flops import COUNTED, count_flops, miscounted
from trol.host.layers import attention_of, family_note, layer_list

TOKENS = 5
NOISE = 8
"""How many times the difference of a bare layer is allowed to a layer that is visited twice."""
TINY = 100_000_000
"""Parameters below which a model is so small that all its layers are tried."""


InForce = Callable[..., AbstractContextManager[None]]
"""`with in_force(policy, by=executor):` puts both in force on the probed model."""


class ProbePolicy(AbstractPolicy):
    """a_r = 1 while r < `visits` - 1, then for every other token; layers not named are skipped."""

    name = "probe"
    decides = True
    reads_start = True

    def __init__(self, layers: Sequence[int], visits: int) -> None:
        super().__init__()
        self.layers, self.visits = list(layers), visits

    def bounds(self, layer: int) -> Bounds:
        return Bounds(self.visits - 1, self.visits) if layer in self.layers else Bounds(0, 0)

    def again(self, visit: Visit) -> Answer:
        if visit.number < self.visits - 1:
            return 1.0
        rows, tokens = visit.state.shape[:2]
        return (visit.context.positions(visit.state) % 2 == 0).float().expand(rows, tokens)

    def settings(self) -> dict[str, Any]:
        return {"layers": self.layers, "visits": self.visits}


@dataclass(frozen=True)
class Findings:
    """Why a class of models cannot be treated rightly; empty texts where it can."""

    wrong: str = ""
    """Why cached and uncached decoding differ, or cannot be."""
    broken: str = ""
    """The error in which the model itself ends, without a policy."""
    unreadable: str = ""
    """Why its logits cannot be read off a state."""
    entangled: str = ""
    """Why its layers' parts cannot compute some tokens alone."""


_FINDINGS: dict[tuple[Any, ...], Findings] = {}
"""The findings on each class of models that was probed in this process."""

_MISCOUNTS: dict[tuple[Any, ...], bool] = {}
"""Whether FLOPs were predicted wrongly, for each class of models."""


def findings(host: Any, stack: Any, in_force: InForce) -> Findings:
    """The findings on this class of model, probed once; none where the probe cannot run.

    It cannot where weights are quantised, sharded or not in memory, and where the stack has fewer
    positions than the probe has tokens. The model's parameters, mode and random state stay.

    Args:
        host: the attached model.
        stack: its stack of layers.
        under: puts a policy in force on it for a while.
    """
    if not trial.can_run(host, stack.config, TOKENS):
        return Findings()
    layers = list(layer_list(stack) or ())
    which, key = _sample(host, stack, layers)
    if key in _FINDINGS:
        return _FINDINGS[key]
    with trial.trial_run(host):
        result = _probed(host, stack, layers, which, in_force)
    if not result.broken:  # the user may mend what breaks the model
        _FINDINGS[key] = result
    return result


def miscounts(host: Any, stack: Any, cost: StackCost, in_force: InForce) -> bool:
    """Whether layers of this class of model take other FLOPs than `cost` predicts from shapes.

    False where the probe cannot run, and under attentions whose operators torch does not count.
    Arguments as of `findings`.
    """
    if not trial.can_run(host, stack.config, TOKENS) or attention_of(stack.config) not in COUNTED:
        return False
    layers = list(layer_list(stack) or ())
    which, key = _sample(host, stack, layers)
    if key not in _MISCOUNTS:
        counter = FlopCounterMode(display=False)
        counts = dict.fromkeys(which, 0)
        ids = trial.harmless_ids(host.config, TOKENS, next(stack.parameters()).device)
        with trial.trial_run(host), in_force(" ".join(map(str, which))), torch.no_grad(), counter:
            for index in which:
                count_flops(layers[index], index, counts, counter)
            stack(ids, use_cache=False)
        _MISCOUNTS[key] = any(
            miscounted(layers[i], cost.layers[i], counts[i], TOKENS) for i in which
        )
    return _MISCOUNTS[key]


def _sample(host: Any, stack: Any, layers: list[nn.Module]) -> tuple[list[int], tuple[Any, ...]]:
    """One layer of each kind, fewer of a large model; and a key for this class of models."""
    kinds = trial.layer_kinds(layers, stack.config)
    first = {kind: index for index, kind in reversed(list(enumerate(kinds)))}
    size = sum(parameter.numel() for parameter in host.parameters())
    which = sorted(first.values())
    if size > TINY:  # each costs six passes of a layer: a fifth of the stack takes 1.2 passes of it
        which = which[: max(1, len(layers) // 5)]
    of = (original_class(host), original_class(stack), attention_of(stack.config), host.dtype)
    return which, (*of, *(kinds[index] for index in (*which, -1)))


def _probed(
    host: Any, stack: Any, layers: list[nn.Module], which: list[int], in_force: InForce
) -> Findings:
    ids = trial.harmless_ids(host.config, TOKENS, next(stack.parameters()).device)
    outputs: list[Any] = []

    def keep(_module: Any, _given: Any, out: Any) -> None:
        outputs.append(out[0])

    def keep_layer(_module: Any, _given: Any, out: Any) -> None:
        outputs.append(out[0] if isinstance(out, tuple) else out)

    layers[-1].register_forward_hook(keep_layer)
    stack.register_forward_hook(keep)
    visits = 1 if family_note(stack).no_second_visit else 2
    plan = " ".join(f"{index}:{visits}" for index in which)
    try:
        with torch.no_grad():
            with in_force(plan):
                logits = host(ids, use_cache=False)
            state, whole = outputs[0], outputs[-1]
            if len(outputs) < 2 or state.ndim != 3 or state.shape[:2] != ids.shape:
                shape = _SEVERAL.format(list(state.shape))
                return Findings(wrong=shape if len(outputs) > 1 else _NOT_CALLED)
            with in_force(plan):
                apart = trial.difference(trial.last_on_cache(stack, ids), whole[:, -1])
            if apart > trial.tolerance(whole):
                # Some families are no more exact than this: then the bare layers differ as much.
                bare = " ".join(map(str, which))
                with in_force(bare):
                    noise = trial.difference(
                        trial.last_on_cache(stack, ids), stack(ids, use_cache=False)[0][:, -1]
                    )
                if apart > NOISE * noise:
                    return Findings(
                        wrong=f"with plan '{plan}' the last of {TOKENS} tokens leaves the stack "
                        f"otherwise on a cache than without, by {apart:.2g} of the largest number"
                    )
            entangled = _entangled(stack, ids, ProbePolicy(which, visits), in_force)
            return Findings(unreadable=_unreadable(host, state, logits), entangled=entangled)
    except Exception as error:  # whatever a family raises here is the finding
        shape = outputs[0].shape if outputs else ()
        if len(shape) > 3:
            return Findings(wrong=_SEVERAL.format(list(shape)))
        if bare := _fails_bare(host, stack, ids, in_force):
            return Findings(broken=bare)
        return Findings(wrong=f"plan '{plan}' ends in {type(error).__name__}: {error}")


def _fails_bare(host: Any, stack: Any, ids: Tensor, in_force: InForce) -> str:
    """The error in which the same passes end where every token visits every layer once."""
    try:
        with torch.no_grad(), in_force("all"):
            host(ids, use_cache=False)
            trial.last_on_cache(stack, ids)
    except Exception as error:  # as above
        return f"{type(error).__name__}: {error}"
    return ""


_NOT_CALLED = "its last layer is not called where there are ids alone"
_SEVERAL = "its layers hand on several states for each token (shape {})"


def _entangled(stack: Any, ids: Tensor, policy: AbstractPolicy, in_force: InForce) -> str:
    with in_force(policy):
        among_all = stack(ids, use_cache=False)[0], trial.last_on_cache(stack, ids)
    try:
        with in_force(policy, by="token-wise"):
            alone = stack(ids, use_cache=False)[0], trial.last_on_cache(stack, ids)
    except Exception as error:  # as above
        return f"some tokens alone end in {type(error).__name__}: {error}"
    apart = max(trial.difference(*pair) for pair in zip(alone, among_all, strict=True))
    if apart <= trial.tolerance(alone[0]):
        return ""
    return f"some tokens alone give other states, by {apart:.2g} of the largest number"


def _unreadable(host: Any, state: Tensor, out: Any) -> str:
    logits = out.get("logits")
    if logits is None or host.get_output_embeddings() is None:
        return ""  # a decoder without its head says so itself, when it is read
    try:
        read = Readout(host)(state)
    except HostError as error:
        return str(error)
    apart = trial.difference(read, logits)
    if apart <= trial.tolerance(logits):
        return ""
    return f"its logits differ from head(norm(state)) by {apart:.2g} of the largest"
