"""Live objects of other libraries: a mixin in front of their class, as FSDP2 places one.

Also what accelerate's hooks and PEFT keep of them, and which of their parameters are one.

Saving a model that needs trol, so that nothing opens it without trol by accident.

The folder is the host's own, parameters of the policy among its weights; but `config.json` names
the model type `trol_host`, which transformers does not know, and holds the host's configuration
and the policy's settings. `trol.load_model(folder)` opens it, and after `import trol.family`,
`AutoModelForCausalLM.from_pretrained(folder)`.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import FunctionType
from typing import Any, cast

from torch import nn

from trol.errors import HostError

Class = type[Any]

SIGNED = ("forward", "prepare_inputs_for_generation")
"""Methods whose signature transformers and PEFT inspect, to learn which inputs a model takes."""

HOOKED_FORWARD = "_old_forward"
"""Where accelerate's hooks keep the bound forward that they were put in front of."""

TIED = ("_tied_weights_keys", "all_tied_weights_keys")
"""Where transformers keeps which parameters are one: on the class, and on each model."""


class Specialised:
    """Base of the mixins: keeps objects of a made-up class picklable and deep-copyable.

    The made-up class cannot be found by name, so a pickle names the mixins and the original class.
    """

    trol_mixins: tuple[Class, ...] = ()
    trol_original: Class = object

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """Blank for copies and pickles; who makes another of such a class means the original."""
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
        HostError: something else than accelerate's hooks has replaced its forward.
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
    """Raises `HostError` where a forward lies on the object itself and would pass by its class."""
    if "forward" in vars(target) and HOOKED_FORWARD not in vars(target):
        raise HostError(
            f"the forward of this {type(target).__name__} was replaced on the object itself "
            f"({vars(target)['forward']!r:.80}), past which trol cannot reach; attach before that "
            "is done."
        )


def unknown_setting(error: TypeError) -> str | None:
    """The keyword argument that a call did not know, if that is what the error says."""
    found = re.search(r"unexpected keyword argument '(\w+)'", str(error))
    return found.group(1) if found else None


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
    made: Any = specialised(original, *mixins)
    return made.__new__(made)


def submodule(module: nn.Module, name: str) -> nn.Module | None:
    """A module's own submodule of this name, and nothing else of that name; or None."""
    return module._modules.get(name)


def remove_submodule(module: nn.Module, name: str) -> None:
    """Takes a submodule off, where there is one."""
    module._modules.pop(name, None)


def trained_copy(module: nn.Module | None) -> nn.Module | None:
    """The module that runs: of one that PEFT's `modules_to_save` wraps, the copy in training."""
    copies = None if module is None else module._modules.get("modules_to_save")
    if copies is None:
        return module
    return cast(Any, copies)[cast(Any, module).active_adapters[0]]


def saves_adapters_alone(model: Any) -> bool:
    """Whether `save_pretrained` writes PEFT's adapters and nothing else of this model."""
    return bool(getattr(model, "_hf_peft_config_loaded", False))


def second_maps(learner: nn.Module, adapter: str) -> Iterator[nn.Module]:
    """B of each of PEFT's low-rank updates of this name: the map that runs last.

    Raises:
        HostError: there is none, so that nothing would be done to any.
    """
    maps = [m for name, m in learner.named_modules() if name.endswith(f".lora_B.{adapter}")]
    if not maps:
        raise HostError(
            f"PEFT keeps no low-rank update named {adapter!r} where trol looks for it (lora_B); "
            "run `trol info`, which says what this PEFT is."
        )
    yield from maps


def declare_tied(model: Any, part: str) -> None:
    """Tells transformers which parameters inside submodules named `part` are one.

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
            delattr(model, attribute)  # what the class says shows again, where it says anything
            rest = {name: source for name, source in known.items() if f".{part}." not in name}
            if rest != (getattr(model, attribute, None) or {}) or attribute != "_tied_weights_keys":
                setattr(model, attribute, rest)


def tied_names(model: Any) -> set[str]:
    """Names of parameters that are another one's, and need not be in a checkpoint."""
    return set(model.all_tied_weights_keys)


MODEL_TYPE = "trol_host"
"""The model type of a saved host that carries a policy."""


def mark(folder: str | Path, policy: dict[str, Any]) -> None:
    """Makes a saved configuration say that its model needs trol, and a policy of these settings."""
    path = Path(folder) / "config.json"
    host = json.loads(path.read_text(encoding="utf-8"))
    marked = {"model_type": MODEL_TYPE, "depth": policy, "host": host}
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(marked, indent=2) + "\n", encoding="utf-8")
    partial.replace(path)
