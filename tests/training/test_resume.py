"""A run that is interrupted at any moment goes on to the very same end."""

import contextlib
import errno
import itertools
import json
import os
import random
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from trol import files
from trol.cli import main
from trol.errors import TrainingError, UsageError
from trol.host import processes
from trol.training import resolve, run, run_folder, trainer
from trol.training.run_folder import newest_checkpoint, whole_folder
from trol.training.stage_data import Reader

from .short import SHORT, STEPS, weights

MODULE = sys.modules[run.__module__]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """What the run finds when nobody interrupts it, and where."""
    out = tmp_path_factory.mktemp("runs") / "unbroken"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MODULE, "LOGS", 3)  # logs and checkpoints fall on different steps
        return run(resolve("demo", SHORT), out), out


@pytest.fixture(autouse=True)
def seldom_logged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MODULE, "LOGS", 3)


def same(out: Path, unbroken: tuple[dict[str, Any], Path]) -> bool:
    """Whether losses, gates and weights are those of the unbroken run, bit for bit."""
    results, place = unbroken
    losses = json.loads((out / "training.json").read_text(encoding="utf-8"))["losses"]
    ours, theirs = weights(out), weights(place)
    return (
        losses == results["losses"]
        and ours.keys() == theirs.keys()
        and all(torch.equal(ours[name], theirs[name]) for name in ours)
    )


def test_checkpoints_change_nothing(tmp_path: Path, unbroken: tuple[dict[str, Any], Path]) -> None:
    run(resolve("demo", [*SHORT, "save_every=2"]), tmp_path / "out")
    assert same(tmp_path / "out", unbroken)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_run_stopped_again_and_again_ends_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unbroken: tuple[dict[str, Any], Path]
) -> None:
    """The time is over at every third step that is not the last of its stage."""
    recipe, steps, stops = resolve("demo", SHORT), itertools.count(1), 0
    monkeypatch.setattr(processes, "any_of", lambda _: next(steps) % 3 == 0)
    while "stopped" in (results := run(recipe, tmp_path / "out", resume=True, max_hours=1.0)):
        assert not (tmp_path / "out").exists()
        stops += 1
    assert stops == (sum(STEPS.values()) - len(recipe.stages)) // 3
    assert results["model"] == str(tmp_path / "out")
    assert same(tmp_path / "out", unbroken)


def _train(out: str, settings: list[str]) -> None:
    """`trol train`, in a process of its own."""
    MODULE.LOGS = 3  # type: ignore[attr-defined]
    torch.set_num_threads(1)
    main(["train", "demo", *settings, "--resume", "--questions", "0", "--out", out])


def test_killed_again_and_again_it_ends_the_same(
    tmp_path: Path, unbroken: tuple[dict[str, Any], Path], request: pytest.FixtureRequest
) -> None:
    """Odd attempts are killed at any moment, even ones while a checkpoint is being written.

    An attempt that ends before it is killed has the next one begin from nothing.
    """
    context, draw = get_context("forkserver"), random.Random(5)
    context.set_forkserver_preload(["trol.training", "trol.cli"])
    kills = 10 if request.config.getoption("--slow") else 4
    out, drafts, killed = tmp_path / "out", 0, 0
    settings = [*SHORT, "save_every=1"]
    while True:
        process = context.Process(target=_train, args=(str(out), settings))
        process.start()
        if killed == kills:
            process.join()
            break
        drafting = killed % 2
        if drafting:
            _await(lambda: any(out.parent.glob("out.partial/*/.writing/*")), process)
            time.sleep(draw.uniform(0, 0.02))
        else:
            _await(lambda: bool(_checkpoints(out)), process)
            time.sleep(draw.uniform(0, 1.5))
        if process.is_alive():
            assert process.pid is not None
            os.kill(process.pid, signal.SIGKILL)
        process.join()
        if process.exitcode == -signal.SIGKILL:
            killed, drafts = killed + 1, drafts + drafting
        else:
            assert process.exitcode == 0
            shutil.rmtree(out)
    assert process.exitcode == 0
    assert drafts == kills // 2
    assert same(out, unbroken)


def _checkpoints(out: Path) -> list[Path]:
    return list(out.parent.glob("out.partial/stage-*/checkpoint-*"))


def _await(moment: Callable[[], bool], process: Any) -> None:
    while process.is_alive() and not moment():
        time.sleep(0.001)


@pytest.mark.parametrize("at", range(5))
def test_a_checkpoint_is_there_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    """The power goes at the n-th call of fsync or rename: what has a name is complete."""
    calls = iter(range(100))

    def dies(*_: Any) -> None:
        if next(calls) == at:
            raise SystemExit

    real = Path.replace
    monkeypatch.setattr(files, "_sync", dies)
    monkeypatch.setattr(Path, "replace", lambda path, to: (dies(), real(path, to))[1])
    with contextlib.suppress(SystemExit), whole_folder(tmp_path / "checkpoint-7") as draft:
        (draft / "a").write_text("one", encoding="utf-8")
        (draft / "b").write_text("two", encoding="utf-8")
        shutil.copytree(draft, tmp_path / "checkpoint-3")
        assert newest_checkpoint(tmp_path) == tmp_path / "checkpoint-3"
    assert next(calls) == at + 1  # it did go
    newest = newest_checkpoint(tmp_path)
    assert newest is not None
    assert sorted(path.name for path in newest.iterdir()) == ["a", "b"]


def test_another_recipe_other_data_or_processes_are_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, settings = tmp_path / "out", [*SHORT, "save_every=2"]
    run(resolve("demo", settings), out, max_hours=1e-9)
    with pytest.raises(UsageError, match="holds an unfinished run; give --resume"):
        run(resolve("demo", settings), out)
    with pytest.raises(UsageError, match=r"stages.step2.learning_rate was 0.002 and is 0.001"):
        run(resolve("demo", [*settings, "stages.step2.learning_rate=1e-3"]), out, resume=True)
    with pytest.raises(UsageError, match=r"only was .* and is"):
        run(resolve("demo", settings), out, resume=True, only=["vision"])
    monkeypatch.setattr(run_folder, "data_fingerprint", lambda *_: "others")
    with pytest.raises(UsageError, match="data of stage vision have changed"):
        run(resolve("demo", [*settings, "save_every=3"]), out, resume=True)


def test_a_finished_run_is_not_trained_again_and_not_taken_for_another(tmp_path: Path) -> None:
    out = tmp_path / "out"
    results = run(resolve("demo", SHORT), out, only=["vision"], resume=True)
    assert run(resolve("demo", SHORT), out, only=["vision"], resume=True) == results
    with pytest.raises(UsageError, match="finished run of another kind: seed was 0 and is 1"):
        run(resolve("demo", [*SHORT, "seed=1"]), out, only=["vision"], resume=True)
    with pytest.raises(UsageError, match="stages were vision and are vision, reason"):
        run(resolve("demo", SHORT), out, resume=True)


def test_a_full_disk_stops_with_the_last_checkpoint_intact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unbroken: tuple[dict[str, Any], Path]
) -> None:
    out, recipe = tmp_path / "out", resolve("demo", [*SHORT, "save_every=2"])
    with monkeypatch.context() as patch:
        real = trainer.save_file

        def full(tensors: dict[str, Any], path: Path) -> None:
            if "checkpoint-4" in str(path):
                path.write_bytes(b"half")
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            real(tensors, path)

        patch.setattr(trainer, "save_file", full)
        with pytest.raises(TrainingError, match=r"step 4 of stage reason .*No space left"):
            run(recipe, out)
    stage_two = tmp_path / "out.partial" / "stage-2"
    assert [path.name for path in stage_two.iterdir()] == ["checkpoint-2"]
    run(recipe, out, resume=True)
    assert same(out, unbroken)


@pytest.mark.parametrize("most", [100, 60_000])
def test_a_disk_that_takes_no_more_bytes_of_a_file_is_told(tmp_path: Path, most: int) -> None:
    """The kernel itself refuses: first run.json, then the optimiser in the first checkpoint."""
    recipe, out = resolve("demo", [*SHORT, "save_every=2"]), tmp_path / "out"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, limits[1]))
    try:
        with pytest.raises(TrainingError, match=r"cannot be written into .*with --resume"):
            run(recipe, out, only=["vision"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.rglob("checkpoint-*"))
    assert run(recipe, out, only=["vision"], resume=True)["model"] == str(out)


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_nan_stops_before_the_parameters_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    seen: list[Any] = []
    forward = Reader.forward

    def breaks(self: Any, **inputs: Any) -> Any:
        out = forward(self, **inputs)
        seen.append({name: p.detach().clone() for name, p in self.named_parameters()})
        if len(seen) == 4:
            breaks.reader = self  # type: ignore[attr-defined]
            # sqrt at 0 has an infinite slope: a finite loss whose gradient is not.
            bad = float("nan") if where == "loss" else (out["loss"] * 0).sqrt()
            out["loss"] = out["loss"] + bad
        return out

    monkeypatch.setattr(Reader, "forward", breaks)
    recipe = resolve("demo", [*SHORT, "save_every=3"])
    with pytest.raises(TrainingError, match=f"step1, step 4: the {where}.*checkpoint-3"):
        run(recipe, tmp_path / "out")
    reader: nn.Module = breaks.reader  # type: ignore[attr-defined]
    assert all(torch.equal(p, seen[-1][name]) for name, p in reader.named_parameters())


def test_too_little_time_and_an_unknown_tracker_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="max_hours is 0"):
        run(resolve("demo", SHORT), tmp_path / "out", max_hours=0)
    with pytest.raises(UsageError, match="Did you mean 'tensorboard'"):
        run(resolve("demo", SHORT), tmp_path / "out", report_to=["tensorbord"])
    assert not any(tmp_path.iterdir())
