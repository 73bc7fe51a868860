"""The checks of single components: each passes what agrees, and misses whatever is spoilt."""

import copy
import functools
import operator
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from .__main__ import main
from .made_units import PARTS, make_units, part_of
from .report import Report
from .units import CHECKS

EACH = pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
LOOSE = {
    r"_after_": "an accident of upstream's: trol does not remember the calls before",
    r"internvit\.image_size$": "a pixel more makes no more patches",
    r"tiling_minmax\.\d\.(width|height)$": "a pixel more makes no more tiles",
    r"prompts\.questions": "they are asked in the other sections",
}
"""What may be otherwise, and why."""


@torch.no_grad()
def report_of(check, units):
    report = Report([])
    with report.checking(check.__name__):
        check(units, report)
    return report


def leaves(value, path=()):
    """The paths of all numbers, texts and tensors within."""
    if not isinstance(value, dict | list):
        return [path]
    pairs = value.items() if isinstance(value, dict) else enumerate(value)
    return [leaf for key, inner in pairs for leaf in leaves(inner, (*path, key))]


def spoilt(units, path):
    """The same with another value at this place."""
    fresh = copy.deepcopy(units)
    *way, last = path
    place = functools.reduce(operator.getitem, way, vars(fresh))
    place[last] = other(place[last])
    return fresh


def other(value):
    """Of a tensor, another last number; of a picture, its negative, as resizing has wide bounds."""
    if isinstance(value, torch.Tensor):
        if value.dtype == torch.uint8:
            return 255 - value
        last = torch.zeros(value.numel(), dtype=value.dtype)
        last[-1] = 1 if value.dtype == torch.int64 else 99
        return value + last.view(value.shape)
    if isinstance(value, str | bool):
        return "?" if isinstance(value, str) else not value
    return value + 1 if isinstance(value, int) else -1 - value


def test_every_check_has_a_part_to_read():
    assert set(PARTS) == set(CHECKS)


@EACH
def test_a_check_passes_what_agrees(check):
    report = report_of(check, part_of(check))
    assert report.findings
    assert not [finding for finding in report.findings if not finding.passed]


@EACH
def test_whatever_is_spoilt_is_a_miss(check):
    part = part_of(check)
    paths = {".".join(map(str, path)): path for path in leaves(vars(part))}
    passed = [n for n, path in paths.items() if not report_of(check, spoilt(part, path)).missed]
    assert not [n for n in passed if not any(re.search(loose, n) for loose in LOOSE)]


@pytest.fixture
def folder(tmp_path):
    make_units(tmp_path / "units")
    return tmp_path / "units"


def test_a_set_that_agrees_passes(folder, capsys):
    assert main([str(folder)]) == 0
    assert "0 missed" in capsys.readouterr().out


def test_a_number_that_no_check_reads_is_a_miss(folder, capsys):
    file = folder / "units.safetensors"
    save_file(load_file(file) | {"mix.novelty": torch.zeros(2)}, file)
    assert main([str(folder)]) == 1
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "MISS" in line]
    assert "novelty" in line
    assert "not checked" in line
