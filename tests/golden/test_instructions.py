"""What each benchmark adds to a question, how long answers get, and how they are read."""

import pytest

from golden.instructions import INSTRUCTIONS, answer_of, instruct, max_new_tokens, user_message
from trol.errors import UsageError

LETTER = "\nAnswer with the option's letter from the given choices directly."
PHRASE = "\nAnswer the question using a single word or phrase."
VIZWIZ = "\nWhen the provided information is insufficient, respond with 'Unanswerable'." + (
    PHRASE.replace("\n", " ")
)
CHINESE = ("mmbench_cn", "mmbench_cn_dev")
LETTERS = ("ai2d", "mmbench", "mmbench_dev", *CHINESE, "mmstar", "qbench", "seed", "sqa")
PHRASES = ("chartqa", "gqa", "pope", "vqav2")
LONG = ("llava", "mm-vet")
BARE = ("demo", "mathverse", "mathvista", "mme", "mmvet", "textvqa", "visualwebbench", *LONG)
SUFFIXES = {
    **dict.fromkeys(LETTERS, LETTER),
    **dict.fromkeys(PHRASES, PHRASE),
    **dict.fromkeys(BARE, ""),
    "vizwiz": VIZWIZ,
    "mmmu": PHRASE,
    "hallusionbench": "\nPlease answer yes or no.",
}
LENGTHS = {
    **dict.fromkeys(SUFFIXES, 5),
    **dict.fromkeys(("demo", "mathverse", "mathvista", "mmvet", "visualwebbench", "vizwiz"), 512),
    **dict.fromkeys(("llava", "LLaVA", "mm-vet", "MM-Vet"), 1024),
    "MME": 5,
}


def test_every_benchmark_adds_its_suffix():
    assert set(INSTRUCTIONS) == set(SUFFIXES)
    question = "What is the troll doing?"
    assert {name: instruct(question, name) for name in SUFFIXES} == {
        name: question + suffix for name, suffix in SUFFIXES.items()
    }


def test_every_benchmark_has_its_length():
    assert {name: max_new_tokens(name) for name in LENGTHS} == LENGTHS


@pytest.mark.parametrize("options", ["Which one?\nA. a\nB. b", "Which of A. one B. two?"])
def test_mmmu_asks_for_a_letter_where_there_are_options(options):
    assert instruct(options, "mmmu") == options + LETTER


def test_hallusionbench_does_not_ask_twice():
    question = "Is it red? Please answer yes or no."
    assert instruct(question, "hallusionbench") == question


def test_a_name_like_no_other_has_the_published_fallback():
    assert max_new_tokens("my own boards") == 512
    assert instruct("What?", "my own boards") == "What?"


@pytest.mark.parametrize(("name", "meant"), [("mmbech", "mmbench"), ("chart-qa", "chartqa")])
def test_a_slip_of_the_pen_is_named(name, meant):
    with pytest.raises(UsageError, match=f"unknown benchmark '{name}'. Did you mean '{meant}'"):
        max_new_tokens(name)
    with pytest.raises(UsageError, match="Did you mean"):
        instruct("What?", name)


@pytest.mark.parametrize("question", ["What?", "<image>\nWhat?", "<image>What?"])
def test_a_row_has_one_placeholder_for_a_picture_and_none_without(question):
    text = {"type": "text", "text": "What?" + PHRASE}
    with_picture = user_message(question, "gqa", image=True)
    assert with_picture == {"role": "user", "content": [{"type": "image"}, text]}
    assert user_message(question, "gqa", image=False) == {"role": "user", "content": [text]}


@pytest.mark.parametrize(
    ("family", "text", "answer"),
    [
        ("internlm2", "<s>x[UNUSED_TOKEN_146]assistant\nA.[UNUSED_TOKEN_145]</s>", "A."),
        ("internlm2", "assistant\nassistant\n two [UNUSED_TOKEN_145] b", "two"),
        ("internlm2", "[UNUSED_TOKEN_146]assistant\n\n A \n", "A"),
        ("internlm2", " no marker here ", "no marker here"),
        ("phi3", "A troll.<|end|>", "A troll."),
        ("phi3", "<|assistant|>\n x <|end|> y", "x"),
        ("phi3", " no marker ", "no marker"),
    ],
)
def test_an_answer_is_what_stands_between_the_marks(family, text, answer):
    assert answer_of(text, family) == answer


def test_an_unknown_family_is_named():
    with pytest.raises(UsageError, match=r"unknown family 'phi'\. Did you mean 'phi3'"):
        answer_of("x", "phi")
