"""Checks greedy and beam generation: ids exactly, logits of every step, the final cache, counts."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from trol.host.names import CACHE

from .forward import ROW_ALONE, TRAVERSAL_OFF, images, traversal
from .record import Record, recording
from .report import Report, at
from .sets import Case, GoldenSet

CROSSED = "own: uncached after the RoPE switch"
ANEW = "own: begins anew at the RoPE switch"
BEAMS = re.compile(r"\.beam(\d+)_ids$")


@torch.no_grad()
def generate(model: Any, config: dict[str, Any], case: Case, **settings: Any) -> tuple[Record, Any]:
    """Greedy unless told otherwise, no stop token; what `generate` returns has only new ids."""
    usual = {
        "max_new_tokens": config["new_tokens"],
        "pad_token_id": config["pad_token_id"],
        "do_sample": False,
        "output_logits": True,
        "output_scores": True,
        "return_dict_in_generate": True,
    }
    wanted = GenerationConfig(**{**usual, **settings})
    given = images(model, case) if case.pixels is None else {"pixel_values": case.pixels}
    before, model.generation_config = model.generation_config, wanted
    try:
        with traversal(model, case), recording(model) as record:
            out = model.generate(case.ids, attention_mask=case.mask, **given)
    finally:
        model.generation_config = before
    out.sequences = out.sequences[:, case.ids.shape[1] :]
    return record, out


def check_generation(model: Any, golden: GoldenSet, case: Case, report: Report) -> None:
    """Every expected id, logit and count of one case's generations."""
    if f"{case.name}.gen_ids" in golden.expected:
        _check_greedy(model, golden, case, report)
    for row in range(len(case.lengths)):
        alone = case.row(row)
        if f"{alone.name}.gen_ids" in golden.expected:
            _check_greedy(model, golden, alone, report)
    for name in list(golden.expected):
        match = BEAMS.search(name)
        if match and name.startswith(f"{case.name}.beam"):
            _check_beams(model, golden, case, int(match[1]), report)
    for name in [n for n in golden.expected if n.startswith(f"{case.name}.flash_path.")]:
        report.add(name, None, "own: see the rows alone", passed=True)
    if f"{case.name}_early_stop" in golden.facts:
        _check_early_stop(model, golden, case, report)


def _forgets_padding(golden: GoldenSet, case: Case) -> bool:
    """Upstream's InternLM2 forgets the padding mask when it decodes a batch with images."""
    return golden.arch == "internlm2" and any(case.images) and not bool(case.mask.all())


def clean_steps(golden: GoldenSet, case: Case, row: int, steps: int) -> int:
    """For how many steps what upstream generates for this row is a target."""
    return 0 if _forgets_padding(golden, case) else golden.same_factors(case.lengths, row, steps)


def _check_greedy(model: Any, golden: GoldenSet, case: Case, report: Report) -> None:
    record, out = generate(model, golden.config, case)
    ids, logits = out.sequences, torch.stack(out.logits, dim=1)
    name, steps = case.name, ids.shape[1]
    note = TRAVERSAL_OFF if case.is_one_token else ""
    crossed = False
    for row in range(len(case.lengths)):
        label = f"[{row}]" if len(case.lengths) > 1 else ""
        clean = clean_steps(golden, case, row, steps)
        crossed |= clean < steps
        got = ids[row], logits[row]
        if clean:
            want = golden.expected[f"{name}.gen_ids"], golden.expected[f"{name}.gen_logits"]
            part = "" if clean == steps else f"[:{clean}]"
            _compare(report, (name, label + part), got, [w[row] for w in want], (0, clean), note)
        if clean < steps:
            want, why = own(model, golden, case, row)
            part = f"[{clean}:]" if clean else ""
            _compare(report, (name, label + part), got, want, (clean, steps), why)
    for kind in ("gen_ids", "gen_logits"):
        report.tick(f"{name}.{kind}")
    if f"{name}.gen_ids" in golden.facts and not crossed:
        report.exact(f"{name}.gen_ids (json)", ids, golden.facts[f"{name}.gen_ids"], note=note)
    _check_last_cache(golden, case, out, report, note if not crossed else "own: see gen_ids")
    _check_counts(golden, case, record, report, crossed=crossed, note=note)


def _compare(
    report: Report,
    name: tuple[str, str],
    got: tuple[Tensor, Tensor],
    want: Any,
    steps: tuple[int, int],
    note: str,
) -> None:
    part = slice(*steps)
    report.exact(f"{name[0]}.gen_ids{name[1]}", got[0][part], want[0][part], note=note)
    report.close(f"{name[0]}.gen_logits{name[1]}", got[1][part], want[1][part], note=note)


def own(model: Any, golden: GoldenSet, case: Case, row: int) -> tuple[tuple[Tensor, Tensor], str]:
    """What a row must give where upstream's batch is no target, and where that comes from."""
    alone = case.row(row)
    steps = golden.config["new_tokens"]
    if len(case.lengths) > 1 and golden.same_factors(alone.lengths, 0, steps) == steps:
        name = f"{alone.name}.gen_ids"
        if name in golden.expected:
            logits = golden.expected[f"{alone.name}.gen_logits"]
            return (golden.expected[name][0], logits[0]), "own: upstream's row alone"
        _, out = generate(model, golden.config, alone)
        return (out.sequences[0], torch.stack(out.logits, dim=1)[0]), ROW_ALONE
    return uncached(model, golden, alone), CROSSED


@torch.no_grad()
def uncached(model: Any, golden: GoldenSet, case: Case) -> tuple[Tensor, Tensor]:
    """Greedy ids [S] and logits [S, V] of one row, each step a forward pass over all tokens."""
    ids, made = case.ids, []
    length = ids.shape[1]
    for _ in range(golden.config["new_tokens"]):
        tokens = torch.arange(ids.shape[1])[None]
        grown = replace(case, ids=ids, mask=torch.ones_like(ids), positions=tokens)
        with traversal(model, case):
            out = model(
                input_ids=ids,
                attention_mask=grown.mask,
                position_ids=tokens,
                assistant_masks=(tokens >= length).long(),
                use_cache=False,
                **images(model, grown),
            )
        made.append(out.logits[:, -1])
        ids = torch.cat([ids, made[-1].argmax(-1, keepdim=True)], dim=1)
    return ids[0, length:], torch.cat(made)


def _check_last_cache(golden: GoldenSet, case: Case, out: Any, report: Report, note: str) -> None:
    name = f"{case.name}.gen_final_cache_k0"
    if name not in golden.expected:
        return
    if note.startswith("own: see"):
        return report.add(name, None, note, passed=True)
    got, want = out[CACHE].layers[0].keys, golden.expected[name]
    if got.shape != want.shape:
        return report.close(name, got, want)
    grown = torch.ones(case.mask.shape[0], want.shape[2] - case.mask.shape[1])
    where = torch.cat([case.mask, grown.to(case.mask)], dim=1)
    kind = "gen_final_cache_k0"
    report.close(name, at(kind, got, where), at(kind, want, where), note=note)


def _check_counts(
    golden: GoldenSet, case: Case, record: Record, report: Report, *, crossed: bool, note: str
) -> None:
    for fact, got in (
        ("gen_gate_calls", record.gate_calls),
        ("gen_layer0_calls", record.layer_calls[0]),
    ):
        name = f"{case.name}.{fact}"
        if name not in golden.facts:
            continue
        want = golden.facts[name]
        if crossed and golden.switch and got != want:
            report.add(name, None, ANEW, passed=got > want)
        else:
            report.exact(name, got, want, note=note)


def _check_beams(model: Any, golden: GoldenSet, case: Case, beams: int, report: Report) -> None:
    name = f"{case.name}.beam{beams}"
    want = golden.expected[f"{name}_ids"]
    steps = want.shape[1]
    settings = {"num_beams": beams, "max_new_tokens": steps, "length_penalty": 1.0}
    _, out = generate(model, golden.config, case, **settings)
    for row in range(len(case.lengths)):
        clean = clean_steps(golden, case, row, steps) == steps
        clean &= not _mixes_images(golden, case)
        ids, score, note = want[row], golden.expected.get(f"{name}_scores"), ""
        score = None if score is None else score[row]
        if case.is_one_token:
            note = TRAVERSAL_OFF
        if not clean:
            _, alone = generate(model, golden.config, case.row(row), use_cache=False, **settings)
            ids, score, note = alone.sequences[0], alone.sequences_scores[0], ROW_ALONE
        label = f"[{row}]" if len(case.lengths) > 1 else ""
        report.exact(f"{name}_ids{label}", out.sequences[row], ids, note=note)
        if score is not None:
            report.close(f"{name}_scores{label}", out.sequences_scores[row], score, note=note)
    report.tick(f"{name}_ids")
    report.tick(f"{name}_scores")


def _mixes_images(golden: GoldenSet, case: Case) -> bool:
    """Upstream's InternLM2 hands the beams of a row with several images one another's images."""
    return golden.arch == "internlm2" and max(case.images) > 1


def check_beams_with_images(model: Any, golden: GoldenSet, case: Case, report: Report) -> None:
    """Each beam of a row gets that row's images: a batch's beams are those of each row alone."""
    settings = {"num_beams": 5, "max_new_tokens": 5}
    _, out = generate(model, golden.config, case, **settings)
    for row in range(len(case.lengths)):
        _, alone = generate(model, golden.config, case.row(row), **settings)
        name = f"{case.name}.beams with {case.images[row]} images[{row}]"
        report.exact(name, out.sequences[row], alone.sequences[0], note=ROW_ALONE)


def _check_early_stop(model: Any, golden: GoldenSet, case: Case, report: Report) -> None:
    name = f"{case.name}_early_stop"
    fact = golden.facts[name]
    stop, pad = fact["eos_token_id"], fact["pad_token_id"]
    want = torch.tensor(fact["gen_ids"])
    steps = want.shape[1]
    _, out = generate(
        model, golden.config, case, max_new_tokens=steps, eos_token_id=stop, pad_token_id=pad
    )
    note = ""
    for row in range(len(case.lengths)):
        if clean_steps(golden, case, row, steps) < steps:
            ids = own(model, golden, case, row)[0][0][:steps].clone()
            ends = (ids == stop).nonzero()
            if len(ends):
                ids[int(ends[0]) + 1 :] = pad
            want[row], note = ids, ROW_ALONE
    report.exact(f"{name}.gen_ids", out.sequences, want, note=note)
    report.tick(name)
