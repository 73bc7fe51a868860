"""Checks a prompt that is read in two chunks, and one whose end is read token by token.

Upstream's second chunk sees other keys of the first than a single prefill would, so its numbers
depend on where the prompt was cut; trol's chunks equal its own single run.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from trol.host.names import CACHE

from .forward import ROW_ALONE, run
from .record import recording
from .report import Report, at, one_row
from .sets import Case, GoldenSet

ONE_SHOT = "own: chunked = one-shot"


def check_chunk(model: Any, golden: GoldenSet, case: Case, report: Report) -> None:
    """The first part and the tokens after it against upstream; the second chunk against trol."""
    past = int(golden.inputs[f"{case.name}.past_length"])
    first = _first(case, past)
    _check_first_part(model, golden, case, first, report)
    second, counts = _second(model, case, past)
    _, whole = run(model, case)
    _check_second(golden, case, past, second, whole, report)
    for fact, got in counts.items():
        name = f"{case.name}.{fact}"
        if name in golden.facts:
            report.exact(name, got, golden.facts[name])
    if f"{case.name}.token_by_token_logits" in golden.expected:
        _check_token_by_token(model, golden, case, past, report)


def _first(case: Case, past: int) -> Case:
    return replace(
        case,
        ids=case.ids[:, :past],
        mask=case.mask[:, :past],
        positions=case.positions[:, :past],
    )


def _cache_of(model: Any, first: Case) -> Any:
    """The cache after the first part."""
    return model(
        input_ids=first.ids,
        attention_mask=first.mask,
        position_ids=first.positions,
        use_cache=True,
    )[CACHE]


def _check_first_part(
    model: Any, golden: GoldenSet, case: Case, first: Case, report: Report
) -> None:
    name = f"{case.name}.first_part_logits"
    if name not in golden.expected:
        return
    _, ours = run(model, first)
    for row in range(len(first.lengths)):
        where = first.mask[row : row + 1]
        got, want, note = ours["logits"][row : row + 1], golden.expected[name][row : row + 1], ""
        if not golden.same_factors(first.lengths, row):
            alone = run(model, first.row(row))[1]["logits"]
            got, want, note = at("logits", got, where)[None], alone, ROW_ALONE
            where = torch.ones(want.shape[:2])
        label = f"[{row}]" if len(first.lengths) > 1 else ""
        report.close(name + label, at("logits", got, where), at("logits", want, where), note=note)
    report.tick(name)


@torch.no_grad()
def _second(model: Any, case: Case, past: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    cache = _cache_of(model, _first(case, past))
    with recording(model) as record:
        out = model(
            input_ids=case.ids[:, past:],
            attention_mask=case.mask,
            position_ids=case.positions[:, past:],
            **{CACHE: cache},
        )
    counts = {"gate_calls": record.gate_calls, "layer_calls_per_layer": record.layer_calls[0]}
    return record.tensors(out.logits, out[CACHE]), counts


def _check_second(
    golden: GoldenSet,
    case: Case,
    past: int,
    second: dict[str, Tensor],
    whole: dict[str, Tensor],
    report: Report,
) -> None:
    """Where the RoPE factors switch between two calls, keys that lie in the cache stay as made."""
    switched = _switched(golden, case, past)
    for kind, made in second.items():
        name = f"{case.name}.{kind}"
        if name not in golden.expected:
            continue
        cached = kind.startswith("cache")
        mask = case.mask if cached else case.mask[:, past:]
        for row in range(len(case.lengths)):
            if row in switched:
                continue
            part = whole[kind] if cached else _columns(kind, whole[kind], past)
            got, want = one_row(kind, made, row), one_row(kind, part, row)
            where = mask[row : row + 1]
            report.close(
                f"{name}[{row}]", at(kind, got, where), at(kind, want, where), note=ONE_SHOT
            )
        report.tick(name)
    for row in switched:
        note = "own: not compared, its RoPE factors switch between the chunks"
        report.add(f"{case.name}.second chunk[{row}]", None, note, passed=True)
    _check_what_is_upstreams(golden, case, past, second, report)


def _check_what_is_upstreams(
    golden: GoldenSet, case: Case, past: int, second: dict[str, Tensor], report: Report
) -> None:
    """The embeddings, and the first chunk's part of the cache, do not depend on the cut."""
    clean = [golden.same_factors(case.lengths, row) > 0 for row in range(len(case.lengths))]
    clean = [ok and row not in _switched(golden, case, past) for row, ok in enumerate(clean)]
    if not any(clean):
        return
    for kind in ("inputs_embeds", "cache_k", "cache_v"):
        name = f"{case.name}.{kind}"
        if name not in golden.expected:
            continue
        cached = kind.startswith("cache")
        where = case.mask.bool() & torch.tensor(clean)[:, None]
        where = where.clone() if cached else where[:, past:]
        if cached:
            where[:, past:] = False
        got, want = at(kind, second[kind], where), at(kind, golden.expected[name], where)
        report.close(f"{name} of upstream", got, want)


def _columns(kind: str, tensor: Tensor, start: int) -> Tensor:
    dimension = 2 if kind in ("mixed", "pass1", "pass2", "gate") else 1
    return tensor.narrow(dimension, start, tensor.shape[dimension] - start)


def _switched(golden: GoldenSet, case: Case, past: int) -> list[int]:
    """Rows that have short factors in the first part and long ones in the whole."""
    if golden.switch is None:
        return []
    first = case.mask[:, :past].sum(-1).tolist()
    both = enumerate(zip(first, case.lengths, strict=True))
    return [row for row, (early, late) in both if early <= golden.switch < late]


@torch.no_grad()
def _check_token_by_token(
    model: Any, golden: GoldenSet, case: Case, past: int, report: Report
) -> None:
    """The remaining tokens one at a time, as an answer: a decoding step is never traversed."""
    first, name = _first(case, past), f"{case.name}.token_by_token_logits"
    cache = _cache_of(model, first)
    made = []
    for column in range(past, case.ids.shape[1]):
        out = model(
            input_ids=case.ids[:, column : column + 1],
            attention_mask=case.mask[:, : column + 1],
            position_ids=case.positions[:, column : column + 1],
            **{CACHE: cache},
            assistant_masks=torch.ones(case.ids.shape[0], 1),
        )
        made.append(out.logits)
    got, want, longest = torch.cat(made, dim=1), golden.expected[name], max(first.lengths)
    steps = got.shape[1]
    for row in range(len(case.lengths)):
        clean = golden.same_factors(first.lengths, row, steps + 1) - 1
        where = case.mask[row : row + 1, past:].clone()
        where[:, max(clean, 0) :] = 0
        label = f"[{row}]" if len(case.lengths) > 1 else ""
        note = "" if clean >= steps else f"until {longest + clean} tokens"
        pair = (at("logits", x[row : row + 1], where) for x in (got, want))
        report.close(name + label, *pair, note=note)
    report.tick(name)
