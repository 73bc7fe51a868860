"""Texts: prompts of every benchmark, lengths of answers, and reading an answer."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import torch
from transformers.utils.chat_template_utils import render_jinja_template

from golden.instructions import answer_of, max_new_tokens, user_message
from trol.data.images import IMAGE_TOKEN
from trol.family import TrolProcessor
from trol.family.published.processors import IMAGE_SETTINGS, MARKS, ImageSettings, chat_template

from .pictures import picture
from .report import Report
from .tokenizer import ToyTokenizer

if TYPE_CHECKING:
    from .units import Units

IMAGES = re.compile(rf"(?:{IMAGE_TOKEN})+\n?")
ONE_IMAGE = "own: one image, on a line of its own"


def check_filtering(units: Units, report: Report) -> None:
    """The answer in a decoded text."""
    for family, pairs in units.tables.get("output_filtering", {}).items():
        got = [answer_of(text, family) for text, _ in pairs]
        report.exact(f"output_filtering.{family}", got, [answer for _, answer in pairs])
    report.tick("output_filtering")


def check_prompts(units: Units, report: Report) -> None:
    """The file of prompts, section by section; an empty section asks for nothing."""
    for section, content in units.prompts.items():
        name = f"prompts.{section}"
        if section in SECTIONS:
            with report.checking(name):
                SECTIONS[section](name, content, report)
        if section in SECTIONS or not content:
            report.tick(name)


def _instructions(name: str, families: dict[str, Any], report: Report) -> None:
    """Upstream puts an image in front of questions that have one, or none: one is right."""
    for family, benchmarks in families.items():
        for benchmark, texts in benchmarks.items():
            ours = {q: prompt(family, q, benchmark, image=IMAGE_TOKEN in texts[q]) for q in texts}
            right = {q: IMAGES.sub(f"{IMAGE_TOKEN}\n", text) for q, text in texts.items()}
            note = "" if right == texts else ONE_IMAGE
            report.exact(f"{name}.{family}.{benchmark}", ours, right, note=note)


def prompt(family: str, question: str, benchmark: str, *, image: bool) -> str:
    """What the model reads before it answers, images as placeholders."""
    message = user_message(question, benchmark, image=image)
    texts, _ = render_jinja_template(
        [[message]], chat_template=chat_template(family), add_generation_prompt=True
    )
    return texts[0]


def _lengths(name: str, lengths: dict[str, int], report: Report) -> None:
    report.exact(name, {benchmark: max_new_tokens(benchmark) for benchmark in lengths}, lengths)


def _rules(name: str, families: dict[str, Any], report: Report) -> None:
    for family, rule in families.items():
        marks, ours = MARKS[family], {}
        for role in ("system", "user", "assistant"):
            ours[f"{role}_start"] = marks.before_role + role + marks.after_role
            ours[f"{role}_end"] = marks.end
        ours["system_start"] = "<s>" + ours["system_start"]
        ours["assistant_end"] += "\n</s>"
        ours |= {"split": "\n", "test_start": marks.answer, "test_end": marks.end}
        report.exact(f"{name}.{family}", ours, rule)


def _bundles(name: str, rows: list[Any], report: Report) -> None:
    """[text, image token, tokens of an image, text with as many]."""
    for number, (text, token, count, want) in enumerate(rows):
        look = next(look for look in IMAGE_SETTINGS.values() if look.image_token == token)
        report.exact(f"{name}[{number}]", _expanded(look, text, count), want)


def _expanded(look: ImageSettings, text: str, count: int) -> str:
    """The text that the processor hands to its tokenizer."""
    around = (look.image_prefix, look.image_token, look.image_suffix)
    text = text.replace("".join(around), IMAGE_TOKEN)
    specials = {token: number for number, token in enumerate(sorted({*around} - {""}), start=1)}
    tokenizer = ToyTokenizer(8, 100, specials, 0)
    processor = TrolProcessor(
        look.image_processor(size={"height": 4, "width": 4}),
        tokenizer,
        tokens_per_image=count,
        image_token=look.image_token,
        image_prefix=look.image_prefix,
        image_suffix=look.image_suffix,
    )
    images = [picture(torch.zeros(3, 4, 4, dtype=torch.uint8))] * text.count(IMAGE_TOKEN)
    processor(images=images or None, text=text)
    return tokenizer.given[0]


def _questions(name: str, questions: list[str], report: Report) -> None:
    """They are asked in the other sections."""
    del name, questions, report


SECTIONS = {
    "add_bundle_tokens": _bundles,
    "make_instruction": _instructions,
    "max_new_tokens": _lengths,
    "prompt_rule": _rules,
    "questions": _questions,
}
