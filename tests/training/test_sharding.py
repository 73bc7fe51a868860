"""FSDP2 and DeepSpeed: two processes that keep half each train what one trains."""

import json
import os
import subprocess
import sys
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import trol
from trol.errors import UsageError
from trol.host import processes, sharding
from trol.training import resolve, run

from .short import SHORT, weights
from .test_processes import HERE, close

RECIPES = files("trol") / "recipes"
FSDP2 = RECIPES / "fsdp" / "fsdp2.yaml"

OTHER = [
    "preset.hidden_size=32",
    "policy.sharing=shared",
    "checkpointing=true",
    *(f"stages.{name}.steps=3" for name in ("vision", "reason", "step1", "step2")),
    *(f"stages.{name}.batch=8" for name in ("vision", "reason", "step1", "step2")),
    *(f"stages.{name}.accumulate=2" for name in ("reason", "step1", "step2")),
    "stages.step2.exit_loss=0.2",
    "preset.layers=3",
]
"""One gate for all layers, layers that are computed again, batches in parts, exits that learn."""

RUNS = {"two": (SHORT, False), "stopped": ([*SHORT, "save_every=2"], True), "other": (OTHER, False)}
"""Folder -> the settings of a run, and whether it is stopped again and again."""

WITHOUT_MUON = ["stages.reason.muon=0", "stages.step2.muon=0"]


def launched(config: Any, folder: Path, count: int, *words: str) -> None:
    """Runs tests/training/ranks.py on `count` processes, as a carried file says."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parents[1] / "src")}
    # glibc keeps what is freed, in pieces that no later tensor fits: so it gives it back.
    environment |= dict.fromkeys(("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"), "65536")
    settings = ["--config_file", str(config), "--main_process_port", "0"]
    launch = [sys.executable, "-m", "accelerate.commands.launch", *settings]
    command = [*launch, "--num_processes", str(count), str(HERE / "ranks.py"), str(folder), *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def ran(config: Any, folder: Path, some: dict[str, tuple[list[str], bool]]) -> Path:
    """The folder of these runs, on two processes."""
    keys = ("out", "settings", "stopped")
    plan = [dict(zip(keys, (out, *one), strict=True)) for out, one in some.items()]
    (folder / "runs.json").write_text(json.dumps(plan), encoding="utf-8")
    launched(config, folder, 2, "runs")
    return folder


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ran(FSDP2, tmp_path_factory.mktemp("sharded"), RUNS)


def results(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "training.json").read_text(encoding="utf-8"))


def check_same_model(folder: Path, settings: list[str], alone: Path) -> None:
    """The folder is what one process writes, up to the order of sums."""
    close(run(resolve("demo", settings), alone), results(folder))
    ours, theirs = weights(folder), weights(alone)
    assert ours.keys() == theirs.keys()
    for key, weight in theirs.items():
        torch.testing.assert_close(ours[key], weight, rtol=1e-3, atol=4e-4)
    assert {one.name for one in folder.iterdir()} == {one.name for one in alone.iterdir()}
    model, _ = trol.load_model(folder)
    assert all(type(one) is nn.Parameter for one in model.parameters())


def check_same_end(folder: Path) -> None:
    """The run that was stopped ends as the other, bit for bit, from what each process kept."""
    assert results(folder / "stopped")["losses"] == results(folder / "two")["losses"]
    ours, theirs = weights(folder / "stopped"), weights(folder / "two")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert not list(folder.glob("*.partial"))


@pytest.mark.parametrize("name", ["two", "other"])
def test_two_shares_train_as_one(tmp_path: Path, sharded: Path, name: str) -> None:
    check_same_model(sharded / name, RUNS[name][0], tmp_path / "alone")


def test_stopped_again_and_again_it_ends_the_same(sharded: Path) -> None:
    check_same_end(sharded)


@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_trains_as_one_and_goes_on(tmp_path: Path, stage: int) -> None:
    """On CPUs DeepSpeed first compiles a part, which takes a minute."""
    pytest.importorskip("deepspeed")
    config = RECIPES / "deepspeed" / f"zero{stage}.yaml"
    some = {out: ([*RUNS[out][0], *WITHOUT_MUON], RUNS[out][1]) for out in ("two", "stopped")}
    ran(config, tmp_path, some)
    check_same_model(tmp_path / "two", some["two"][0], tmp_path / "alone")
    check_same_end(tmp_path)


def test_a_lent_model_gets_its_own_parameters_back() -> None:
    """Tied ones stay tied, and what is lent has no room of its own."""
    model = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3), "norm": nn.BatchNorm1d(3)})
    model["b"].weight = model["a"].weight
    before = {name: one.clone() for name, one in model.state_dict().items()}
    copy = sharding.lend(model)
    assert all(one.is_meta for one in model.parameters())
    assert copy["a"].weight is copy["b"].weight
    with torch.no_grad():
        for one in copy.parameters():
            one.add_(1)
    copy["norm"](torch.randn(8, 3))
    sharding.give_back(copy, model)
    assert model["a"].weight is model["b"].weight
    learnt = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name] + 1 if name in learnt else copy.state_dict()[name])


@pytest.mark.parametrize(
    ("variable", "value", "advice"),
    [
        ("FSDP_VERSION", "1", "set fsdp_version to 2"),
        ("FSDP_ACTIVATION_CHECKPOINTING", "true", "give the recipe checkpointing=true"),
        ("FSDP_CPU_RAM_EFFICIENT_LOADING", "true", "set it to false"),
    ],
)
def test_settings_under_which_a_policy_would_be_wrong_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str, value: str, advice: str
) -> None:
    monkeypatch.setenv(sharding.FSDP, "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    monkeypatch.setenv(variable, value)
    monkeypatch.setattr(processes, "_are_joined", lambda: True)
    with pytest.raises(UsageError, match=advice):
        run(resolve("demo", SHORT), tmp_path / "out")
    assert not any(tmp_path.iterdir())


def test_a_run_is_resumed_as_it_was_begun_and_a_launcher_does_not_choose_the_precision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = [*SHORT, "save_every=2"]
    run(resolve("demo", settings), tmp_path / "out", max_hours=1e-9)
    with monkeypatch.context() as patch:
        patch.setattr(processes, "shards", lambda: True)
        with pytest.raises(UsageError, match="sharded was False and is True"):
            run(resolve("demo", settings), tmp_path / "out", resume=True)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(processes, "join", lambda: None)
    with pytest.raises(UsageError, match="processes was 1 and is 2"):
        run(resolve("demo", settings), tmp_path / "out", resume=True)
    monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    with pytest.raises(UsageError, match="mixed_precision is bf16, the recipe's precision fp32"):
        run(resolve("demo", settings), tmp_path / "other")


MEMORY = """\
preset: {hidden_size: 384, layers: 22, heads: 24, vision_hidden_size: 64, vision_layers: 1}
policy: {policy: trol_mixer, passes: 2, scope: question, training_scope: all}
stages:
  all:
    {train: [projector, mixers, decoder], data: boards, steps: 3, batch: 8, boards: 24,
     questions: 1, learning_rate: 1e-4}
"""
"""50 million parameters, of which all but the vision tower learn."""


@pytest.mark.slow
def test_half_of_a_model_takes_at_most_three_fifths_of_the_memory(tmp_path: Path) -> None:
    """Resident memory at its highest, above that of a process that has trained a small model."""
    (tmp_path / "memory.yaml").write_text(MEMORY, encoding="utf-8")
    peaks = {}
    for count in (1, 2):
        folder = tmp_path / str(count)
        folder.mkdir()
        launched(FSDP2, folder, count, "memory", str(tmp_path / "memory.yaml"))
        found = [json.loads((folder / f"memory-{n}.json").read_text()) for n in range(count)]
        assert all(50e6 < one["parameters"] < 55e6 for one in found)
        peaks[count] = max(one["peak"] for one in found)
    close(results(tmp_path / "1" / "large"), results(tmp_path / "2" / "large"))
    assert peaks[2] <= 0.6 * peaks[1], peaks
