"""A host that was saved with its policy, known to the Auto classes once trol is imported.

`AutoModelForCausalLM.from_pretrained(folder)` opens it as it opens the plain host, generation
config, dtype, attention, device map, quantisation and revision included, its policy attached.
"""

from __future__ import annotations

import copy
from typing import Any

from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PretrainedConfig,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
    MODEL_MAPPING,
)

from trol.depth import attach, attached
from trol.depth import attachment as depth_host
from trol.depth.attachment import check_by_probe
from trol.depth.policy import from_settings
from trol.errors import HostError
from trol.host.classes import MODEL_TYPE, tied_names
from trol.policies.base import PolicyModule

GATE = f".{depth_host.GATE}."
"""What the name of a policy's parameter holds."""


class SavedHostConfig(PretrainedConfig):
    """The configuration of a host that was saved with its policy: the host's own, and the policy.

    What overrides a setting (`from_pretrained(folder, rope_theta=...)`) overrides the host's.
    """

    model_type = MODEL_TYPE
    host: Any = None
    """The host's own configuration."""
    depth: Any = None
    """The policy: {"policy": name, **settings}."""

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        wants_unused = kwargs.pop("return_unused_kwargs", False)
        host = copy.deepcopy(config_dict["host"])
        made = cls()
        made.depth = config_dict["depth"]
        kind = CONFIG_MAPPING[host["model_type"]]
        made.host, unused = kind.from_dict(host, return_unused_kwargs=True, **kwargs)  # type: ignore[misc]
        return (made, unused) if wants_unused else made

    def to_dict(self) -> dict[str, Any]:
        return {"model_type": MODEL_TYPE, "depth": self.depth, "host": self.host.to_dict()}


class SavedHost:
    """What an Auto class opens such a folder with: the host's own class, a policy on it."""

    config_class = SavedHostConfig
    classes: Any
    """The Auto class's own table: configuration of a host -> its class of models."""

    @classmethod
    def from_pretrained(
        cls, source: Any, *args: Any, config: SavedHostConfig, **kwargs: Any
    ) -> Any:
        """The host with its policy, as its own class opens it.

        Raises:
            HostError: weights are missing or left over, or the family cannot be treated rightly.
            UsageError: the policy is unknown, or does not fit.
        """
        tells = kwargs.pop("output_loading_info", False)
        host = cls.classes[type(config.host)]
        model, told = _with_policy(host, config.depth).from_pretrained(
            source, *args, config=config.host, output_loading_info=True, **kwargs
        )
        missing, surplus = set(told["missing_keys"]) - tied_names(model), told["unexpected_keys"]
        if host.__name__ not in (config.host.architectures or ()):  # another head, or none
            missing, surplus = ({n for n in names if GATE in n} for names in (missing, surplus))
        if missing or surplus:
            raise HostError(
                f"the weights in {source} do not fit: missing {sorted(missing)}, surplus "
                f"{sorted(surplus)}; save the model again."
            )
        for gate in depth_host.gates_of(attached(model)[1]):
            if isinstance(gate, PolicyModule):
                gate.mark_trained()
        check_by_probe(model)
        return (model, told) if tells else model


def register() -> None:
    """Tells the Auto classes of models with a decoder how such a folder is opened."""
    AutoConfig.register(SavedHostConfig.model_type, SavedHostConfig)
    for auto, classes in OPENERS.items():
        auto.register(SavedHostConfig, type("SavedHost", (SavedHost,), {"classes": classes}))


HEADED: dict[Any, Any] = {
    AutoModelForImageTextToText: MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoModelForCausalLM: MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModelForSequenceClassification: MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoModelForTokenClassification: MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
}
"""Auto class of models with a head -> its table."""
OPENERS: dict[Any, Any] = {AutoModel: MODEL_MAPPING, **HEADED}
"""All Auto classes that open such a folder."""


def auto_class(config: PretrainedConfig) -> Any:
    """The Auto class for a model of this configuration: of the class that was saved, if it says.

    Else of one that sees, where there is one, or speaks.
    """
    host = config.host if isinstance(config, SavedHostConfig) else config
    fitting = {auto: table[type(host)] for auto, table in HEADED.items() if type(host) in table}
    for auto, found in fitting.items():
        kinds = found if isinstance(found, tuple) else (found,)
        if {kind.__name__ for kind in kinds} & set(host.architectures or ()):
            return auto
    sees = AutoModelForImageTextToText in fitting
    return AutoModelForImageTextToText if sees else AutoModelForCausalLM


def _with_policy(host: type[Any], settings: dict[str, Any]) -> type[Any]:
    """A class that is made as `host`, with the policy on it before weights are read."""

    class Opened(host):  # type: ignore[misc, valid-type]
        def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
            super().__init__(config, *args, **kwargs)
            self.__class__ = host
            attach(self, from_settings(settings), probe=False)

    Opened.__name__, Opened.__qualname__ = host.__name__, host.__qualname__
    Opened.__module__ = host.__module__
    return Opened
