"""Attach TroL, a skip plan and an exit to three different hosts; print traces and cost.

    python examples/attach_any_model.py

The hosts are small random models, made here; with a network, put any
`AutoModelForCausalLM.from_pretrained(...)` in their place.
"""

import torch
from transformers import AutoConfig, AutoModelForCausalLM

import trol

torch.set_num_threads(1)

HOSTS = {
    "llama": {"intermediate_size": 256, "num_key_value_heads": 2},
    "qwen3": {"intermediate_size": 256, "num_key_value_heads": 2, "head_dim": 32},
    "gpt2": {"n_positions": 256},
}
SIZES = {"hidden_size": 128, "num_hidden_layers": 8, "num_attention_heads": 4, "vocab_size": 256}
POLICIES = {
    "TroL on the question": trol.TrolMixer(passes=2, scope="question"),
    "skip every other layer": "0 2 4 6-7",
    "exit before layer 5": "exit@5",
}


def build(family: str) -> torch.nn.Module:
    """A random model of this family with 8 layers."""
    torch.manual_seed(0)
    ends = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 0)
    config = AutoConfig.for_model(family, **SIZES, **HOSTS[family], **ends)
    return AutoModelForCausalLM.from_config(config).eval()


def main() -> None:
    """Every policy on every host: visits of the last prompt token and of the first new one."""
    prompt = torch.arange(1, 13)[None]
    inputs = {"input_ids": prompt, "attention_mask": torch.ones_like(prompt)}
    for family in HOSTS:
        model = build(family)
        with torch.no_grad():
            plain = model(**inputs).logits
        print(f"\n{family} ({type(model).__name__})")
        for name, policy in POLICIES.items():
            trol.attach(model, policy)
            with trol.trace(model) as trace:
                model.generate(**inputs, max_new_tokens=4, do_sample=False)
            trol.detach(model)
            visits = trace.visits[:, 0]  # Shape: [L, T]
            asked, answered = prompt.shape[1] - 1, prompt.shape[1]
            print(f"  {name}")
            print(f"    visits, a question token: {visits[:, asked].tolist()}")
            print(f"    visits, an answer token:  {visits[:, answered].tolist()}")
            print(f"    {trace.cost}")
        with torch.no_grad():
            same = torch.equal(model(**inputs).logits, plain)
        print(f"  detached: {'the very same logits' if same else 'DIFFERENT LOGITS'}")


if __name__ == "__main__":
    main()
