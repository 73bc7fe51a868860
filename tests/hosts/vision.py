"""The vision-language models of the zoo: one row for each family.

Every image becomes four placeholders in the text.
"""

from .host import Host, Picture
from .text import GATED, GEMMA, HEAD, SLIDING_THEN_FULL

IMAGE, BEGIN, END, VIDEO = 95, 96, 97, 98
MARKED = (BEGIN, IMAGE, IMAGE, IMAGE, IMAGE, END)
BARE = (IMAGE, IMAGE, IMAGE, IMAGE)

TOWER = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "patch_size": 4,
}
LLAMA = GATED | {"model_type": "llama"}
QWEN_TOWER = {
    "depth": 2,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_heads": 2,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "out_hidden_size": 32,
}
QWEN_IDS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": BEGIN,
    "vision_end_token_id": END,
}
QWEN_PICTURE = Picture(
    MARKED,
    IMAGE,
    shape=(16, 96),
    extra={"image_grid_thw": ((1, 4, 4),)},
    types="mm_token_type_ids",
)
NESTED_PICTURE = Picture(MARKED, IMAGE, shape=(1, 1, 3, 16, 16))
OUTER_DEPTH = {
    "early_exit_assistant": "generate looks for num_hidden_layers in the VLM's outer config"
}
OWN_POSITIONS = OUTER_DEPTH | {
    "masked_chunks": "the bare forward derives its 3-axis positions from the whole mask, not from "
    "the new tokens: leave the mask out, or pass position_ids"
}
IMAGE_AT_ONCE = OUTER_DEPTH | {
    "chunked_prefill": "tokens of one image attend to each other both ways: an image that is cut "
    "in two is not read the same"
}


def _mrope(*section: int) -> dict:
    return {"rope_parameters": {"rope_type": "default", "mrope_section": list(section)}}


VISION_HOSTS = (
    Host(
        "llava",
        "llava",
        LLAMA,
        outer={
            "vision_config": TOWER | {"model_type": "clip_vision_model", "image_size": 8},
            "image_token_index": IMAGE,
            "image_seq_length": len(BARE),
        },
        picture=Picture(BARE, IMAGE, shape=(1, 3, 8, 8)),
        cannot=OUTER_DEPTH,
    ),
    Host(
        "idefics3",
        "idefics3",
        LLAMA,
        outer={"vision_config": TOWER | {"image_size": 16}, "image_token_id": IMAGE},
        picture=NESTED_PICTURE,
        cannot=OUTER_DEPTH,
    ),
    Host(
        "smolvlm",
        "smolvlm",
        LLAMA,
        outer={"vision_config": TOWER | {"image_size": 16}, "image_token_id": IMAGE},
        picture=NESTED_PICTURE,
        cannot=OUTER_DEPTH,
    ),
    Host(
        "internvl",
        "internvl",
        GATED | {"model_type": "qwen2"},
        outer={
            "vision_config": TOWER | {"image_size": [16, 16], "patch_size": [4, 4]},
            "image_token_id": IMAGE,
            "image_seq_length": len(BARE),
            "tie_word_embeddings": False,
        },
        picture=Picture(MARKED, IMAGE, shape=(1, 3, 16, 16)),
        cannot=OUTER_DEPTH,
    ),
    Host(
        "qwen2_5_vl",
        "qwen2_5_vl",
        GATED | _mrope(2, 1, 1),
        outer={
            "vision_config": QWEN_TOWER | {"window_size": 16, "fullatt_block_indexes": [1]},
            **QWEN_IDS,
        },
        picture=QWEN_PICTURE,
        cannot=OWN_POSITIONS,
    ),
    Host(
        "qwen3_vl",
        "qwen3_vl",
        GATED | HEAD | _mrope(2, 1, 1),
        outer={
            "vision_config": QWEN_TOWER
            | {"num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]},
            **QWEN_IDS,
        },
        picture=QWEN_PICTURE,
        cannot=OWN_POSITIONS,
    ),
    Host(
        "gemma3_vl",
        "gemma3",
        GEMMA,
        layer_types=SLIDING_THEN_FULL,
        outer={
            "vision_config": TOWER | {"model_type": "siglip_vision_model", "image_size": 16},
            "mm_tokens_per_image": len(BARE),
            "boi_token_index": BEGIN,
            "eoi_token_index": END,
            "image_token_index": IMAGE,
            "tie_word_embeddings": False,
        },
        picture=Picture(MARKED, IMAGE, shape=(1, 3, 16, 16), types="token_type_ids"),
        cannot=IMAGE_AT_ONCE,
    ),
)
