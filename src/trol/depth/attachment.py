"""Attaching a policy to a transformers model, in place, and taking it off again."""

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import replace
from threading import RLock
from typing import Any, TypeVar, cast, get_args

import torch
from torch import nn

from trol.depth.call import Decoding, Executor, Kernel, open_on, overrides_of
from trol.depth.generation import HostMixin, make_ready
from trol.depth.policy import AbstractPolicy, PolicyLike, StackBounds, from_settings, resolve
from trol.depth.probe import InForce, findings, miscounts
from trol.depth.stack import LayerMixin, StackMixin
from trol.depth.trace import Recorder, StackCost, Trace, stack_cost
from trol.errors import HostError, UsageError, unknown
from trol.host import check_release
from trol.host.assumptions import check_at_attach
from trol.host.cache import check_cache, has_recurrent_layers
from trol.host.classes import (
    check_hooks,
    declare_tied,
    model_inside,
    rebind_wrappers,
    remove_submodule,
    restore,
    specialise,
    submodule,
    trained_copy,
    undeclare_tied,
)
from trol.host.layers import (
    check_stack,
    family_note,
    find_decoder,
    layer_list,
    layer_signature,
    readers,
)
from trol.host.torch_internals import why_no_triton
from trol.host.weights import running_device

Model = TypeVar("Model", bound=nn.Module)

GATE = "depth"
"""What the policy's parameters on a layer are called there."""


def attach(model: Model, policy: PolicyLike = "trol_mixer", *, probe: bool = True) -> Model:
    """Makes every forward pass of `model` follow `policy`, in place; returns the model.

    The module tree, the parameter names and the class names stay; layers whose policy has
    parameters gain a submodule `depth`.

    Args:
        model: a transformers causal or vision-language model, or its decoder; or what PEFT or
            torch.compile made of one, in which the policy is attached to the model inside.
        policy: a policy, a registered name, a plan or plan text.
        probe: whether a class of models that is new to this process is tried on five random ids
            first (`trol.depth.probe`); it takes about as long as reading a short prompt.

    Raises:
        HostError: the model's family cannot be treated rightly, or this transformers is not as
            trol assumes; the message says why.
        UsageError: the policy is unknown or does not fit, or one is attached already.
    """
    check_release()
    check_at_attach()
    with _ONE_AT_A_TIME:
        if _find_host(model) is not None:
            raise UsageError(
                "a policy is attached to this model already; call trol.detach(model) first, or use "
                "`with trol.depth(model, policy):` for a while."
            )
        inside = model_inside(model)
        _attach(inside, resolve(policy), probe=probe)
        rebind_wrappers(model, inside)
        return model


_ONE_AT_A_TIME = RLock()
"""Held while a model gains or loses its policy, or is tried."""


def _attach(model: nn.Module, policy: AbstractPolicy, *, probe: bool) -> None:
    decoder: Any = find_decoder(model)
    layers = _layers(decoder)
    check_stack(decoder)
    check(decoder, policy)
    # All that can fail comes before anything is changed.
    signatures = [layer_signature(layer) for layer in layers]
    gates = _new_gates(layers, policy, decoder.config.hidden_size)
    for module in (*layers, decoder, model):
        check_hooks(module)
    for index, (layer, signature) in enumerate(zip(layers, signatures, strict=True)):
        specialise(layer, LayerMixin)
        traversing = cast(Any, layer)
        traversing.depth_index, traversing.depth_signature = index, signature
        if gates[index] is not None:
            traversing.depth = gates[index]
    if decoder is model:
        specialise(decoder, HostMixin, StackMixin)
    else:
        specialise(decoder, StackMixin)
        specialise(model, HostMixin)
    cast(Any, model).depth_stack = (decoder,)
    decoder.depth_policy, decoder.depth_layers = policy, len(layers)
    decoder.depth_recurrent = is_recurrent(decoder)
    decoder.depth_readers = readers(model, decoder, layers[-1])
    decoder.depth_bounds = policy, StackBounds.of(policy, len(layers))
    if policy.tied:
        declare_tied(model, GATE)
    if probe:
        try:
            check_by_probe(model)
        except BaseException:
            detach(model)
            raise


def check_by_probe(model: nn.Module) -> None:
    """Tries an attached model on a few ids, once for each class of models in a process.

    Raises:
        HostError: cached and uncached decoding differ; or its logits cannot be read off a state,
            and the attached policy would.
    """
    host, stack = attached(model)
    seen = findings(host, stack, _in_force(host))
    if seen.wrong or seen.broken:
        kind = stack.config.model_type
        what = f"trol cannot treat {kind} rightly: {seen.wrong}"
        if seen.broken:
            what = f"{kind} cannot be tried: without trol too it ends in {seen.broken.rstrip('.')}"
        raise HostError(
            f"{what}. No policy was attached; attach(..., probe=False) leaves this check out, at "
            "your own risk."
        )
    stack.depth_unreadable, stack.depth_entangled = seen.unreadable, seen.entangled
    _check_readable(stack, stack.depth_policy)


def _in_force(host: nn.Module) -> InForce:
    @contextmanager
    def in_force(policy: PolicyLike, *, by: Executor = "dense") -> Generator[None]:
        with depth(host, policy), executor(host, by):
            yield

    return in_force


def _check_readable(stack: Any, policy: AbstractPolicy) -> None:
    if policy.reads_predictions and stack.depth_unreadable:
        raise HostError(
            f"{policy.name} reads predictions between layers, which {stack.config.model_type} does "
            f"not allow: {stack.depth_unreadable}."
        )


def detach(model: Model) -> Model:
    """Takes the policy and its parameters off `model`, in place; returns the plain model.

    Raises:
        UsageError: no policy is attached, or a block is open that puts another in force.
    """
    with _ONE_AT_A_TIME:
        return _detach(model)


def _detach(model: Model) -> Model:
    host, stack = attached(model)
    if stack.depth_blocks:
        raise UsageError(
            "a trol.depth, trol.trace or trol.depth.executor block is open on this model, in some "
            "thread; leave it before trol.detach(model)."
        )
    for layer in _layers(stack):
        restore(cast(Any, layer))
        for name in ("depth_index", "depth_signature"):
            delattr(layer, name)
        remove_submodule(layer, GATE)
    for name in (
        "depth_policy",
        "depth_layers",
        "depth_recurrent",
        "depth_readers",
        "depth_bounds",
    ):
        delattr(stack, name)
    for name in ("depth_blocks", "depth_costs", "depth_unreadable", "depth_entangled"):
        stack.__dict__.pop(name, None)
    del host.depth_stack
    restore(stack)
    if host is not stack:
        restore(host)
    rebind_wrappers(model, host)
    undeclare_tied(host, GATE)
    return model


def attached(model: nn.Module) -> tuple[Any, Any]:
    """The host inside `model` (which may be wrapped, by PEFT say) and its stack of layers.

    Raises:
        UsageError: no policy is attached.
    """
    host = _find_host(model)
    if host is None:
        raise UsageError(
            "no policy is attached to this model; call trol.attach(model, policy) first."
        )
    return host, cast(Any, host).depth_stack[0]


def is_attached(model: nn.Module) -> bool:
    """Whether a policy is attached."""
    return _find_host(model) is not None


def check(decoder: Any, policy: AbstractPolicy) -> None:
    """Raises `UsageError` or `HostError` where `policy` does not fit this decoder."""
    layers = _layers(decoder)
    policy.check(len(layers))
    bounds = StackBounds.of(policy, len(layers)).layers
    if max(one.most for one in bounds) > 1 and family_note(decoder).no_second_visit:
        raise HostError(
            f"{decoder.config.model_type} layers cannot be visited twice: "
            f"{family_note(decoder).no_second_visit}; skip layers of it, or exit early."
        )
    skips = any(one.least == 0 for one in bounds)
    note = family_note(decoder)
    no_holes = note.no_holes or (
        "its recurrent layers have no positions to leave out" if is_recurrent(decoder) else ""
    )
    if skips and policy.skipped_kv == "hole" and no_holes:
        raise HostError(
            f"skipped_kv='hole' is not possible on {decoder.config.model_type}: {no_holes}; "
            "set skipped_kv='project'."
        )


def gates_of(stack: nn.Module) -> list[nn.Module | None]:
    """The policy's parameters, layer by layer."""
    return [trained_copy(submodule(layer, GATE)) for layer in _layers(stack)]


def cost_of(model: nn.Module) -> StackCost:
    """The cost coefficients of an attached model's stack.

    They are read off its modules, and tried on five tokens, once for each class of models; where
    torch counts others, none are known.
    """
    host, stack = attached(model)
    cost = stack_cost(list(_layers(stack)), gates_of(stack), stack.config)
    with _ONE_AT_A_TIME:
        wrong = miscounts(host, stack, cost, _in_force(host))
    return replace(cost, layers=(None,) * len(cost.layers)) if wrong else cost


def prepare_cache(model: nn.Module, cache: Any) -> Any:
    """Gives a cache, in place, all that the attached policy will keep in it; returns it.

    Code under `torch.compile` can change neither a cache's class nor what it is made of. Call this
    before the compiled model sees the cache; `generate` does it by itself. After
    `cache.early_initialization(...)`, planes above 1 are initialised like plane 1.

    Raises:
        UsageError: no policy is attached.
        HostError: this is no transformers cache, or its layers hold rows of different lengths.
    """
    _, stack = attached(model)
    check_cache(cache)
    make_ready(stack, cache, planes=True)
    return cache


@contextmanager
def trace(model: nn.Module) -> Generator[Trace]:
    """Records visits [L, B, T], weights and cost of what runs in this thread inside the block."""
    with _attached_for_a_while(model, from_settings({"policy": "plain"})):
        _, stack = attached(model)
        made = Trace(cost_of(model))
        with open_on(
            stack, replace(overrides_of(stack), recorder=Recorder(made, stack.depth_layers))
        ):
            yield made


@contextmanager
def depth(model: nn.Module, policy: PolicyLike) -> Generator[None]:
    """Puts another policy in force, in this thread, for a while; a plain model is attached for it.

    A thread started inside the block, as for a streamer, has it only if it is given this one's
    context: `Thread(target=contextvars.copy_context().run, args=(work,))`. One that runs without
    is warned.

    Raises:
        UsageError: the policy is unknown, does not fit, or needs parameters that are not there.
    """
    wanted = resolve(policy)
    with _attached_for_a_while(model, wanted):
        _, stack = attached(model)
        check(stack, wanted)
        _check_gates(stack, wanted)
        _check_readable(stack, wanted)
        with open_on(stack, replace(overrides_of(stack), policy=wanted)):
            yield


@contextmanager
def executor(model: nn.Module, which: str = "auto", *, kernel: str = "auto") -> Generator[None]:
    """Has visits made by one executor, in this thread, for a while.

    `dense` computes all tokens of every visit, the reference; `token-wise` has a layer's token-wise
    parts compute those that go (its older name is `packed`); `auto`, which is in force otherwise,
    takes the latter where it leaves out more than it takes. `kernel`: what makes gate and mixture:
    `operators`; `triton`, in one launch; or `auto`, the latter on CUDA devices where it is there.
    In training and with gradients all tokens are computed; hooks on parts see those computed.

    Raises:
        UsageError: there is no such executor or kernel, or no policy is attached.
        HostError: the layers of this family cannot compute some tokens alone; or no Triton kernel
            can run here.
    """
    which = FORMER.get(str(which), which)
    if which not in get_args(Executor):
        raise unknown("executor", which, get_args(Executor))
    if kernel not in get_args(Kernel):
        raise unknown("kernel", kernel, get_args(Kernel))
    _, stack = attached(model)
    if kernel == "triton" and (why := why_no_triton(next(stack.parameters()).device)):
        raise HostError(f"no Triton kernel can run: {why}; take 'auto' or 'operators'.")
    if which == "token-wise" and stack.depth_entangled:
        raise HostError(
            f"{stack.config.model_type} has no token-wise executor: {stack.depth_entangled}; take "
            "'auto' or 'dense'."
        )
    own = replace(overrides_of(stack), executor=cast(Executor, which), kernel=cast(Kernel, kernel))
    with open_on(stack, own):
        yield


FORMER: dict[str, Executor] = {"packed": "token-wise"}
"""What executors were called before -> what they are called."""


@contextmanager
def decoding(model: nn.Module, loop: Decoding, policy: AbstractPolicy) -> Generator[None]:
    """Has `generate` decode with `loop`, which itself puts `policy` in force, for a while.

    Raises:
        UsageError: the policy does not fit, or needs parameters that are not there.
    """
    with _attached_for_a_while(model, from_settings({"policy": "plain"})):
        _, stack = attached(model)
        check(stack, policy)
        _check_gates(stack, policy)
        with open_on(stack, replace(overrides_of(stack), decoding=loop)):
            yield


@contextmanager
def _attached_for_a_while(model: nn.Module, policy: AbstractPolicy) -> Generator[None]:
    if is_attached(model):
        yield
        return
    attach(model, policy)
    # Other threads go on with the plain model: a block is in force in its own alone.
    attached(model)[1].depth_policy = from_settings({"policy": "plain"})
    try:
        yield
    finally:
        detach(model)


def _check_gates(stack: Any, policy: AbstractPolicy) -> None:
    for layer, gate in enumerate(gates_of(stack)):
        wanted = policy.gate(layer, stack.config.hidden_size)
        if wanted is not None and type(wanted) is not type(gate):
            raise UsageError(
                f"{policy.name} has parameters that this model does not carry; attach it with "
                "trol.attach instead."
            )


def _new_gates(layers: nn.ModuleList, policy: AbstractPolicy, width: int) -> list[nn.Module | None]:
    """The policy's parameters for each layer, where the layer is and in its mode."""
    gates: list[nn.Module | None] = []
    for index, layer in enumerate(layers):
        device = running_device(layer)
        # On whatever device, and in whatever mode, the caller makes tensors.
        at = device if device.type == "meta" else torch.device("cpu")
        with torch.inference_mode(mode=False), at:
            gate = policy.gate(index, width)
        if gate is not None and policy.tied and index > 0:
            for name, parameter in cast(nn.Module, gates[0]).named_parameters():
                setattr(gate, name, parameter)
        elif gate is not None:
            gate.to(device)
            shares = range(len(layers)) if policy.tied else (index,)
            gate.requires_grad_(any(map(policy.learns, shares)))
        gates.append(None if gate is None else gate.train(layer.training))
    return gates


def is_recurrent(decoder: Any) -> bool:
    """Whether some layer keeps a recurrent state, in the cache or in itself."""
    return has_recurrent_layers(decoder.config) or bool(family_note(decoder).no_second_visit)


def _layers(decoder: nn.Module) -> nn.ModuleList:
    layers = layer_list(decoder)
    if layers is None or len(layers) == 0:
        raise HostError(f"{type(decoder).__name__} has no decoder layers.")
    if len({id(layer) for layer in layers}) < len(layers):
        raise HostError(
            f"{type(decoder).__name__} repeats one layer object; its layers must differ."
        )
    return layers


def _find_host(model: object) -> nn.Module | None:
    if not isinstance(model, nn.Module):
        raise UsageError(
            f"got {type(model).__name__} {model!r:.60}; give a transformers model, such as "
            "trol.load_model(name)[0]."
        )
    return next((m for m in model.modules() if isinstance(m, HostMixin)), None)
