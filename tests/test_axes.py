"""The shapes in the signatures of depth, execution and family hold where laws run."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]

CHECKED = {
    "tests/laws/test_formula.py": "llama or gemma3",
    "tests/laws/test_replay.py": "llama",
    "tests/laws/test_exits.py": "llama",
    "tests/laws/test_token_wise.py": "llama and some_twice",
    "tests/laws/test_rows_kept.py": "llama",
    "tests/family/test_modeling.py": "test",
    "tests/family/test_rope.py": "test",
    "tests/family/test_internlm2.py": "test",
}
"""Files of tests -> which of theirs are run with every signature checked."""

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


def test_signatures_hold() -> None:
    which = " or ".join(f"({Path(file).stem} and ({words}))" for file, words in CHECKED.items())
    done = run("-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", *CHECKED, "-k", which)
    assert done.returncode == 0, done.stdout[-3000:]


def test_a_wrong_shape_is_found() -> None:
    done = run("-c", WRONG)
    assert done.returncode != 0
    assert "TypeCheckError" in done.stderr
