"""Live models of other libraries: how trol's mixins join them, and how others wrap and save them.

`specialise` places a mixin in front of an object's class, as FSDP2 does, past accelerate's hooks.
Then come the wrappers around a model (PEFT, data parallelism), parameters that are one, and
`mark_as_trol_host`, by which a saved model that needs trol is not opened without it by accident.
"""

import functools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import FunctionType, MethodType
from typing import Any, cast

from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.nn.parallel import DataParallel, DistributedDataParallel
from transformers import PreTrainedModel

from trol.errors import HostError
from trol.files import write_whole

Class = type[Any]

SIGNED = ("forward", "prepare_inputs_for_generation")
"""Methods whose signature transformers and PEFT inspect, to learn which inputs a model takes."""

HOOKED_FORWARD = "_old_forward"
"""Where accelerate's hooks keep the bound forward that they were put in front of."""

TIED = ("_tied_weights_keys", "all_tied_weights_keys")
"""Where transformers keeps which parameters are one: on the class, and on each model."""


class Specialised:
    """Base of the mixins: keeps objects of a class made by `specialised` picklable and copyable.

    Such a class cannot be imported by name, so a pickle names the mixins and the original class.
    """

    trol_mixins: tuple[Class, ...] = ()
    trol_original: Class = object

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """Without arguments, as copies and pickles call it, an empty object."""
        return cls.trol_original(*args, **kwargs) if args or kwargs else super().__new__(cls)

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced: Any = super().__reduce_ex__(protocol)
        return (_blank, (self.trol_original, *self.trol_mixins), *reduced[2:])


@functools.cache
def specialised(original: Class, *mixins: Class) -> Class:
    """The class `original` with `mixins` in front; its name, module and signatures stay."""
    body: dict[str, Any] = {
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
        "trol_mixins": mixins,
        "trol_original": original,
    }
    for name in SIGNED:
        if hasattr(original, name) and hasattr(mixins[0], name):
            body[name] = _signed_as(original, mixins[0], name)
    return type(original.__name__, (*mixins, original), body)


def specialise(target: object, *mixins: Class) -> None:
    """Puts `mixins` in front of the class of `target`, in place.

    Raises:
        HostError: its forward was replaced, and not by accelerate's hooks.
    """
    check_hooks(target)
    target.__class__ = specialised(type(target), *mixins)
    _rebind(target)


def restore(target: Specialised) -> None:
    """Undoes `specialise`."""
    target.__class__ = target.trol_original
    _rebind(target)


def original_class(target: object) -> Class:
    """The class of `target`, without any mixins in front."""
    return target.trol_original if isinstance(target, Specialised) else type(target)


def check_hooks(target: object) -> None:
    """Raises `HostError` where a forward on the object itself would bypass its class."""
    if "forward" in vars(target) and HOOKED_FORWARD not in vars(target):
        raise HostError(
            f"the forward of this {type(target).__name__} was replaced on the object itself "
            f"({vars(target)['forward']!r:.80}), past which trol cannot reach; attach before that "
            "is done."
        )


def unknown_setting(error: TypeError) -> str | None:
    """The keyword argument that a call did not know, if that is what the error says."""
    match = re.search(r"unexpected keyword argument '(\w+)'", str(error))
    return match.group(1) if match else None


def _signed_as(original: Class, mixin: Class, name: str) -> Any:
    """The mixin's method under the original's signature, and no frame more than it has."""
    own = getattr(mixin, name)
    method = FunctionType(own.__code__, own.__globals__, name, own.__defaults__, own.__closure__)
    method.__kwdefaults__ = own.__kwdefaults__
    return functools.update_wrapper(method, getattr(original, name))


def _rebind(target: Any) -> None:
    if HOOKED_FORWARD in vars(target):
        setattr(target, HOOKED_FORWARD, type(target).forward.__get__(target))


def _blank(original: Class, *mixins: Class) -> Any:
    kind: Any = specialised(original, *mixins)
    return kind.__new__(kind)


def submodule(module: nn.Module, name: str) -> nn.Module | None:
    """A module's own submodule of this name, and nothing else of that name; or None."""
    return module._modules.get(name)


def remove_submodule(module: nn.Module, name: str) -> None:
    """Takes a submodule off, where there is one."""
    module._modules.pop(name, None)


PARALLEL = (DataParallel, DistributedDataParallel, FullyShardedDataParallel, FSDPModule)
"""Wrappers that list a model's parameters once, when they wrap it, and miss later ones."""

ENGINES = ("deepspeed",)
"""Packages whose wrappers do so as well."""

PREPARES = "prepare_inputs_for_generation"
ORIGINAL_PREPARES = f"base_model_{PREPARES}"
"""Where PEFT's prompt learning keeps the model's own method, while it puts one in its place."""


def model_inside(model: nn.Module) -> nn.Module:
    """The outermost transformers model in a wrapper, whose `generate` is the one that runs.

    A module without any is returned as it is.

    Raises:
        HostError: the wrapper would not know the parameters that a policy adds.
    """
    package = type(model).__module__.partition(".")[0]
    if isinstance(model, PARALLEL) or package in ENGINES:
        raise HostError(
            f"{type(model).__name__} has taken on its parameters already and would leave those of "
            "a policy out; attach the policy first, then wrap the model."
        )
    return next((m for m in model.modules() if isinstance(m, PreTrainedModel)), model)


def rebind_wrappers(wrapper: nn.Module, model: nn.Module) -> None:
    """Updates a wrapper that keeps a method of the model inside to the one of its present class."""
    own = vars(model).get(PREPARES)  # PEFT leaves it on the model after its first generate
    if getattr(own, "__self__", None) is model:
        delattr(model, PREPARES)
    for around in wrapper.modules():
        if getattr(vars(around).get(ORIGINAL_PREPARES), "__self__", None) is model:
            setattr(around, ORIGINAL_PREPARES, MethodType(getattr(type(model), PREPARES), model))


def trained_copy(module: nn.Module | None) -> nn.Module | None:
    """The module that runs: the active copy of one that PEFT's `modules_to_save` wraps."""
    copies = None if module is None else module._modules.get("modules_to_save")
    if copies is None:
        return module
    return cast(Any, copies)[cast(Any, module).active_adapters[0]]


def saves_adapters_alone(model: Any) -> bool:
    """Whether `save_pretrained` writes PEFT's adapters and nothing else of this model."""
    return bool(getattr(model, "_hf_peft_config_loaded", False))


def lora_b_maps(learner: nn.Module, adapter: str) -> Iterator[nn.Module]:
    """B of each of PEFT's low-rank updates of this name: the map that runs last.

    Raises:
        HostError: there is none.
    """
    maps = [m for name, m in learner.named_modules() if name.endswith(f".lora_B.{adapter}")]
    if not maps:
        raise HostError(
            f"PEFT keeps no low-rank update named {adapter!r} where trol looks for it (lora_B); "
            "run `trol info`, which says what this PEFT is."
        )
    yield from maps


def declare_tied(model: Any, part: str) -> None:
    """Tells transformers which parameters inside submodules named `part` are one and the same.

    It reads `_tied_weights_keys` when saving and `all_tied_weights_keys` when loading.
    """
    names: dict[int, str] = {}
    tied: dict[str, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        source = names.setdefault(id(parameter), name)
        if source != name and f".{part}." in name:
            tied[name] = source
    for attribute in TIED:
        known = getattr(model, attribute, None)
        if known is not None or attribute == "_tied_weights_keys":
            setattr(model, attribute, {**tied, **(known or {})})


def undeclare_tied(model: Any, part: str) -> None:
    """Undoes `declare_tied`."""
    for attribute in TIED:
        known: dict[str, str] = vars(model).get(attribute) or {}
        if any(f".{part}." in name for name in known):
            delattr(model, attribute)  # so that an attribute of the class counts again
            others = {name: source for name, source in known.items() if f".{part}." not in name}
            of_class = getattr(model, attribute, None) or {}
            if others != of_class or attribute != "_tied_weights_keys":
                setattr(model, attribute, others)


def tied_names(model: Any) -> set[str]:
    """Names of parameters that are another parameter, and need not be in a checkpoint."""
    return set(model.all_tied_weights_keys)


MODEL_TYPE = "trol_host"
"""The model type of a saved host that carries a policy; transformers does not know it."""


def mark_as_trol_host(folder: str | Path, policy: dict[str, Any]) -> None:
    """Makes the configuration of a saved host say that it needs trol, and a policy's settings.

    The folder is the host's own, parameters of the policy among its weights. What was its
    configuration is kept inside the new one. `trol.load_model(folder)` opens it, and after
    `import trol.family`, `AutoModelForCausalLM.from_pretrained(folder)`.
    """
    path = Path(folder) / "config.json"
    host = json.loads(path.read_text(encoding="utf-8"))
    config = {"model_type": MODEL_TYPE, "depth": policy, "host": host}
    write_whole(path, json.dumps(config, indent=2) + "\n")
