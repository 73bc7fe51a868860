"""A tiny decoder with a tokenizer of words, questions for it, and rows that nobody generated."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from trol.evaluation.items import Item
from trol.evaluation.oracle import Menu
from trol.evaluation.store import OracleRow
from trol.family import word_tokenizer
from trol.family.processing import CHAT_TEMPLATE

WORDS = (
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "what",
    "is",
)


def decoder(layers: int = 4) -> tuple[Any, Any]:
    """A random model whose answers differ from level to level, and some of which end early."""
    tokenizer = word_tokenizer([" ".join(WORDS)])
    tokenizer.chat_template = CHAT_TEMPLATE
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        bos_token_id=1,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.25)
    return model, tokenizer


def items(count: int = 7) -> list[Item]:
    """Questions of different lengths and two types."""
    return [
        Item(None, " ".join(WORDS[i % 3 : 2 * i + 1]), WORDS[i], "even" if i % 2 == 0 else "odd")
        for i in range(1, count + 1)
    ]


def rows_of(
    scores: Sequence[Sequence[float]],
    menu: Menu,
    *,
    drawn: Sequence[Sequence[float]] = (),
    types: Sequence[str] = (),
    metric: str = "rougeL",
) -> list[OracleRow]:
    """Rows with these scores, [N][J], and of the answers drawn at full depth, [N][S]."""
    rows = []
    full = menu.levels[menu.full]
    for item, mine in enumerate(scores):
        kind = types[item] if types else "one"
        scored = [(0, level, score) for level, score in zip(menu.levels, mine, strict=True)]
        scored += [
            (n, full, score) for n, score in enumerate(drawn[item] if drawn else (), start=1)
        ]
        rows += [
            OracleRow(item, "q", "r", "a", kind, level.text, level.cost, sample, 3, {metric: score})
            for sample, level, score in scored
        ]
    return rows
