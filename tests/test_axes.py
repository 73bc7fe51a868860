"""The shapes in the signatures of depth, execution and family hold where laws run."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

CHECKED = (
    ("tests/laws/test_formula.py", "llama or gemma3"),
    ("tests/laws/test_replay.py", "llama"),
    ("tests/laws/test_exits.py", "llama"),
    ("tests/laws/test_token_wise.py", "llama and some_twice"),
    ("tests/laws/test_rows_kept.py", "llama"),
    ("tests/family", "test_modeling or test_rope or test_internlm2"),
)
"""Files of tests, and which of theirs, to be run with every signature checked."""

WRONG = """
from jaxtyping import install_import_hook
install_import_hook("trol.depth", "beartype.beartype")
import torch
from trol.depth.policy import mixture
mixture(torch.ones(2, 3, 4), torch.ones(2, 3, 5), 0.5)
"""


def run(*command: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "TROL_SHAPES": "1"}
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=env, check=False, capture_output=True, text=True
    )


@pytest.mark.parametrize(("file", "which"), CHECKED)
def test_signatures_hold(file: str, which: str) -> None:
    done = run("-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", file, "-k", which)
    assert done.returncode == 0, done.stdout[-3000:]


def test_a_wrong_shape_is_found() -> None:
    done = run("-c", WRONG)
    assert done.returncode != 0
    assert "TypeCheckError" in done.stderr
