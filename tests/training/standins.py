"""Small folders that stand in for what recipes name: the same classes, random weights."""

import json
from pathlib import Path

import torch
from PIL import Image
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModel,
    Idefics3Processor,
    LlavaProcessor,
    Phi3Config,
    Phi3ForCausalLM,
)
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.internvl.configuration_internvl import InternVLVisionConfig
from transformers.models.internvl.modeling_internvl import InternVLVisionModel

from family.published.folders import internlm2_config, write_weights
from family.published.shapes import internlm2_shapes
from family.published.tokens import internlm2_tokenizer, phi3_tokenizer
from hosts.vision import LLAMA, TOWER
from trol.family import word_tokenizer
from trol.family.processing import CHAT_TEMPLATE

ASKED = ["which digit is it?", "is it red or blue?", "what comes next?", "say a word."]
ANSWERED = ["7", "red", "nothing", "word"]
TEXT = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def chats(folder: Path, *, pictures: bool, rows: int = 8) -> str:
    """A chat file of two turns a row; with pictures, every other row has one."""
    folder.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (40, 30), "red").save(folder / "red.png")
    lines = []
    for row in range(rows):
        seen = pictures and row % 2 == 0
        messages = []
        for turn in (row, row + 1):
            mark = "<image>\n" if seen and turn == row else ""
            turn_texts = zip(
                ("user", "assistant"), (ASKED[turn % 4], ANSWERED[turn % 4]), strict=True
            )
            messages += [
                {"role": role, "content": mark * (role == "user") + text}
                for role, text in turn_texts
            ]
        lines.append(json.dumps({"messages": messages, **({"image": "red.png"} if seen else {})}))
    path = folder / "chat.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def llm(folder: Path, model_type: str = "llama", **settings) -> str:
    """A text decoder with a tokenizer of words and a chat template."""
    tokenizer = word_tokenizer([*ASKED, *ANSWERED])
    tokenizer.chat_template = CHAT_TEMPLATE
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        model_type, vocab_size=len(tokenizer), **{**TEXT, **settings}, tie_word_embeddings=False
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def vlm(folder: Path) -> str:
    """A LLaVA of 8 x 8 pixels: four image tokens a picture."""
    tokenizer = word_tokenizer([*ASKED, *ANSWERED])
    image = tokenizer.convert_tokens_to_ids("<image>")
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "llava",
        text_config={**LLAMA, **TEXT, "vocab_size": len(tokenizer)},
        vision_config=TOWER | {"model_type": "clip_vision_model", "image_size": 8},
        image_token_index=image,
        image_seq_length=4,
        tie_word_embeddings=False,
    )
    AutoModelForImageTextToText.from_config(config).save_pretrained(folder)
    LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8}),
        tokenizer,
        patch_size=4,
        vision_feature_select_strategy="default",
        image_token="<image>",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(folder)
    return str(folder)


def idefics3(folder: Path) -> str:
    """An Idefics3, SmolVLM's class, of 16 x 16 pixels: four image tokens a picture."""
    tokenizer = word_tokenizer([*ASKED, *ANSWERED])
    marks = ["<fake_token_around_image>", "<global-img>", "<end_of_utterance>"]
    tokenizer.add_tokens(marks, special_tokens=True)
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "idefics3",
        text_config={**LLAMA, **TEXT, "vocab_size": len(tokenizer)},
        vision_config=TOWER | {"image_size": 16},
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        tie_word_embeddings=False,
    )
    AutoModelForImageTextToText.from_config(config).save_pretrained(folder)
    images = Idefics3ImageProcessorPil(
        size={"longest_edge": 16}, max_image_size={"longest_edge": 16}, do_image_splitting=False
    )
    processor = Idefics3Processor(images, tokenizer, image_seq_len=4, chat_template=CHAT_TEMPLATE)
    processor.save_pretrained(folder)
    return str(folder)


def clip(folder: Path) -> str:
    """A CLIP tower of another resolution than the published one."""
    tower = {k: v for k, v in TOWER.items() if k != "patch_size"}
    config = CLIPVisionConfig(**tower, patch_size=70, image_size=210)
    torch.manual_seed(0)
    CLIPVisionModel(config).save_pretrained(folder)
    return str(folder)


def internvit(folder: Path) -> str:
    """An InternViT of the published resolution and large patches."""
    tower = {k: v for k, v in TOWER.items() if k != "patch_size"}
    config = InternVLVisionConfig(
        **tower, patch_size=112, image_size=448, attention_bias=True, use_mean_pooling=True
    )
    torch.manual_seed(0)
    InternVLVisionModel(config).save_pretrained(folder)
    return str(folder)


def internlm2(folder: Path) -> str:
    """InternLM2 in its own layout, which transformers cannot open."""
    folder.mkdir(parents=True)
    vocabulary = internlm2_tokenizer(folder)
    config = internlm2_config(vocabulary)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, shape in internlm2_shapes(vocabulary).items():
        if not name.startswith(("model.", "output.")) or ".lora_" in name:
            continue
        rows = (vocabulary, *shape[1:]) if "tok_embeddings" in name else shape
        values = 0.15 * torch.randn(rows, generator=generator) + (len(shape) == 1)
        tensors[name.replace(".ffn.weight", ".weight")] = values
    write_weights(folder, tensors, "safetensors", 1)
    return str(folder)


def phi3(folder: Path) -> str:
    """Phi-3 in transformers' own layout."""
    folder.mkdir(parents=True)
    vocabulary = phi3_tokenizer(folder)
    torch.manual_seed(0)
    Phi3ForCausalLM(Phi3Config(**TEXT, vocab_size=vocabulary + 8)).save_pretrained(folder)
    return str(folder)
