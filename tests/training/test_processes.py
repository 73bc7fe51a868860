"""Two processes train what one trains, and many small batches what one large batch trains."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.run import __file__ as torchrun

from trol.errors import TrainingError, UsageError
from trol.host import processes
from trol.training import resolve, run

from .ranks import attached_model, measured
from .short import SHORT, weights

HERE = Path(__file__).parent
CLOSE = {"rtol": 2e-5, "atol": 2e-5}


def on_two_ranks(folder: Path, *words: str) -> None:
    """Runs tests/training/ranks.py on two processes that talk through gloo."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parents[1] / "src")}
    ranks = [sys.executable, torchrun, "--standalone", "--nproc_per_node", "2"]
    command = [*ranks, str(HERE / "ranks.py"), str(folder), *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def close(one: dict[str, Any], other: dict[str, Any]) -> None:
    """The losses of two runs are those of one, but for the order of sums in float32."""
    for name, curve in one["losses"].items():
        torch.testing.assert_close(
            torch.tensor(curve["losses"]), torch.tensor(other["losses"][name]["losses"]), **CLOSE
        )


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    out = tmp_path_factory.mktemp("runs") / "alone"
    return run(resolve("demo", SHORT), out), out


def test_two_processes_train_as_one(tmp_path: Path, alone: tuple[dict[str, Any], Path]) -> None:
    out = tmp_path / "two"
    words = ["demo", *SHORT, "save_every=3", "--questions", "0", "--out", str(out)]
    on_two_ranks(tmp_path, "train", *words)
    close(alone[0], json.loads((out / "training.json").read_text(encoding="utf-8")))
    ours, theirs = weights(out), weights(alone[1])
    for name, weight in theirs.items():
        torch.testing.assert_close(ours[name], weight, rtol=1e-3, atol=2e-4)
    ranks = [load_file(tmp_path / f"rank-{rank}.safetensors") for rank in (0, 1)]
    assert all(torch.equal(ranks[0][name], ranks[1][name]) for name in ranks[0])
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"two", "rank-0.safetensors", "rank-1.safetensors"}


def test_a_batch_in_parts_trains_as_the_whole(
    tmp_path: Path, alone: tuple[dict[str, Any], Path]
) -> None:
    """Token losses are means over all tokens of a batch, whatever parts it is computed in."""
    parts = [f"stages.{name}.accumulate=2" for name in resolve("demo").stages]
    close(alone[0], run(resolve("demo", [*SHORT, *parts]), tmp_path / "out"))


def test_a_sharded_model_computes_the_same(tmp_path: Path) -> None:
    on_two_ranks(tmp_path, "shard")
    sharded, whole = load_file(tmp_path / "sharded.safetensors"), measured(*attached_model())
    assert sharded.keys() == whole.keys()
    assert torch.equal(sharded["new"], whole["new"])
    for name, value in whole.items():
        torch.testing.assert_close(sharded[name], value, rtol=1e-5, atol=1e-6)


def test_processes_that_cannot_share_a_batch_or_are_not_joined_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "join", lambda: None)
    with monkeypatch.context() as patch:
        patch.setenv("WORLD_SIZE", "2")
        with pytest.raises(UsageError, match="batch of 3 cannot be divided among 2 processes"):
            run(resolve("demo", [*SHORT, "stages.vision.batch=3"]), tmp_path / "out")
    monkeypatch.setattr(processes, "count", lambda: 2)
    with pytest.raises(TrainingError, match="each would train alone"):
        run(resolve("demo", SHORT), tmp_path / "out")
