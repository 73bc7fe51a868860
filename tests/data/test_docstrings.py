"""Docstrings: pairs from the library's sources, the same always, in splits that share nothing."""

import ast
import subprocess
import sys

import pytest

from trol.data.own_files import SPLITS
from trol.data.pairs import WORDS, _inside, docstring_pairs, first_sentence
from trol.errors import UsageError


def test_splits_share_no_question_and_no_answer() -> None:
    pairs = {split: docstring_pairs(split) for split in SPLITS}
    for key in ("question", "answer"):
        seen = [{getattr(pair, key) for pair in pairs[split]} for split in SPLITS]
        assert sum(map(len, seen)) == len(set.union(*seen))
    assert len(pairs["train"]) > 2500
    assert min(len(pairs["validation"]), len(pairs["test"])) > 500


def test_the_order_follows_from_the_seed_and_the_split_does_not() -> None:
    once, again, other = (docstring_pairs("test", seed=seed) for seed in (3, 3, 4))
    assert once == again
    assert once != other
    assert set(once) == set(other)
    assert docstring_pairs("test", limit=5, seed=3) == once[:5]


def test_another_process_makes_the_same_pairs() -> None:
    code = "from trol.data.pairs import docstring_pairs as d; print(d('validation')[:40])"
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert there.stdout.strip() == repr(docstring_pairs("validation")[:40])


def test_questions_are_of_every_type_and_short() -> None:
    pairs = [pair for split in SPLITS for pair in docstring_pairs(split)]
    assert {p.type for p in pairs} == {"module", "class", "function", "method", "property"}
    assert all(WORDS[0] <= len(p.answer.split()) <= WORDS[1] for p in pairs)
    assert all(len(p.question) <= 140 and p.question.endswith("?") for p in pairs)
    known = {p.question: p.answer for p in pairs}
    assert known["What is the module textwrap for?"] == "Text wrapping and filling."
    mean = next(q for q in known if q.startswith("What does statistics.mean("))
    assert known[mean].startswith("Return")


def made(source: str) -> list[tuple[str, str, str]]:
    return [
        (p.type, p.question, p.answer) for _, p in _inside(ast.parse(source), "m", in_class=False)
    ]


def test_what_is_asked_of_a_source() -> None:
    source = '''
def f(a: int, /, b: str = "x", *rest, c, **more) -> int:
    """Do this and that.  Then more."""
def _hidden():
    """Do nothing at all."""
class C(Base):
    """Hold some things,
    over two lines."""
    def __init__(self, size=3):
        """Make one of them."""
    def g(self, x):
        """g(x) -> y

        Give back some thing.
        """
    @property
    def p(self):
        """The size of it."""
    @staticmethod
    def s(x):
        """Work without any self."""
'''
    assert made(source) == [
        ("function", "What does m.f(a, /, b='x', *rest, c, **more) do?", "Do this and that."),
        ("class", "What is m.C(size=3)?", "Hold some things, over two lines."),
        ("method", "What does m.C.g(x) do?", "Give back some thing."),
        ("property", "What is the property m.C.p?", "The size of it."),
        ("method", "What does m.C.s(x) do?", "Work without any self."),
    ]


def test_a_long_signature_loses_its_defaults_and_then_itself() -> None:
    long = ", ".join(f"argument_{n}=1000000" for n in range(3))
    body = ":\n    'Do this and that.'\n"
    assert "f(argument_0, argument_1, argument_2)" in made(f"def f({long}){body}")[0][1]
    assert "f(...)" in made(f"def f({long.replace('argument', 'a' * 30)}){body}")[0][1]


@pytest.mark.parametrize(
    ("doc", "sentence"),
    [
        ("Return it, e.g. for a test. More.", "Return it, e.g. for a test."),
        ("Return the thing", "Return the thing."),
        ("Return.", None),
        ("word " * 40, None),
        (">>> f(1) is two", None),
        ("Größe of the thing.", None),
    ],
)
def test_a_first_sentence(doc: str, sentence: str | None) -> None:
    assert first_sentence(doc, "f") == sentence


def test_bad_requests_are_told() -> None:
    with pytest.raises(UsageError, match="Did you mean 'train'"):
        docstring_pairs("trian")
    with pytest.raises(UsageError, match="limit is 0"):
        docstring_pairs("test", limit=0)
