"""Prompts and answers written out by hand, for tests of the checks of `units`."""

from __future__ import annotations

from typing import Any

SYSTEM = (
    "You are AI model created by Byung-Kwan Lee, Ph.D. candidate, KAIST EE, of which AI model name "
    "is TroL (Traversal of Layers). You must give helpful, detailed, and polite answers to the "
    "user's questions"
)
ANSWERS = {
    "internlm2": [
        ["<s>x[UNUSED_TOKEN_146]assistant\nA troll.[UNUSED_TOKEN_145]</s>", "A troll."],
        ["assistant\nassistant\n two [UNUSED_TOKEN_145] b", "two"],
        [" no marks ", "no marks"],
    ],
    "phi3": [["<|assistant|>\n x <|end|> y", "x"], ["A troll.<|end|>", "A troll."]],
}
RULES = {
    "internlm2": {
        "system_start": "<s>[UNUSED_TOKEN_146]system\n",
        "system_end": "[UNUSED_TOKEN_145]",
        "user_start": "[UNUSED_TOKEN_146]user\n",
        "user_end": "[UNUSED_TOKEN_145]",
        "assistant_start": "[UNUSED_TOKEN_146]assistant\n",
        "assistant_end": "[UNUSED_TOKEN_145]\n</s>",
        "test_start": "assistant\n",
        "test_end": "[UNUSED_TOKEN_145]",
        "split": "\n",
    },
    "phi3": {
        "system_start": "<s><|system|>\n",
        "system_end": "<|end|>",
        "user_start": "<|user|>\n",
        "user_end": "<|end|>",
        "assistant_start": "<|assistant|>\n",
        "assistant_end": "<|end|>\n</s>",
        "test_start": "<|assistant|>\n",
        "test_end": "<|end|>",
        "split": "\n",
    },
}
ASKED = {
    "demo": {"What is it?": "What is it?", "<image>\nIs it red?": "<image>\nIs it red?"},
    "gqa": {
        "<image>\nIs it red?": "<image><image>\nIs it red?\n"
        "Answer the question using a single word or phrase."
    },
    "hallusionbench": {
        "Is it red?": "Is it red?\nPlease answer yes or no.",
        "Is it red? Please answer yes or no.": "Is it red? Please answer yes or no.",
    },
}
"""Benchmark -> question -> what the user says; gqa's has upstream's second <image>."""

BUNDLES = [
    ["x<image>y", "<image>", 3, "x<image><image><image>y"],
    ["<image><image>", "<image>", 2, "<image><image><image><image>"],
    [
        "<img><IMG_CONTEXT></img>\nq",
        "<IMG_CONTEXT>",
        2,
        "<img><IMG_CONTEXT><IMG_CONTEXT></img>\nq",
    ],
]
"""Text, image token, tokens of an image, text with as many."""


def filtering() -> tuple[dict[str, Any], dict[str, Any]]:
    """Decoded texts and their answers; no tensors."""
    return {}, {"output_filtering": ANSWERS}


def prompts() -> dict[str, Any]:
    """The file of prompts, section by section."""
    return {
        "add_bundle_tokens": BUNDLES,
        "eval_process_texts": {},
        "make_instruction": {
            family: {name: _asked(rule, texts) for name, texts in ASKED.items()}
            for family, rule in RULES.items()
        },
        "max_new_tokens": {"mme": 5, "demo": 512, "llava": 1024},
        "prompt_rule": RULES,
        "questions": sorted({question for texts in ASKED.values() for question in texts}),
    }


def _asked(rule: dict[str, str], texts: dict[str, str]) -> dict[str, str]:
    system = f"{rule['system_start']}{SYSTEM}{rule['system_end']}\n"
    start, end = rule["user_start"], f"{rule['user_end']}\n{rule['assistant_start']}"
    return {question: f"{system}{start}{said}{end}" for question, said in texts.items()}
