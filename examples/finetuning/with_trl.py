"""TRL's SFTTrainer trains a host with TroL attached: first the gates alone, then all of it.

    pip install trl
    python examples/finetuning/with_trl.py

The host is a small random Llama with a tokenizer made here; with a network, put any
`AutoModelForCausalLM.from_pretrained(...)` and its tokenizer in their place.
"""

import tempfile

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, PrinterCallback
from trl import SFTConfig, SFTTrainer

import trol

torch.set_num_threads(1)

WORDS = ["<pad>", "<end>", "what", "follows", "?", *map(str, range(10))]
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + ' <end>' }}{% endgeneration %}"
    "{% else %}{{ m['content'] + ' ? ' }}{% endif %}{% endfor %}"
)


def build() -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """A random Llama and a tokenizer of whole words."""
    torch.manual_seed(0)
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, "<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<end>", chat_template=TEMPLATE
    )
    config = LlamaConfig(
        vocab_size=len(WORDS), hidden_size=64, intermediate_size=128, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, pad_token_id=0, bos_token_id=1,
        eos_token_id=1,
    )  # fmt: skip
    return LlamaForCausalLM(config), tokenizer


def conversations() -> Dataset:
    """ "what follows 3 4 5 ?" is answered with "6"."""
    rows = [[(first + i) % 10 for i in range(4)] for first in range(10)] * 8
    told = [
        [
            {"role": "user", "content": f"what follows {a} {b} {c}"},
            {"role": "assistant", "content": str(d)},
        ]
        for a, b, c, d in rows
    ]
    return Dataset.from_dict({"messages": told})


def fit(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, steps: int) -> list[float]:
    """One step of TroL's two, on TRL's trainer; returns the losses."""
    with tempfile.TemporaryDirectory() as folder:
        settings = SFTConfig(
            output_dir=folder, max_steps=steps, learning_rate=3e-3, assistant_only_loss=True,
            per_device_train_batch_size=16, logging_steps=1, report_to=[], save_strategy="no",
            disable_tqdm=True, gradient_checkpointing=False, dataset_num_proc=None,
            dataloader_pin_memory=False, bf16=False, use_cpu=not torch.cuda.is_available(),
        )  # fmt: skip
        data = conversations()
        trainer = SFTTrainer(model, args=settings, train_dataset=data, processing_class=tokenizer)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def main() -> None:
    """Both steps; then the gates, and whether the answers are right."""
    model, tokenizer = build()
    trol.attach(model, trol.TrolMixer(passes=2, scope="question"))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".depth." in name)
    before = {name: p.clone() for name, p in model.named_parameters()}
    losses = fit(model, tokenizer, steps=5)
    moved = {name for name, p in model.named_parameters() if not torch.equal(before[name], p)}
    print(f"gates alone: loss {losses[0]:.3f} -> {losses[-1]:.3f}; {len(moved)} tensors moved,")
    print(f"    all of them gates: {all('.depth.' in name for name in moved)}")
    losses = fit(model.requires_grad_(True), tokenizer, steps=60)
    print(f"everything:  loss {losses[0]:.3f} -> {losses[-1]:.3f}")

    model.eval()
    prompt = tokenizer("what follows 3 4 5 ?", return_tensors="pt")
    prompt = {key: prompt[key].to(model.device) for key in ("input_ids", "attention_mask")}
    with trol.trace(model) as trace:
        out = model.generate(**prompt, max_new_tokens=2, do_sample=False)
    print(f"answer: {tokenizer.decode(out[0, prompt['input_ids'].shape[1] :])}")
    print(f"visits of the question: {trace.visits[:, 0, 0].tolist()}")


if __name__ == "__main__":
    main()
