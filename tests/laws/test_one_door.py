"""What `from_pretrained` honours for a plain host, it honours for one saved with its policy.

The same settings open both, through transformers' own classes and through `trol.load_model`.
"""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedModel,
)

from trol import load_model, save
from trol.depth import attach, is_attached
from trol.errors import HostError, UsageError
from trol.family.loading import NOT_TAKEN, load_host
from trol.host.weights import is_quantised
from trol.policies.mixer import TrolMixer

from .test_generate import _tokenizer

pytestmark = pytest.mark.usefixtures("no_grad")

PLACES = {
    **dict.fromkeys(["model.embed_tokens", "model.layers.0", "model.norm", "lm_head"], "cpu"),
    "model.rotary_emb": "cpu",
    "model.layers.1": "disk",
}

SETTINGS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "dtype": {"dtype": torch.bfloat16},
    "dtype by name": {"dtype": "float16"},
    "dtype of the files": {"dtype": "auto"},
    "attention": {"attn_implementation": "eager"},
    "device_map": {"device_map": "cpu"},
    "max_memory": {"device_map": "auto", "max_memory": {"cpu": "1GB"}},
    "offload": {"device_map": PLACES, "offload_folder": True, "offload_buffers": False},
    "quantization_config": {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)},
    "generation_config": {"generation_config": GenerationConfig(max_length=7, eos_token_id=5)},
    "overrides": {"use_cache": False, "rms_norm_eps": 1e-3, "name_or_path": "own"},
    "output_attentions": {"attn_implementation": "eager", "output_attentions": True},
    "safetensors": {"use_safetensors": True, "weights_only": True},
    "offline": {"local_files_only": True, "token": False, "proxies": None},
    "revision": {"revision": "main", "code_revision": None, "force_download": False},
    "cache_dir": {"cache_dir": True},
    "variant": {"variant": "half"},
    "subfolder": {"subfolder": "inside"},
    "key_mapping": {"key_mapping": {r"^old\.": "model."}},
    "mismatched sizes": {"ignore_mismatched_sizes": True},
    "kernels": {"use_kernels": False, "allow_all_kernels": False, "kernel_config": None},
    "code": {"trust_remote_code": False},
    "experts": {"experts_implementation": "eager"},
    "loading": {"tqdm_class": None, "disable_mmap": True},
}
"""Case -> settings; True stands for a folder made for the test."""

ELSEWHERE = {
    *NOT_TAKEN,
    "gguf_file",  # tests/family/test_gguf.py
    "adapter_kwargs",
    "adapter_name",  # a folder of PEFT adapters, which names its host itself
    "distributed_config",
    "device_mesh",
    "tp_plan",
    "tp_size",  # several processes
    "fusion_config",  # fuses modules, where a release knows how
    "resume_download",
    "mirror",
    "low_cpu_mem_usage",  # no longer read by transformers
    "_fast_init",
    "use_auth_token",
    "torch_dtype",  # deprecated name of dtype
}
"""Settings of `from_pretrained` that no case has, and why."""


def plain() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        num_hidden_layers=2,
        eos_token_id=2,
        pad_token_id=0,
        dtype=torch.float32,
    )
    model = LlamaForCausalLM(config).eval()
    model.generation_config.eos_token_id = [2, 7]
    model.generation_config.repetition_penalty = 1.3
    return model


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A plain host and the same one with its policy, each saved in all the ways of the cases."""
    made = []
    for carries in (False, True):
        folder = tmp_path_factory.mktemp("marked" if carries else "plain")
        model = plain()
        if carries:
            attach(model, TrolMixer(initial_gate=0.3))
        for place in (folder, folder / "inside"):
            model.save_pretrained(place)
            _tokenizer().save_pretrained(place)
        model.save_pretrained(folder, variant="half")
        made.append(folder)
    return made[0], made[1]


def opened(door: Any, folder: Path, settings: dict[str, Any], tmp_path: Path) -> Any:
    own = {name: str(tmp_path) if value is True and name in {"offload_folder", "cache_dir"}
           else value for name, value in settings.items()}  # fmt: skip
    return door(folder, **own)


def seen(model: Any) -> dict[str, Any]:
    """All that a setting of `from_pretrained` may change."""
    config = model.config.to_dict()
    places = getattr(model, "hf_device_map", None)
    return {
        "class": type(model).__name__,
        "generation": model.generation_config.to_dict(),
        "config": {k: v for k, v in config.items() if k != "_name_or_path"},
        "attention": model.config._attn_implementation,
        "dtype": model.dtype,
        "places": places,
        "weights": {
            n: (p.dtype, p.device.type) for n, p in model.named_parameters() if ".depth." not in n
        },
        "quantised": is_quantised(model),
        "training": model.training,
    }


DOORS = {
    "transformers": AutoModelForCausalLM.from_pretrained,
    "load_model": lambda folder, **settings: load_model(folder, **settings)[0],
    "load_host": load_host,
}


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("case", SETTINGS)
def test_a_setting_is_honoured(
    case: str, door: str, folders: tuple[Path, Path], tmp_path: Path
) -> None:
    settings = SETTINGS[case]
    theirs = opened(AutoModelForCausalLM.from_pretrained, folders[0], settings, tmp_path)
    ours = opened(DOORS[door], folders[1], settings, tmp_path)
    assert is_attached(ours)
    assert seen(ours) == seen(theirs)
    ids = torch.arange(3, 12)[None]
    for _, gate in _gates(attach(theirs, TrolMixer(initial_gate=0.3))):
        gate.to(theirs.dtype)
    assert torch.allclose(ours(ids).logits, theirs(ids).logits, atol=1e-2)
    said = [model.generate(ids, max_new_tokens=4).tolist() for model in (ours, theirs)]
    assert said[0] == said[1]


def _gates(model: Any) -> list[Any]:
    return [(n, m) for n, m in model.named_modules() if n.endswith(".depth")]


def test_every_setting_of_from_pretrained_has_a_case() -> None:
    """A setting that a new transformers brings is looked at, not passed by."""
    source = inspect.getsource(PreTrainedModel.from_pretrained)
    popped = set(re.findall(r"kwargs\.pop\(\"(\w+)\"", source))
    named = set(inspect.signature(PreTrainedModel.from_pretrained).parameters)
    named -= {"pretrained_model_name_or_path", "model_args", "kwargs"}
    cased = {name for settings in SETTINGS.values() for name in settings}
    private = {name for name in popped if name.startswith("_")}
    assert popped | named <= cased | ELSEWHERE | private


@pytest.mark.parametrize("door", ["load_model", "load_host"])
@pytest.mark.parametrize("marked", [False, True])
def test_an_unknown_setting_is_refused_by_name(
    door: str, folders: tuple[Path, Path], *, marked: bool
) -> None:
    with pytest.raises(UsageError, match="atn_implementation"):
        DOORS[door](folders[marked], atn_implementation="eager")


@pytest.mark.parametrize("name", NOT_TAKEN)
def test_what_would_open_something_else_is_refused(name: str, folders: tuple[Path, Path]) -> None:
    with pytest.raises(UsageError, match=name):
        load_model(folders[1], **{name: None})


def test_bits_quantise_the_host_and_leave_its_gates(folders: tuple[Path, Path]) -> None:
    model, _ = load_model(folders[1], bits=8)
    assert is_quantised(model)
    assert all(p.is_floating_point() for _, gate in _gates(model) for p in gate.parameters())
    model.generate(torch.arange(3, 12)[None], max_new_tokens=3)


@pytest.mark.parametrize("spoilt", ["missing", "surplus"])
def test_weights_that_do_not_fit_are_refused(spoilt: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    attach(model := plain(), TrolMixer()).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    if spoilt == "missing":
        del weights["model.layers.1.depth.bias"]
    else:
        weights["model.layers.1.depth.more"] = model.model.norm.weight
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(HostError, match=spoilt):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_each_auto_class_gives_its_own(folders: tuple[Path, Path], tmp_path: Path) -> None:
    assert type(AutoModel.from_pretrained(folders[1])).__name__ == "LlamaModel"
    torch.manual_seed(0)
    config = LlamaConfig(**{**plain().config.to_dict(), "num_labels": 3})
    judge = attach(LlamaForSequenceClassification(config), TrolMixer()).eval()
    judge.save_pretrained(tmp_path)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    ids = torch.arange(3, 12)[None]
    assert torch.equal(again(ids).logits, judge(ids).logits)


def test_a_folder_without_a_tokenizer_says_so(tmp_path: Path) -> None:
    attach(plain(), TrolMixer()).save_pretrained(tmp_path)
    with pytest.raises(HostError, match=r"no tokenizer.*tokenizer\.save_pretrained"):
        load_model(tmp_path)
    assert is_attached(load_host(tmp_path))


def test_load_model_gives_the_class_that_was_saved(tmp_path: Path) -> None:
    """Plain or with a policy; a head that nobody asked for is never made up."""
    torch.manual_seed(0)
    judge = LlamaForSequenceClassification(
        LlamaConfig(**{**plain().config.to_dict(), "num_labels": 3, "architectures": None})
    ).eval()
    ids = torch.arange(3, 12)[None]
    for folder, policy in (("bare", None), ("carrying", TrolMixer(initial_gate=0.3))):
        if policy:
            attach(judge, policy)
        judge.save_pretrained(tmp_path / folder)
        _tokenizer().save_pretrained(tmp_path / folder)
        model, _ = load_model(tmp_path / folder)
        assert type(model).__name__ == "LlamaForSequenceClassification"
        assert torch.allclose(model(ids).logits, judge(ids).logits, atol=1e-6)


class Unknown(TrolMixer):
    """A policy that nobody registered."""

    name = "unknown_to_trol"


class Forgetful(TrolMixer):
    """A policy whose settings are another's."""

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "step": 2}


@pytest.mark.parametrize("kind", [Unknown, Forgetful])
def test_what_could_not_be_opened_again_is_not_saved(kind: type, tmp_path: Path) -> None:
    model = attach(plain(), kind())
    for write in (model.save_pretrained, lambda folder: save(model, folder)):
        with pytest.raises(UsageError, match="nothing was saved"):
            write(tmp_path / "x")
        assert not (tmp_path / "x").exists()


def test_a_dtype_that_is_none_is_one_line(folders: tuple[Path, Path]) -> None:
    with pytest.raises(HostError, match="float17"):
        load_model(folders[1], dtype="float17")
