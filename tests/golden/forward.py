"""Checks one forward pass of every case: logits, states of each layer, gates, cache, counts."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from trol.depth.attachment import depth
from trol.host.names import CACHE

from .record import Record, recording
from .report import Report, at, one_row
from .sets import Case, GoldenSet

KINDS = (
    "inputs_embeds",
    "pass1",
    "gate",
    "pass2",
    "mixed",
    "mixed_last_layer_only",
    "final_norm",
    "logits",
    "cache_k",
    "cache_v",
)

TRAVERSAL_OFF = "own: traversal off"
ROW_ALONE = "own: a row as if alone"


def traversal(model: Any, case: Case) -> Any:
    """Upstream asks for more than one token, not for a question: one token never traverses."""
    return depth(model, "all") if case.is_one_token else nullcontext()


def images(model: Any, case: Case) -> dict[str, Any]:
    """The case's images as forward's arguments: features that only the projector has to see."""
    if case.features is None:
        return {}
    projected = model.model.projector(case.features)
    return {"mm_encoder_outputs": {"image": BaseModelOutputWithPooling(pooler_output=projected)}}


@torch.no_grad()
def run(model: Any, case: Case, **more: Any) -> tuple[Record, dict[str, Tensor]]:
    """One forward pass over a case, and what it made, by the names of golden sets."""
    with traversal(model, case), recording(model) as record:
        out = model(
            input_ids=case.ids,
            attention_mask=case.mask,
            position_ids=case.positions,
            use_cache=True,
            **images(model, case),
            **more,
        )
    return record, record.tensors(out.logits, out[CACHE])


def check_forward(model: Any, golden: GoldenSet, case: Case, report: Report) -> None:
    """Every expected tensor and count of one case's forward pass."""
    record, ours = run(model, case)
    rows = range(len(case.lengths))
    clean = [golden.same_factors(case.lengths, row) > 0 for row in rows]
    note = TRAVERSAL_OFF if case.is_one_token else ""
    compare_rows(golden, case, ours, clean, report, note=note)
    alone = {row: run(model, case.row(row))[1] for row in rows if not clean[row]}
    for row, twin in alone.items():
        for kind in KINDS:
            if kind in twin and f"{case.name}.{kind}" in golden.expected:
                got = at(kind, one_row(kind, ours[kind], row), case.mask[row : row + 1])
                want = at(kind, twin[kind], torch.ones(1, case.lengths[row]))
                report.close(f"{case.name}.{kind}[{row}]", got, want, note=ROW_ALONE)
                report.tick(f"{case.name}.{kind}")
    _check_counts(golden, case, record, report, note)


def compare_rows(
    golden: GoldenSet,
    case: Case,
    ours: dict[str, Tensor],
    clean: list[bool],
    report: Report,
    *,
    note: str = "",
) -> None:
    """The rows of a case that are upstream targets, against upstream's numbers."""
    if not any(clean):
        return
    where = case.mask.bool() & torch.tensor(clean)[:, None]
    for kind in KINDS:
        name = f"{case.name}.{kind}"
        if name not in golden.expected:
            continue
        if kind not in ours:
            report.add(name, None, f"this model made no {kind}", passed=False)
            continue
        want = golden.expected[name]
        if ours[kind].shape != want.shape:
            report.close(name, ours[kind], want)
            continue
        report.close(name, at(kind, ours[kind], where), at(kind, want, where), note=note)


def _check_counts(golden: GoldenSet, case: Case, record: Record, report: Report, note: str) -> None:
    name = f"{case.name}.gate_calls"
    if name in golden.facts:
        report.exact(name, record.gate_calls, golden.facts[name], note=note)
    name = f"{case.name}.layer_calls_per_layer"
    if name in golden.facts:
        want = [golden.facts[name]] * len(record.layer_calls)
        report.exact(name, record.layer_calls, want, note=note)
