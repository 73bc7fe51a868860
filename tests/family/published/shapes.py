"""The names and shapes of the published checkpoints' weights, at tiny size."""

HIDDEN, LAYERS, HEADS, KV_HEADS, INNER, RANK = 64, 3, 4, 2, 128, 4
VISION_HIDDEN, VISION_LAYERS, VISION_INNER, VISION_HEADS, PATCH, GRID = 16, 2, 24, 2, 4, 4

Shapes = dict[str, tuple[int, ...]]


def internlm2_shapes(vocab_size: int) -> Shapes:
    """Every weight of the InternLM2 layout but the gates."""
    head = HIDDEN // HEADS
    shapes = {"model.tok_embeddings.weight": (vocab_size + 1, HIDDEN)}
    maps = {
        "attention.wqkv": ((HEADS + 2 * KV_HEADS) * head, HIDDEN),
        "attention.wo": (HIDDEN, HEADS * head),
        "feed_forward.w1": (INNER, HIDDEN),
        "feed_forward.w2": (HIDDEN, INNER),
        "feed_forward.w3": (INNER, HIDDEN),
    }
    for layer in (f"model.layers.{i}" for i in range(LAYERS)):
        shapes |= {f"{layer}.{name}.weight": (HIDDEN,) for name in ("attention_norm", "ffn_norm")}
        for name, (out, into) in maps.items():
            shapes[f"{layer}.{name}.ffn.weight"] = (out, into)
            shapes[f"{layer}.{name}.lora_A.weight"] = (RANK, into)
            shapes[f"{layer}.{name}.lora_B.weight"] = (out, RANK)
    shapes |= {"model.norm.weight": (HIDDEN,), "output.weight": (vocab_size, HIDDEN)}
    shapes |= _linear("vision_proj.0", HIDDEN, VISION_HIDDEN) | _linear(
        "vision_proj.2", HIDDEN, HIDDEN
    )
    return shapes | _clip_shapes("vit.vision_tower.vision_model.")


def _clip_shapes(prefix: str) -> Shapes:
    size = VISION_HIDDEN
    shapes: Shapes = {
        "embeddings.class_embedding": (size,),
        "embeddings.patch_embedding.weight": (size, 3, PATCH, PATCH),
        "embeddings.position_embedding.weight": (GRID * GRID + 1, size),
    }
    shapes |= _norm("pre_layrnorm", size) | _norm("post_layernorm", size)
    for layer in (f"encoder.layers.{i}" for i in range(VISION_LAYERS)):
        for part in ("k_proj", "v_proj", "q_proj", "out_proj"):
            shapes |= _linear(f"{layer}.self_attn.{part}", size, size)
        shapes |= _norm(f"{layer}.layer_norm1", size) | _norm(f"{layer}.layer_norm2", size)
        shapes |= _linear(f"{layer}.mlp.fc1", VISION_INNER, size)
        shapes |= _linear(f"{layer}.mlp.fc2", size, VISION_INNER)
    return {prefix + name: shape for name, shape in shapes.items()}


def phi3_shapes(vocab_size: int) -> Shapes:
    """Every weight of the Phi-3 layout but the gates."""
    head, language = HIDDEN // HEADS, "language_model.model"
    shapes: Shapes = {f"{language}.embed_tokens.weight": (vocab_size, HIDDEN)}
    for layer in (f"{language}.layers.{i}" for i in range(LAYERS)):
        shapes |= {
            f"{layer}.input_layernorm.weight": (HIDDEN,),
            f"{layer}.post_attention_layernorm.weight": (HIDDEN,),
            f"{layer}.self_attn.qkv_proj.weight": ((HEADS + 2 * KV_HEADS) * head, HIDDEN),
            f"{layer}.self_attn.o_proj.weight": (HIDDEN, HEADS * head),
            f"{layer}.mlp.gate_up_proj.weight": (2 * INNER, HIDDEN),
            f"{layer}.mlp.down_proj.weight": (HIDDEN, INNER),
        }
    shapes |= {f"{language}.norm.weight": (HIDDEN,)}
    shapes |= {"language_model.lm_head.weight": (vocab_size, HIDDEN)}
    shapes |= _norm("vision_proj.0", 4 * VISION_HIDDEN)
    shapes |= _linear("vision_proj.1", HIDDEN, 4 * VISION_HIDDEN)
    return shapes | _linear("vision_proj.3", HIDDEN, HIDDEN) | _internvit_shapes("vision_model.")


def _internvit_shapes(prefix: str) -> Shapes:
    size = VISION_HIDDEN
    shapes: Shapes = {
        "embeddings.class_embedding": (1, 1, size),
        "embeddings.position_embedding": (1, GRID * GRID + 1, size),
        "embeddings.patch_embedding.weight": (size, 3, PATCH, PATCH),
        "embeddings.patch_embedding.bias": (size,),
    }
    for layer in (f"encoder.layers.{i}" for i in range(VISION_LAYERS)):
        shapes |= {f"{layer}.ls1": (size,), f"{layer}.ls2": (size,)}
        shapes |= _norm(f"{layer}.norm1", size) | _norm(f"{layer}.norm2", size)
        shapes |= _linear(f"{layer}.attn.qkv", 3 * size, size)
        shapes |= _linear(f"{layer}.attn.proj", size, size)
        shapes |= _linear(f"{layer}.mlp.fc1", VISION_INNER, size)
        shapes |= _linear(f"{layer}.mlp.fc2", size, VISION_INNER)
    return {prefix + name: shape for name, shape in shapes.items()}


def _norm(name: str, size: int) -> Shapes:
    return {f"{name}.weight": (size,), f"{name}.bias": (size,)}


def _linear(name: str, out: int, into: int) -> Shapes:
    return {f"{name}.weight": (out, into), f"{name}.bias": (out,)}
