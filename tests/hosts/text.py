"""The text decoders of the zoo: one row for each family."""

from .host import PAD, VOCABULARY, Host

COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GATED = COMMON | {"intermediate_size": 48, "num_key_value_heads": 2}
"""Decoders of Llama's make: a gated MLP, grouped keys and values."""
HEAD = {"head_dim": 8}
UNTIED = {"tie_word_embeddings": False}
"""Tied random models repeat their last token; opt, gpt2 and gemma3 stay tied."""
WINDOW = 6
"""Tokens of a sliding window: fewer than the rows that the laws use."""
EXPERTS = {"moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2}
GEMMA = GATED | HEAD | {"query_pre_attn_scalar": 8, "sliding_window": WINDOW}
LOCAL_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 32,
}
GPT_OSS = LOCAL_EXPERTS | {"sliding_window": WINDOW, "rope_parameters": YARN}

SLIDING_THEN_FULL = ("sliding_attention", "full_attention")

QWEN3_NEXT = EXPERTS | {
    "shared_expert_intermediate_size": 24,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
FALCON_H1 = {
    "mamba_d_ssm": 32,
    "mamba_n_heads": 4,
    "mamba_d_head": 8,
    "mamba_d_state": 8,
    "mamba_chunk_size": 8,
}

WALKS_ALL_LAYERS = {
    "early_exit_assistant": "its loop visits every layer, not layers[:num_hidden_layers]: the "
    "draft's shorter cache raises IndexError and config.num_hidden_layers stays changed"
}
STATEFUL = "generate refuses stateful models: a recurrent state cannot take tokens back"
RECURRENT = {"assisted": STATEFUL, "early_exit_assistant": STATEFUL}

TEXT_HOSTS = (
    Host("llama", "llama", GATED),
    Host("mistral", "mistral", GATED | {"sliding_window": WINDOW}),
    Host("qwen2", "qwen2", GATED),
    Host("qwen3", "qwen3", GATED | HEAD),
    Host("qwen3_moe", "qwen3_moe", GATED | HEAD | EXPERTS),
    Host("mixtral", "mixtral", GATED | LOCAL_EXPERTS),
    Host("phi3", "phi3", GATED),
    Host("gemma2", "gemma2", GEMMA | UNTIED, layer_types=SLIDING_THEN_FULL, attns=("eager",)),
    Host("gemma3", "gemma3_text", GEMMA, layer_types=SLIDING_THEN_FULL),
    Host(
        "opt",
        "opt",
        COMMON | {"ffn_dim": 64, "word_embed_proj_dim": 32, "dropout": 0.0},
        cannot=WALKS_ALL_LAYERS,
    ),
    Host(
        "gpt2",
        "gpt2",
        COMMON | {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
        positions=True,
        cannot=WALKS_ALL_LAYERS,
    ),
    Host("gpt_neox", "gpt_neox", COMMON | {"intermediate_size": 64}, cannot=WALKS_ALL_LAYERS),
    Host("falcon", "falcon", COMMON | UNTIED, cannot=WALKS_ALL_LAYERS),
    Host("bloom", "bloom", COMMON | UNTIED, attns=("eager",), cannot=WALKS_ALL_LAYERS),
    Host(
        "gpt_oss",
        "gpt_oss",
        GATED | HEAD | GPT_OSS,
        layer_types=SLIDING_THEN_FULL,
        attns=("eager",),
        cannot=WALKS_ALL_LAYERS,
    ),
    Host(
        "qwen3_next",
        "qwen3_next",
        GATED | HEAD | QWEN3_NEXT,
        layer_types=("linear_attention", "full_attention"),
        hybrid=True,
        default_exact=5e-4,
        cannot=RECURRENT,
    ),
    Host(
        "falcon_h1",
        "falcon_h1",
        GATED | HEAD | FALCON_H1,
        hybrid=True,
        default_exact=1e-4,
        cannot=RECURRENT,
    ),
)
