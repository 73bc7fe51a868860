"""How each benchmark's questions were put to the published models, and what came back read."""

from __future__ import annotations

import re
from difflib import get_close_matches
from typing import Any, NamedTuple

from trol.data.images import IMAGE_TOKEN
from trol.errors import unknown
from trol.family.published.processors import MARKS

LETTER = "\nAnswer with the option's letter from the given choices directly."
PHRASE = "\nAnswer the question using a single word or phrase."
YES_OR_NO = "\nPlease answer yes or no."
UNANSWERABLE = (
    "\nWhen the provided information is insufficient, respond with 'Unanswerable'. "
    "Answer the question using a single word or phrase."
)


class Instruction(NamedTuple):
    """What one benchmark adds to a question, and how long an answer may get."""

    suffix: str = ""
    new_tokens: int = 512
    unless: str = ""
    """A pattern in the question with which `otherwise` is added instead."""
    otherwise: str = ""


INSTRUCTIONS = {
    "ai2d": Instruction(LETTER, 5),
    "chartqa": Instruction(PHRASE, 5),
    "demo": Instruction(),
    "gqa": Instruction(PHRASE, 5),
    "hallusionbench": Instruction(YES_OR_NO, 5, unless=r"Please answer yes or no\."),
    "llava": Instruction(new_tokens=1024),
    "mathverse": Instruction(),
    "mathvista": Instruction(),
    "mm-vet": Instruction(new_tokens=1024),
    "mmbench": Instruction(LETTER, 5),
    "mmbench_cn": Instruction(LETTER, 5),
    "mmbench_cn_dev": Instruction(LETTER, 5),
    "mmbench_dev": Instruction(LETTER, 5),
    "mme": Instruction(new_tokens=5),
    "mmmu": Instruction(PHRASE, 5, unless=r"A\.", otherwise=LETTER),
    "mmstar": Instruction(LETTER, 5),
    "mmvet": Instruction(),
    "pope": Instruction(PHRASE, 5),
    "qbench": Instruction(LETTER, 5),
    "seed": Instruction(LETTER, 5),
    "sqa": Instruction(LETTER, 5),
    "textvqa": Instruction(new_tokens=5),
    "visualwebbench": Instruction(),
    "vizwiz": Instruction(UNANSWERABLE),
    "vqav2": Instruction(PHRASE, 5),
}
"""One row per benchmark, by the published name in small letters."""

OTHER = Instruction()
"""For a benchmark of no published name: nothing added, 512 new tokens."""


def instruct(question: str, benchmark: str) -> str:
    """The question as the benchmark puts it: question + suffix; see `instruction` for names."""
    row = instruction(benchmark)
    differs = row.unless and re.search(row.unless, question)
    return question + (row.otherwise if differs else row.suffix)


def max_new_tokens(benchmark: str) -> int:
    """How many tokens an answer may have in this benchmark; see `instruction` for names."""
    return instruction(benchmark).new_tokens


def instruction(benchmark: str) -> Instruction:
    """The benchmark's row, or `OTHER` for a name that resembles none of the table.

    Capitals do not matter. A name that is nearly one of the table is taken for a slip of the pen:
    `UsageError`, with the name that was meant.
    """
    name = benchmark.lower()
    if name in INSTRUCTIONS:
        return INSTRUCTIONS[name]
    if get_close_matches(name, INSTRUCTIONS, n=1):
        raise unknown("benchmark", benchmark, INSTRUCTIONS)
    return OTHER


def user_message(question: str, benchmark: str, *, image: bool) -> dict[str, Any]:
    """The user's message: one image placeholder in front if the row has a picture, else none.

    A placeholder that the question brings along is taken out, so that none is said twice or
    without a picture. The published chat templates put the image on a line of its own.
    """
    bare = re.sub(rf"\s*{re.escape(IMAGE_TOKEN)}\n?", "", question)
    content = [{"type": "text", "text": instruct(bare, benchmark)}]
    return {"role": "user", "content": [{"type": "image"}, *content] if image else content}


def answer_of(text: str, family: str) -> str:
    """The answer in a decoded text: after the last start mark, before the first end mark.

    Surrounding space is dropped; a text without marks is all answer.
    """
    if family not in MARKS:
        raise unknown("family", family, MARKS)
    marks = MARKS[family]
    return text.rpartition(marks.answer)[-1].partition(marks.end)[0].strip()
