"""The published tokenizers: ids as sentencepiece has them, special tokens whole, errors named."""

import json
import re
import sys
from io import BytesIO

import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, LlamaTokenizer

from family.published.tokens import IMAGE_TOKENS, PHI3_TOKENS, TEXT, phi3_tokenizer
from trol.errors import DataError, HostError
from trol.family.published.processors import published_tokenizer

MARKS = ("[UNUSED_TOKEN_145]", "[UNUSED_TOKEN_146]")
STRINGS = [
    "What digit is above the red seven?",
    "  two  spaces, and three   ",
    "line\nline\n\n\ttab\r\n",
    "naïve café — 東京 🙂 \u200b ﬁ Ⅷ",
    "aaaaaaa aaaa eeeeee tttt",
    "▁already ▁marked",
    "<0x0A> is text, [UNUSED_TOKEN_14] too",
    " ",
    "\n",
    "",
]


def train(folder, *, symbols=MARKS, tokenizer_class="InternLM2Tokenizer", **rules):
    """A published folder's tokenizer files with a small sentencepiece model."""
    model = BytesIO()
    settings = {
        "model_type": "bpe",
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "add_dummy_prefix": False,
        "vocab_size": 420,
        "hard_vocab_limit": False,
        **rules,
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*TEXT.splitlines(), "aaaa aaa a eee tt", "line  line   "] * 3),
        model_writer=model,
        user_defined_symbols=list(symbols),
        minloglevel=2,
        **settings,
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    config = {"tokenizer_class": tokenizer_class, "pad_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("internlm2")
    return train(folder, symbols=(*MARKS, "▁▁▁")), published_tokenizer(folder)


@pytest.mark.parametrize("text", STRINGS)
def test_ids_are_those_of_sentencepiece(pair, text):
    pieces, tokenizer = pair
    ids = tokenizer(text).input_ids
    assert ids == pieces.encode(text)
    assert tokenizer.decode(ids) == text.replace("▁", " ")


@given(st.lists(st.sampled_from([*"adeghinort 179\n.▁é東🙂", *MARKS])).map("".join))
def test_any_text_with_marks_in_between_has_the_ids_of_sentencepiece(pair, text):
    pieces, tokenizer = pair
    assert tokenizer(text).input_ids == pieces.encode(text)
    assert tokenizer.decode(tokenizer(text).input_ids) == text.replace("▁", " ")


def test_control_and_image_tokens_are_whole_and_the_rest_is_sentencepiece(pair):
    pieces, tokenizer = pair
    text = "<s>[UNUSED_TOKEN_146]user\n<image><image>\n Is  it <unk>?[UNUSED_TOKEN_145]\n</s>"
    expected = []
    known = {"<unk>": [0], "<s>": [1], "</s>": [2], "<image>": [pieces.vocab_size()]}
    for part in re.split(f"({'|'.join(known)})", text):
        expected += known.get(part, pieces.encode(part))
    ids = tokenizer(text).input_ids
    assert ids == expected
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(ids, skip_special_tokens=True) == "user\n\n Is  it ?\n"


def test_it_pads_on_the_left_with_the_end_of_text_and_adds_nothing(pair):
    _, tokenizer = pair
    assert tokenizer.padding_side == "left"
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 2
    short, long = tokenizer(["is", "is the red seven"], padding=True).input_ids
    assert short[: len(long) - 1] == [2] * (len(long) - 1)
    assert tokenizer("").input_ids == []


def test_a_saved_tokenizer_needs_none_of_the_published_files(pair, tmp_path):
    _, tokenizer = pair
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    text = "<s>[UNUSED_TOKEN_146]user\n<image>\n naïve 🙂  red?[UNUSED_TOKEN_145]\n</s>"
    assert again(text).input_ids == tokenizer(text).input_ids
    assert again.decode(again(text).input_ids) == text
    assert again.padding_side == "left"


def test_a_prefix_space_comes_where_sentencepiece_puts_it(tmp_path):
    pieces = train(tmp_path, add_dummy_prefix=True)
    tokenizer = published_tokenizer(tmp_path)
    for text in ("What digit?", "red[UNUSED_TOKEN_145]blue tile", "one\ntwo"):
        assert tokenizer(text).input_ids == pieces.encode(text)
        assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_tokens_after_the_vocabulary_keep_their_ids(tmp_path):
    size = train(tmp_path).vocab_size()
    entry = {"content": "<image>", "lstrip": False, "rstrip": False, "special": True}
    config = {"tokenizer_class": "InternLM2Tokenizer", "added_tokens_decoder": {str(size): entry}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert published_tokenizer(tmp_path).convert_tokens_to_ids("<image>") == size
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<later>": size + 2}))
    with pytest.raises(DataError, match=f"'<later>' the id {size + 2}, expected {size + 1}"):
        published_tokenizer(tmp_path)


@pytest.mark.parametrize("complete", [True, False])
def test_phi3_has_the_ids_of_llama(tmp_path, complete):
    phi3_tokenizer(tmp_path)
    reference = LlamaTokenizer.from_pretrained(tmp_path)
    if not complete:
        (tmp_path / "tokenizer.json").unlink()
    tokenizer = published_tokenizer(tmp_path)
    text = (
        "<s><|user|>\n<img><IMG_CONTEXT><IMG_CONTEXT></img>\nIs  it 東京?<|end|>\n<|assistant|>\n"
    )
    ids = tokenizer(text).input_ids
    assert ids == reference(text, add_special_tokens=False).input_ids
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.convert_ids_to_tokens(ids).count("<IMG_CONTEXT>") == 2
    assert tokenizer.padding_side == "left"
    assert {*PHI3_TOKENS, *IMAGE_TOKENS} <= set(tokenizer.convert_ids_to_tokens(range(600)))
    tokenizer.save_pretrained(tmp_path / "saved")
    assert AutoTokenizer.from_pretrained(tmp_path / "saved")(text).input_ids == ids


def test_phi3_pads_with_the_end_of_text_where_nothing_is_said(tmp_path):
    phi3_tokenizer(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    del config["pad_token"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "special_tokens_map.json").unlink(missing_ok=True)
    assert published_tokenizer(tmp_path).pad_token == "</s>"


def test_a_description_is_taken_as_it_is(tmp_path):
    """A complete description may treat spaces differently from what LlamaTokenizer would make."""
    phi3_tokenizer(tmp_path)
    described = json.loads((tmp_path / "tokenizer.json").read_text())
    described["pre_tokenizer"]["prepend_scheme"] = "never"
    (tmp_path / "tokenizer.json").write_text(json.dumps(described))
    tokenizer = published_tokenizer(tmp_path)
    assert not tokenizer.convert_ids_to_tokens(tokenizer("red").input_ids)[0].startswith("▁")


def test_other_tokenizers_are_refused(tmp_path):
    train(tmp_path, tokenizer_class="QwenTokenizer")
    with pytest.raises(HostError, match="names the tokenizer 'QwenTokenizer', expected one of"):
        published_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("content", "says"),
    [(b"", "holds 0 bytes, expected a sentencepiece model"), (b"junk" * 9, "is no sentencepiece")],
)
def test_damaged_pieces_are_named(tmp_path, content, says):
    train(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(DataError, match=rf"tokenizer\.model {says}"):
        published_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    with pytest.raises(DataError, match=rf"tokenizer\.model {says}"):
        published_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match=r'tokenizer\.json has no "model"'):
        published_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("tokenizer.model", r"no .*tokenizer\.model"),
        ("tokenizer_config.json", r"tokenizer_config\.json is missing"),
    ],
)
def test_a_missing_file_is_named(tmp_path, name, says):
    train(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(DataError, match=says):
        published_tokenizer(tmp_path)


def test_missing_llama_files_are_named(tmp_path):
    train(tmp_path, tokenizer_class="LlamaTokenizerFast")
    (tmp_path / "tokenizer.model").unlink()
    with pytest.raises(DataError, match=r"neither tokenizer\.json nor tokenizer\.model"):
        published_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("rules", "says"),
    [
        ({"symbols": ()}, "no piece '.UNUSED_TOKEN_146.'"),
        ({"remove_extra_whitespaces": True}, "'remove_extra_whitespaces': True"),
        ({"normalization_rule_name": "nfkc"}, "'precompiled_charsmap': True"),
        ({"model_type": "unigram", "vocab_size": 300}, "'model_type': 1"),
        ({"byte_fallback": False, "vocab_size": 150}, "'byte_fallback': False"),
    ],
)
def test_a_model_that_cannot_be_treated_exactly_is_refused(tmp_path, rules, says):
    train(tmp_path, **rules)
    with pytest.raises(DataError, match=says):
        published_tokenizer(tmp_path)


def test_what_reads_sentencepiece_is_named_where_it_is_missing(tmp_path, monkeypatch):
    train(tmp_path)
    monkeypatch.setitem(sys.modules, "google.protobuf.message", None)
    with pytest.raises(HostError, match=r"pip install 'trol-vlm\[published\]'"):
        published_tokenizer(tmp_path)


def test_a_damaged_model_is_refused(tmp_path):
    train(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"\xff\xff not a model")
    with pytest.raises(DataError, match=r"tokenizer\.model is no sentencepiece model"):
        published_tokenizer(tmp_path)
