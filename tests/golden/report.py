"""Findings: what was compared, how far apart it was, and the verdict."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

TOLERANCE = 5e-4
"""Absolute, on float32 logits, states, caches, gates, gradients and losses."""

ABOUT_UPSTREAM = re.compile(
    r"(float32_vs_float64|eager_vs_flash_path|gate_range_|versions$)"
    r"|\.(max_abs_logit_diff|gen_min_top1_top2_gap|rows_alone_equal_batched)"
    r"|^train\.(grad_max_abs_diff_checkpointed|same_params_have_grad)"
)
"""Facts about the official code itself: no number in them is one that trol could give."""


@dataclass(frozen=True)
class Finding:
    """One line of the table."""

    case: str
    tensor: str
    difference: float | None
    verdict: str
    passed: bool


class Report:
    """Collects findings, and knows which of the expected names nobody has looked at."""

    def __init__(self, names: Iterable[str]) -> None:
        self.open = {name: True for name in names if not ABOUT_UPSTREAM.search(name)}
        self.findings: list[Finding] = []

    @property
    def missed(self) -> bool:
        """Whether anything failed."""
        return any(not finding.passed for finding in self.findings)

    def close(
        self,
        name: str,
        got: Tensor,
        want: Tensor,
        *,
        at_most: float = TOLERANCE,
        note: str = "",
    ) -> None:
        """Compares two tensors within a tolerance; `note` says what is compared instead."""
        if got.shape != want.shape:
            shapes = f"shape {list(got.shape)}, expected {list(want.shape)}"
            return self.add(name, None, shapes, passed=False)
        difference = float((got.double() - want.double()).abs().max()) if want.numel() else 0.0
        self.add(name, difference, note, passed=difference <= at_most)  # NaN is no match

    def exact(self, name: str, got: Any, want: Any, *, note: str = "") -> None:
        """Compares ids, counts or texts, which must be the same."""
        got, want = (x.tolist() if isinstance(x, Tensor) else x for x in (got, want))
        passed = got == want
        self.add(
            name,
            None,
            note if passed else f"got {_short(got)}, expected {_short(want)}",
            passed=passed,
        )

    def add(self, name: str, difference: float | None, note: str, *, passed: bool) -> None:
        """Writes one line, and ticks the name off."""
        self.tick(name)
        case, _, tensor = name.rpartition(".")
        verdict = ("ok" if passed else "MISS") if not note else note if passed else f"MISS: {note}"
        self.findings.append(Finding(case, tensor, difference, verdict, passed))

    def tick(self, name: str) -> None:
        """Notes that an expected name was looked at."""
        self.open.pop(name, None)

    @contextmanager
    def checking(self, name: str) -> Iterator[None]:
        """A check that breaks down is a miss of its own; the other checks go on."""
        try:
            yield
        except Exception as error:
            self.add(name, None, f"{type(error).__name__}: {_short(error)}", passed=False)

    def finish(self) -> None:
        """What nobody looked at is a miss."""
        for name in list(self.open):
            self.add(name, None, "not checked", passed=False)

    def lines(self) -> Iterator[str]:
        """The table."""
        rows = [("case", "tensor", "max abs difference", "verdict")]
        for finding in self.findings:
            difference = "" if finding.difference is None else f"{finding.difference:.1e}"
            rows.append((finding.case, finding.tensor, difference, finding.verdict))
        widths = [max(len(row[column]) for row in rows) for column in range(3)]
        for case, tensor, difference, verdict in rows:
            yield (
                f"{case:<{widths[0]}}  {tensor:<{widths[1]}}  {difference:>{widths[2]}}  {verdict}"
            )
        missed = sum(not finding.passed for finding in self.findings)
        yield f"{len(self.findings)} compared, {missed} missed"


def _short(value: Any) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= 160 else f"{text[:157]}..."


AXES = {"gate": (1, 2), "mixed": (1, 2), "pass1": (1, 2), "pass2": (1, 2)}
AXES |= {"cache_k": (1, 3), "cache_v": (1, 3), "gen_final_cache_k0": (0, 2)}
"""Where rows and tokens lie in the tensors of a case; (0, 1) in all others."""


def at(kind: str, tensor: Tensor, where: Tensor) -> Tensor:
    """The entries of a case's tensor at the tokens that `where` [B, T] marks."""
    return tensor.movedim(AXES.get(kind, (0, 1)), (0, 1))[where.bool()]


def one_row(kind: str, tensor: Tensor, row: int) -> Tensor:
    """Row `row` of a case's tensor, still with a dimension for rows."""
    return tensor.index_select(AXES.get(kind, (0, 1))[0], torch.tensor([row]))
