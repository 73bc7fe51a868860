"""The sets of reference tensors that lie beside the repository, where they do."""

import os
from pathlib import Path

import PIL
import pytest

from .__main__ import main

BESIDE = Path(__file__).parents[3] / "shared" / "golden"
FOLDER = Path(os.environ.get("TROL_GOLDEN") or BESIDE)
OTHER_PIXELS = pytest.mark.skipif(
    int(PIL.__version__.partition(".")[0]) < 13,
    reason="Pillow before 13 resizes to other pixels than those that the set holds",
)
SETS = (
    pytest.param("units", marks=OTHER_PIXELS),
    *("internlm2_shared", "internlm2_perlayer", "phi3_shared", "phi3_perlayer"),
)


@pytest.mark.skipif(
    not FOLDER.is_dir(),
    reason=f"no golden sets in {FOLDER}; TROL_GOLDEN may name the folder that has them",
)
@pytest.mark.parametrize("name", SETS)
def test_trol_agrees_with_the_official_code(name, capsys):
    assert main([str(FOLDER / name)]) == 0, capsys.readouterr().out
