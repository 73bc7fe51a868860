"""What a suite is measured on: sizes, number types, devices, and random models built to them."""

import copy
import os
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from transformers import AutoModelForCausalLM, CLIPVisionConfig, LlamaConfig, LlamaForCausalLM

from trol.errors import UsageError, unknown
from trol.family import InternLM2Config, TrolConfig, TrolForConditionalGeneration
from trol.family.configuration import PUBLISHED
from trol.family.memory import BLOCK, check_fits, quantised


@dataclass(frozen=True)
class Size:
    """The dimensions of a random Llama, and the prompts that it reads."""

    name: str
    hidden: int
    layers: int
    deep: int
    """Layers in the suites about skipping and drafting."""
    prompt: int
    """Tokens of a whole prompt."""
    short: int | None
    """Tokens of a short prompt; None where measuring one whole prompt takes long enough."""
    vocabulary: int = 2048
    intermediate: int | None = None
    """None for 8/3 of the hidden size, in whole blocks of 64 (which 4 bits need)."""
    heads: int | None = None
    """None for heads of size 64."""
    kv_heads: int | None = None
    new_tokens: int = 16

    @property
    def width(self) -> int:
        """Of the layers' inner part."""
        return self.intermediate or -(-self.hidden * 8 // (3 * BLOCK)) * BLOCK


def _published(name: str) -> Size:
    text = PUBLISHED[f"trol-{name}"]().text_config
    return Size(
        name,
        hidden=text.hidden_size,
        layers=text.num_hidden_layers,
        deep=text.num_hidden_layers,
        prompt=1300,
        short=None,
        vocabulary=text.vocab_size,
        intermediate=text.intermediate_size,
        heads=text.num_attention_heads,
        kv_heads=text.num_key_value_heads,
    )


TINY = Size("tiny", hidden=64, layers=4, deep=4, prompt=64, short=8, new_tokens=8)
SMALL = Size("small", hidden=512, layers=8, deep=12, prompt=512, short=32)
SIZES = {size.name: size for size in (TINY, SMALL, _published("1.8b"), _published("7b"))}

DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16, "nf4": torch.bfloat16}
"""Name -> the type of the activations; nf4 has weights of 4 bits."""

DEVICES = ("cpu", "cuda")

BATCHES_ON_GPU = (1, 8, 32)


@dataclass(frozen=True)
class Setting:
    """Where a suite is measured; bounds are promised for the default."""

    size: Size = SMALL
    dtype: str = "float32"
    device: str = "cpu"
    threads: int = 1
    rounds: int | None = None
    """None for as many as each suite takes by itself."""

    @property
    def name(self) -> str:
        """How it differs from the default, as in "1.8b-bf16"; empty at the default."""
        default = Setting()
        parts = [self.size.name] if self.size.name != default.size.name else []
        parts += [self.dtype] if self.dtype != default.dtype else []
        parts += [self.device] if self.device != default.device else []
        parts += [f"{self.threads}threads"] if self.threads != default.threads else []
        return "-".join(parts)

    def must(self, bound: float) -> float | None:
        """`bound` at the default setting; None elsewhere, where nothing is promised."""
        return None if self.name else bound

    def record(self) -> dict[str, object]:
        """Its entries in result files."""
        kinds = {"size": self.size.name, "dtype": self.dtype, "device": self.device}
        return {**kinds, "threads": self.threads}

    def shapes(self, rows: int) -> list[tuple[int, int]]:
        """(rows, tokens) of the prompts: one short, one whole, and `rows` of a quarter of it."""
        whole = self.size.prompt
        if self.device == "cuda":
            return [(batch, whole) for batch in BATCHES_ON_GPU]
        if self.size.short is None:
            return [(1, whole)]
        return list(dict.fromkeys([(1, self.size.short), (1, whole), (rows, whole // 4)]))

    def ids(self, rows: int, tokens: int) -> torch.Tensor:
        """Random token ids, the same each time. Shape: [B, T]."""
        source = torch.Generator().manual_seed(0)
        ids = torch.randint(3, self.size.vocabulary, (rows, tokens), generator=source)
        return ids.to(self.device)

    def check(self) -> None:
        """Raises `UsageError` unless this can be measured on this machine."""
        for kind, name, known in (("dtype", self.dtype, DTYPES), ("device", self.device, DEVICES)):
            if name not in known:
                raise unknown(kind, name, known)
        if self.device == "cuda" and not torch.cuda.is_available():
            raise UsageError("device is 'cuda', but torch finds no GPU here; give 'cpu'.")
        if self.rounds is not None and self.rounds < 2:
            raise UsageError(f"rounds is {self.rounds}, but a spread needs at least 2.")
        if self.threads < 1:
            raise UsageError(f"threads is {self.threads}; give at least 1.")


def size_of(name: str) -> Size:
    """The size of this name; `UsageError` where there is none."""
    if name not in SIZES:
        raise unknown("size", name, SIZES)
    return SIZES[name]


def cores() -> int:
    """The processor cores that this process may use."""
    usable = getattr(os, "sched_getaffinity", None)
    return len(usable(0)) if usable else os.cpu_count() or 1


CURE = "take --size small, a narrower --dtype, or a device with more"


def host(setting: Setting, *, layers: int | None = None, training: bool = False) -> Any:
    """A random Llama, sdpa, in evaluation mode; the same weights on every call.

    Raises:
        HostError: it does not fit the memory at hand; nothing was built then.
    """
    size = setting.size
    heads = size.heads or size.hidden // 64
    config = LlamaConfig(
        hidden_size=size.hidden,
        intermediate_size=size.width,
        num_hidden_layers=layers or size.layers,
        num_attention_heads=heads,
        num_key_value_heads=size.kv_heads or heads,
        vocab_size=size.vocabulary,
        max_position_embeddings=4096,
        bos_token_id=1,
        eos_token_id=2,
    )
    what = f"a host of size {size.name!r} in {setting.dtype}"
    check_fits(what, needed_bytes(setting, config, training=training), setting.device, CURE)
    torch.manual_seed(0)
    with torch.device(setting.device):
        model = AutoModelForCausalLM.from_config(
            config, dtype=DTYPES[setting.dtype], attn_implementation="sdpa"
        )
    if setting.dtype == "nf4":
        model = LlamaForCausalLM.from_pretrained(
            None,
            config=config,
            state_dict=model.state_dict(),
            dtype=DTYPES[setting.dtype],
            device_map=setting.device,
            quantization_config=quantised(4, DTYPES[setting.dtype]),
        )
    return model.eval()


def needed_bytes(setting: Setting, config: Any, *, training: bool = False) -> int:
    """At least what the weights, and in training their gradients, take while they are made.

    Four bits are made of the same weights in bfloat16, so these must fit as well.
    """
    with torch.device("meta"):
        weights = sum(p.numel() for p in LlamaForCausalLM(config).parameters())
    width = DTYPES[setting.dtype].itemsize + (0.5 if setting.dtype == "nf4" else 0)
    return int(weights * width) * (2 if training else 1)


def twin(model: Any) -> Any:
    """A copy of a model that shares its weights."""
    shared = chain(model.parameters(), model.buffers())
    return copy.deepcopy(model, {id(tensor): tensor for tensor in shared})


def idle_host(setting: Setting) -> Any:
    """A random Llama of which all layers but the lowest quarter do next to nothing."""
    model = host(setting, layers=setting.size.deep)
    for layer in model.model.layers[working_layers(setting) :]:
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            norm.weight.mul_(1e-3)  # norms keep their type where linear maps have 4 bits
    return model


def working_layers(setting: Setting) -> int:
    """How many of the lowest layers of the idle host do anything."""
    return max(1, setting.size.deep // 4)


def released_kind(size: Size) -> TrolForConditionalGeneration:
    """An InternLM2 of this size behind a vision tower that costs next to nothing."""
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=1,
        image_size=64,
        patch_size=4,
    )
    heads = size.hidden // 64
    text = InternLM2Config(
        vocab_size=size.vocabulary,
        hidden_size=size.hidden,
        intermediate_size=size.width,
        num_hidden_layers=size.layers,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 2),
        eos_token_id=2,
    )
    config = TrolConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=text.vocab_size,
        depth={"policy": "trol_mixer", "sharing": "shared"},
    )
    return TrolForConditionalGeneration(config).eval()
