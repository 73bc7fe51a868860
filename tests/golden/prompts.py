"""Checks the whole way from a question and a picture to an answer, with a toy tokenizer."""

from __future__ import annotations

import re
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from golden.instructions import user_message
from trol.family import TrolProcessor, modeling
from trol.family.published import processors

from .generation import clean_steps, generate, own
from .pictures import picture, pictures_of
from .report import Report
from .sets import Case, GoldenSet
from .tokenizer import toy_tokenizer

RUN = re.compile(r"\{(.+?) x (\d+)\}")
"""How a set abbreviates a run of image tokens."""

ONE_IMAGE = "own: one image's tokens"
GENERATES = "own: it generates"


def check_prompts(model: Any, golden: GoldenSet, report: Report) -> None:
    """Every prompt that the set asks, from its questions and pictures on."""
    if "eval.tokenizer" not in golden.facts:
        return
    tokenizer = toy_tokenizer(golden)
    report.tick("eval.tokenizer")
    with patch.object(processors, "published_tokenizer", lambda folder: tokenizer):
        processor = processors.published_processor(TrolProcessor, golden.folder, model.config)
    # trol refuses prompts beyond the decoder's positions; upstream does not count, and a tiny
    # decoder has fewer than the letters of a system prompt.
    with patch.object(modeling, "check_length", lambda config, tokens: None):
        for fact in sorted(golden.facts):
            name, _, kind = fact.rpartition(".")
            if kind in CHECKS:
                with report.checking(f"{name}.prompt"):
                    CHECKS[kind](model, golden, processor, name, report)


def encoded(processor: Any, rows: list[Any], pictures: list[Tensor]) -> Any:
    """The model's inputs for the users' messages and their pictures, in reading order."""
    texts = [
        processor.apply_chat_template([row], add_generation_prompt=True, tokenize=False)
        for row in rows
    ]
    images = [picture(one) for one in pictures]
    return processor(images=images or None, text=texts, padding=True, return_tensors="pt")


def _check_prompt(model: Any, golden: GoldenSet, processor: Any, name: str, report: Report) -> None:
    questions, data = golden.facts[f"{name}.questions"], golden.facts[f"{name}.data"]
    pictures = pictures_of(golden, name)
    rows = [user_message(q, data, image=row in pictures) for row, q in enumerate(questions)]
    made = encoded(processor, rows, list(pictures.values()))
    for fact in ("questions", "data"):
        report.tick(f"{name}.{fact}")
    if f"{name}.texts_given_to_tokenizer" in golden.facts:
        want = [_written_out(text) for text in golden.facts[f"{name}.texts_given_to_tokenizer"]]
        report.exact(f"{name}.texts_given_to_tokenizer", processor.tokenizer.given, want)
    image = made["input_ids"] == model.config.image_token_id
    for kind, got in (
        ("input_ids", made["input_ids"]),
        ("attention_mask", made["attention_mask"]),
        ("im_mask", image.long()),
    ):
        if f"{name}.{kind}" in golden.expected:
            report.exact(f"{name}.{kind}", got, golden.expected[f"{name}.{kind}"])
    _check_features(model, golden, made, name, report)
    _check_answers(model, golden, case_of(model, name, made), report)


def case_of(model: Any, name: str, made: Any) -> Case:
    """What a processor made, as a case."""
    ids, mask = made["input_ids"], made["attention_mask"]
    counts = (ids == model.config.image_token_id).sum(-1) // model.config.tokens_per_image
    positions = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 1)
    pixels = made.get("pixel_values")
    return Case(name, ids, mask, positions, tuple(counts.tolist()), pixels=pixels)


@torch.no_grad()
def _check_features(model: Any, golden: GoldenSet, made: Any, name: str, report: Report) -> None:
    full = f"{name}.image_features"
    if full in golden.expected:
        got = model.model.get_vision_features(made["pixel_values"])
        report.close(full, got, golden.expected[full])


def _check_answers(model: Any, golden: GoldenSet, case: Case, report: Report) -> None:
    """The first step is upstream's wherever the prompt is; the others where its decoding is."""
    if f"{case.name}.gen_ids" not in golden.expected:
        return
    want = golden.expected[f"{case.name}.gen_ids"]
    first = golden.expected.get(f"{case.name}.gen_first_logits")
    steps = want.shape[1]
    _, out = generate(model, golden.config, case, max_new_tokens=steps)
    for row in range(len(case.lengths)):
        label = f"[{row}]" if len(case.lengths) > 1 else ""
        clean, ids, note = clean_steps(golden, case, row, steps), want[row].clone(), ""
        logits = None if first is None else first[row]
        if clean < steps:
            (alone, every), note = own(model, golden, case, row)
            ids[clean:] = alone[clean:steps]
            if golden.same_factors(case.lengths, row) == 0:
                logits = every[0]
        report.exact(f"{case.name}.gen_ids{label}", out.sequences[row], ids, note=note)
        if logits is not None:
            report.close(f"{case.name}.gen_first_logits{label}", out.logits[0][row], logits)
    for kind in ("gen_ids", "gen_first_logits"):
        report.tick(f"{case.name}.{kind}")


def _written_out(text: str) -> str:
    return RUN.sub(lambda match: match[1] * int(match[2]), text)


def _check_benchmark(
    model: Any, golden: GoldenSet, processor: Any, name: str, report: Report
) -> None:
    """Upstream writes two images where there is one, and then fails; one is right."""
    benchmark = name.removeprefix("eval_")
    expected = golden.facts[f"{name}.feature_tokens"]
    pixels = _picture_of(model, golden, processor, expected)
    message = user_message("<image>\nIs this red?", benchmark, image=True)
    made = encoded(processor, [message], [pixels])
    count = int((made["input_ids"] == model.config.image_token_id).sum())
    report.exact(f"{name}.feature_tokens", count, expected)
    report.exact(f"{name}.image_tokens_in_prompt", count, expected, note=ONE_IMAGE)
    _, out = generate(model, golden.config, case_of(model, name, made))
    steps = golden.config["new_tokens"]
    report.exact(f"{name}.result", out.sequences.shape[1], steps, note=GENERATES)


def _picture_of(model: Any, golden: GoldenSet, processor: Any, tokens: int) -> Tensor:
    """A picture of the set that takes so many image tokens; the first one if none does."""
    names = sorted(
        fact.removesuffix(".questions") for fact in golden.facts if fact.endswith(".questions")
    )
    pictures = [one for name in names for one in pictures_of(golden, name).values()]
    for one in pictures:
        seen = processor.image_processor(picture(one), return_tensors="pt")["pixel_values"]
        if len(seen) * model.config.tokens_per_image == tokens:
            return one
    return pictures[0]


CHECKS = {"questions": _check_prompt, "feature_tokens": _check_benchmark}
"""By the fact that a prompt is known by."""
