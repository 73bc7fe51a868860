"""What trol assumes of lm-eval and lmms-eval, found by looking."""

import inspect
from dataclasses import dataclass
from importlib import import_module, metadata
from typing import Any

from trol.errors import HostError, UsageError, unknown
from trol.host import check_release


@dataclass(frozen=True)
class Harness:
    """One harness, and what of it trol names."""

    package: str
    """Its module."""
    assumed: dict[str, tuple[str, ...]]
    """`module:name.name` -> arguments that it takes, of a class those of its construction."""
    hint: str = ""
    """What else to say to those who have to install it."""


HARNESSES: dict[str, Harness] = {
    "lm-eval": Harness(
        "lm_eval",
        {
            "lm_eval:simple_evaluate": (
                *("model", "tasks", "limit", "task_manager", "apply_chat_template"),
                *("bootstrap_iters", "log_samples"),
            ),
            "lm_eval.tasks:TaskManager": ("include_path", "include_defaults"),
            "lm_eval.tasks:TaskManager.match_tasks": (),
            "lm_eval.api.registry:register_model": (),
            "lm_eval.utils:simple_parse_args_string": (),
            "lm_eval.models.huggingface:HFLM": (
                *("pretrained", "tokenizer", "backend", "batch_size", "max_length"),
            ),
            "lm_eval.models.huggingface:HFLM._create_tokenizer": ("pretrained", "tokenizer"),
            "lm_eval.models.huggingface:HFLM._loglikelihood_tokens": ("requests", "override_bs"),
            "lm_eval.models.huggingface:HFLM._model_generate": ("context",),
            "lm_eval.models.huggingface:HFLM.tok_batch_encode": ("strings",),
            "lm_eval.models.hf_vlms:HFMultimodalLM": ("pretrained", "image_string"),
            "lm_eval.models.hf_vlms:HFMultimodalLM._model_multimodal_generate": ("inputs",),
            "lm_eval.models.hf_vlms:HFMultimodalLM.tok_batch_multimodal_encode": (
                *("strings", "images"),
            ),
        },
    ),
    "lmms-eval": Harness(
        "lmms_eval",
        {
            "lmms_eval.evaluator:simple_evaluate": (
                *("model", "tasks", "limit", "task_manager", "cli_args"),
                *("bootstrap_iters", "log_samples"),
            ),
            "lmms_eval.tasks:TaskManager": ("verbosity", "include_path", "include_defaults"),
            "lmms_eval.tasks:TaskManager.match_tasks": (),
            "filelock._api:FileLockMeta": (),  # it changes this one
            "lmms_eval.models.registry_v2:ModelManifest": ("model_id", "chat_class_path"),
            "lmms_eval.api.model:lmms": (),
        },
        hint=(
            "; where its torchvision does not fit your torch (a CPU build, say), run instead: "
            "pip install --no-deps lmms-eval && pip install lm-eval loguru tenacity 'filelock<4'"
        ),
    ),
}
"""The harnesses by the name of their distribution."""


def check_harness(name: str) -> None:
    """Raises where a harness cannot be used.

    Raises:
        UsageError: there is no such harness.
        HostError: it is not installed, is older or newer than what is tested, does not open, or
            lacks something that trol names.
    """
    if name not in HARNESSES:
        raise unknown("harness", name, HARNESSES)
    install = f"pip install 'trol-vlm[{name}]'{HARNESSES[name].hint}"
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError as error:
        raise HostError(f"{name} is not installed; run: {install}") from error
    check_release(name, name)
    missing = lacking(name)
    if missing:
        raise HostError(
            f"{name} {metadata.version(name)} is not as trol knows it: {'; '.join(missing)}; "
            f"run: {install}"
        )


def lacking(name: str) -> list[str]:
    """What trol assumes of an installed harness and does not find."""
    faults = []
    for path, arguments in HARNESSES[name].assumed.items():
        module, _, rest = path.partition(":")
        try:
            assumed: Any = import_module(module)
            for part in rest.split("."):
                assumed = getattr(assumed, part)
        except (ImportError, AttributeError) as error:
            faults.append(f"{path} is not there ({error})")
            continue
        known = inspect.signature(assumed).parameters
        absent = [argument for argument in arguments if argument not in known]
        if absent:
            faults.append(f"{path} takes no {', '.join(absent)}")
    return faults


def check_place(tasks: list[str]) -> None:
    """Raises `UsageError` where a task is one of trol's files, which no harness reads."""
    for task in tasks:
        if ":" in task:
            raise UsageError(
                f"the task {task} is read by trol alone; leave --harness out, or name a task of "
                "the harness."
            )
