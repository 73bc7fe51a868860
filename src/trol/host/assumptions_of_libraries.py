"""Rows of the table of assumptions: loading, saving, Trainer, PEFT, accelerate, bitsandbytes."""

import tempfile
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.utils.chat_template_utils import render_jinja_template

from trol.host import classes, trial, weights
from trol.host.chat_templates import IN_PIECES, PIECES

LIBRARIES: list[trial.Assumption] = []
used_by = partial(trial.row, LIBRARIES)


@used_by("host/classes.py declare_tied: shared gates are saved once", at_attach=True)
def tied() -> str | None:
    """Which parameters are one is a dictionary: of the class, and of each model."""
    tied_keys = LlamaForCausalLM._tied_weights_keys
    return None if isinstance(tied_keys, dict) else f"_tied_weights_keys is {tied_keys!r}"


@used_by("host/classes.py tied_names; family/loading.py")
def all_tied() -> str | None:
    """A model lists under all_tied_weights_keys which of its parameters are another one's."""
    names = classes.tied_names(trial.tiny_model(tie_word_embeddings=True))
    return trial.differs("of a tied Llama", names, {"lm_head.weight"})


@used_by("host/chat_templates.py: which words a conversation trains, and roles")
def marks() -> str | None:
    """A rendered template tells where {% generation %} was, and reads any key of a message."""
    rendered: Any = render_jinja_template(
        [[{"role": "user", "content": "", PIECES: ["ask ", "say", "!"]}]],
        chat_template=IN_PIECES,
        return_assistant_tokens_mask=True,
    )
    return trial.differs("of a text in pieces", rendered, (["ask say!"], [[(4, 7)]]))


class _WithModule(LlamaForCausalLM):
    """A model with a module of its own, and a count of how often that was initialised."""

    initialised = 0

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.own = nn.Linear(8, 1)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if module is getattr(self, "own", None):
            type(self).initialised += 1
        super()._init_weights(module)


@used_by("depth/stack.py _init_weights: gates keep what was saved, or have first values")
def draws_what_is_missing() -> str | None:
    """_init_weights is asked for modules that a checkpoint lacks, and changes no others."""
    model = trial.tiny_model(_WithModule)
    state = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    whole: Any = _WithModule.from_pretrained(None, config=model.config, state_dict=dict(state))
    unchanged = all(torch.equal(tensor, state[name]) for name, tensor in whole.state_dict().items())
    _WithModule.initialised = 0
    partly = {name: tensor for name, tensor in state.items() if not name.startswith("own.")}
    _WithModule.from_pretrained(None, config=model.config, state_dict=partly)
    asked = bool(_WithModule.initialised)
    if unchanged and asked:
        return None
    return f"kept what was there: {unchanged}; asked for what was missing: {asked}"


class _Lazy:
    """A tensor that is read by `[...]`, and has no other method."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor

    def __getitem__(self, index: Any) -> torch.Tensor:
        return self.tensor[index]


@used_by("family/published/opening.py: tensors are read one at a time")
def asks_for_all() -> str | None:
    """from_pretrained asks nothing but `[...]` of the values of a state dict."""
    model = trial.tiny_model(dtype="float32")
    lazy: Any = {name: _Lazy(tensor) for name, tensor in model.state_dict().items()}
    opened: Any = LlamaForCausalLM.from_pretrained(None, config=model.config, state_dict=lazy)
    return None if torch.equal(opened.lm_head.weight, model.lm_head.weight) else "other weights"


class _StandInRotaryEmbedding(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config, self.rope_type = config, "longrope"
        for name in ("inv_freq", "original_inv_freq"):
            self.register_buffer(name, torch.zeros(2), persistent=False)


@used_by("family/generation.py: rotary tables after loading")
def fills_rotary() -> str | None:
    """The buffers of every class named ...RotaryEmbedding are filled by its rope_type."""
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 8}
    rope |= {"short_factor": [1.0] * 2, "long_factor": [2.0] * 2, "factor": 4.0}
    config = trial.tiny_config(rope_parameters=rope)
    short, long = (ROPE_INIT_FUNCTIONS["longrope"](config, None, seq_len=n)[0] for n in (4, 16))
    if not torch.allclose(short, 2 * long):
        return f"longrope gives {short.tolist()} before its switch, {long.tolist()} after"
    stand_in: Any = _StandInRotaryEmbedding(config)
    PreTrainedModel._init_weights(trial.tiny_model(), stand_in)
    same = torch.equal(stand_in.inv_freq, short)
    return None if same else f"inv_freq is {stand_in.inv_freq.tolist()}"


@used_by("checkpoints/export.py, training/opening.py: configurations that cannot be")
def strict_errors() -> str | None:
    """A configuration that contradicts itself raises StrictDataclassError or ValueError."""
    from huggingface_hub.errors import StrictDataclassError  # noqa: PLC0415

    try:
        trial.tiny_config(num_attention_heads=3)
    except (StrictDataclassError, ValueError):
        return None
    return "a Llama of width 8 with 3 heads was taken"


@used_by("host/classes.py check_hooks, specialise: hooked layers are traversed")
def hooks() -> str | None:
    """accelerate's hooks put a forward on the object and keep the former one beside it."""
    from accelerate.hooks import ModelHook, add_hook_to_module  # noqa: PLC0415

    module = nn.Linear(2, 2)
    add_hook_to_module(module, ModelHook())
    missing = [name for name in ("forward", classes.HOOKED_FORWARD) if name not in vars(module)]
    return f"a hooked module has no {missing} of its own" if missing else None


@used_by("host/weights.py running_device: gates of offloaded layers")
def execution_device() -> str | None:
    """accelerate's hooks on an offloaded model say where its modules compute."""
    from accelerate import cpu_offload  # noqa: PLC0415

    model: Any = cpu_offload(trial.tiny_model(), execution_device=torch.device("cpu"))
    layer = model.model.layers[0]
    if not next(layer.parameters()).is_meta:
        return "the weights of an offloaded layer stay where they were"
    return trial.differs("where it computes", str(weights.running_device(layer)), "cpu")


@used_by("host/classes.py rebind_wrappers: roles under prompt tuning that came first")
def kept_method() -> str | None:
    """PEFT's prompt learning keeps the model's prepare_inputs_for_generation on the wrapper."""
    from peft import PromptTuningConfig, get_peft_model  # noqa: PLC0415

    model = trial.tiny_model()
    tuning = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=1)
    method = vars(get_peft_model(model, tuning)).get(classes.ORIGINAL_PREPARES)
    return (
        None
        if getattr(method, "__self__", None) is model
        else f"{classes.ORIGINAL_PREPARES} is {method!r}"
    )


@used_by("host/weights.py forget_quantisation: hosts from GGUF files are saved")
def forgets_quantisation() -> str | None:
    """A quantiser takes off a model what says that it is quantised."""
    from transformers.quantizers.base import HfQuantizer  # noqa: PLC0415

    taken = trial.parameters(HfQuantizer.remove_quantization_config)
    return trial.differs("remove_quantization_config takes", taken, ["self", "model"])


@used_by("host/classes.py trained_copy: gates in training under PEFT")
def modules_to_save() -> str | None:
    """PEFT's modules_to_save keeps copies of a module, and the first active one runs."""
    from peft import LoraConfig, get_peft_model  # noqa: PLC0415

    config = LoraConfig(r=1, target_modules=["q_proj"], modules_to_save=["o_proj"])
    learner = get_peft_model(trial.tiny_model(), config)
    wrapped = next(m for name, m in learner.named_modules() if name.endswith("0.self_attn.o_proj"))
    copy: Any = classes.trained_copy(wrapped)
    calls: list[int] = []
    copy.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        learner(trial.ids())
    if copy is wrapped or not copy.weight.requires_grad:
        return f"{type(wrapped).__name__} has no copy that learns"
    return trial.differs("calls of the copy in one pass", len(calls), 1)


@used_by("host/classes.py lora_b_maps; training/adapters.py")
def low_rank_maps() -> str | None:
    """PEFT calls a module lora_B.NAME for each low-rank update."""
    from peft import LoraConfig, get_peft_model  # noqa: PLC0415

    learner = get_peft_model(trial.tiny_model(), LoraConfig(r=1, target_modules=["q_proj"]))
    calls: list[int] = []
    for update in classes.lora_b_maps(learner, "default"):
        update.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        learner(trial.ids())
    return trial.differs("calls in one pass of two layers", len(calls), 2)


@used_by("host/trainer.py: checkpoints, and resuming them bit for bit")
def checkpoints() -> str | None:
    """Trainer writes checkpoints by these methods, and counts between logs under these names."""
    from transformers import PrinterCallback, Trainer, TrainingArguments  # noqa: PLC0415

    from trol.host.trainer import COUNTERS, OVERRIDDEN, SWITCHES  # noqa: PLC0415

    with tempfile.TemporaryDirectory() as folder:
        settings: Any = {"use_cpu": True, "report_to": [], "max_steps": 1, "logging_steps": 2}
        arguments = TrainingArguments(folder, **settings, save_strategy="no", disable_tqdm=True)
        rows: Any = [{"input_ids": trial.ids()[0], "labels": trial.ids()[0]}]
        trainer = Trainer(trial.tiny_model(), arguments, train_dataset=rows)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    names = (*COUNTERS.values(), *OVERRIDDEN, *SWITCHES)
    missing = [name for name in names if not hasattr(trainer, name)]
    return f"Trainer has no {missing}" if missing else None


@used_by("host/sharding.py: FSDP2 by accelerate's own code, on CPUs too")
def fsdp_plugin() -> str | None:
    """accelerate's plugin for FSDP2 has these settings, and its state takes one put there."""
    from accelerate import DistributedType, FullyShardedDataParallelPlugin  # noqa: PLC0415
    from accelerate.state import AcceleratorState  # noqa: PLC0415

    plugin = FullyShardedDataParallelPlugin(fsdp_version=2)
    settings = ("auto_wrap_policy", "transformer_cls_names_to_wrap", "ignored_modules")
    settings += ("mixed_precision_policy", "activation_checkpointing", "cpu_ram_efficient_loading")
    missing = [one for one in settings if not hasattr(plugin, one)]
    if "fsdp_plugin" not in AcceleratorState._known_attrs or not hasattr(DistributedType, "FSDP"):
        missing.append("a place in AcceleratorState")
    return f"the plugin has no {missing}" if missing else None


@used_by("host/sharding.py: shares of parameters, and batches in which other parts take part")
def fsdp_modules() -> str | None:
    """A module under torch's FSDP2 can reduce zeros for parameters that took no part."""
    from torch.distributed.fsdp import FSDPModule  # noqa: PLC0415

    name = "set_reduce_scatter_unused_params"
    return None if hasattr(FSDPModule, name) else f"FSDPModule has no {name}"


@used_by("host/trainer.py divides_by_tokens: the loss of a whole batch")
def trainer_divides() -> str | None:
    """Trainer hands num_items_in_batch to a loss."""
    from transformers import Trainer  # noqa: PLC0415

    return trial.lacks(Trainer.compute_loss, "num_items_in_batch")


@used_by("host/weights.py: gradients pass through 4-bit weights on a CPU")
def packs_for_cpu() -> str | None:
    """bitsandbytes says on each 4-bit map whether it packs for a CPU, and can unpack."""
    if find_spec("bitsandbytes") is None:
        return None
    from bitsandbytes import functional  # noqa: PLC0415 - an optional dependency
    from bitsandbytes.nn.modules import Linear4bit  # noqa: PLC0415

    if not hasattr(Linear4bit(64, 64), weights.PACKS_FLAG):
        return f"Linear4bit has no {weights.PACKS_FLAG}"
    unpack = "_convert_weight_packed_for_cpu_inverse"
    return None if hasattr(functional, unpack) else f"bitsandbytes.functional has no {unpack}"
