"""Tokenizer files as the published checkpoints carry them, trained on a few sentences."""

import json
from functools import cache
from io import BytesIO
from pathlib import Path

import sentencepiece
from transformers import LlamaTokenizer

TEXT = """\
What digit is above the red seven? The blue digit is three, not four. Is there a seven?
Which digit is on the yellow tile? Count the red tiles, please. Yes. No. One two three four five.
You are an AI assistant, and your name is TroL. user assistant system name
A picture shows a board with nine tiles; every tile carries one handwritten digit."""
TURNS = ("[UNUSED_TOKEN_145]", "[UNUSED_TOKEN_146]")
PHI3_TOKENS = ("<|endoftext|>", "<|assistant|>", "<|system|>", "<|end|>", "<|user|>")
IMAGE_TOKENS = ("<img>", "</img>", "<IMG_CONTEXT>")


@cache
def sentence_pieces(symbols: tuple[str, ...]) -> bytes:
    """A BPE model with bytes to fall back on, and `symbols` as pieces of their own."""
    model = BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.splitlines()),
        model_writer=model,
        model_type="bpe",
        vocab_size=360,
        hard_vocab_limit=False,
        byte_fallback=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        user_defined_symbols=list(symbols),
        minloglevel=2,
    )
    return model.getvalue()


def internlm2_tokenizer(path: Path) -> int:
    """InternLM2's files: sentencepiece with the marks of turns among its pieces; its size."""
    (path / "tokenizer.model").write_bytes(sentence_pieces(TURNS))
    settings = {
        "added_tokens_decoder": {str(i): _added(t) for i, t in enumerate(("<unk>", "<s>", "</s>"))},
        "auto_map": {"AutoTokenizer": ["tokenization_internlm2.InternLM2Tokenizer", None]},
        "bos_token": "<s>",
        "clean_up_tokenization_spaces": False,
        "eos_token": "</s>",
        "pad_token": "</s>",
        "padding_side": "right",
        "tokenizer_class": "InternLM2Tokenizer",
        "unk_token": "<unk>",
    }
    _write(path / "tokenizer_config.json", settings)
    named = {name: settings[name] for name in ("bos_token", "eos_token", "pad_token", "unk_token")}
    _write(path / "special_tokens_map.json", named)
    return _pieces(path)


def phi3_tokenizer(path: Path) -> int:
    """Phi-3's files: Llama's, the special tokens added; returns the vocabulary's size."""
    (path / "tokenizer.model").write_bytes(sentence_pieces(()))
    first = _pieces(path)
    tokenizer = LlamaTokenizer.from_pretrained(path)
    tokenizer.add_tokens([*PHI3_TOKENS, *IMAGE_TOKENS], special_tokens=True)
    tokenizer.save_pretrained(path)
    added = {token: first + i for i, token in enumerate((*PHI3_TOKENS, *IMAGE_TOKENS))}
    assert added == {token: tokenizer.convert_tokens_to_ids(token) for token in added}
    known = dict(enumerate(("<unk>", "<s>", "</s>"))) | {i: token for token, i in added.items()}
    settings = {
        "add_bos_token": True,
        "add_eos_token": False,
        "added_tokens_decoder": {str(i): _added(token) for i, token in known.items()},
        "additional_special_tokens": list(added),
        "bos_token": "<s>",
        "clean_up_tokenization_spaces": False,
        "eos_token": "</s>",
        "legacy": False,
        "pad_token": "</s>",
        "padding_side": "right",
        "tokenizer_class": "LlamaTokenizer",
        "unk_token": "<unk>",
    }
    _write(path / "tokenizer_config.json", settings)
    _write(path / "added_tokens.json", added)
    return first + len(added)


def _pieces(path: Path) -> int:
    return sentencepiece.SentencePieceProcessor(str(path / "tokenizer.model")).vocab_size()


def _added(token: str) -> dict[str, object]:
    flags = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
    return {"content": token, "special": True, **flags}


def _write(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2), encoding="utf-8")
