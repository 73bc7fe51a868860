"""A run can be watched: figures in the logs, progress, trackers, the page and the model card."""

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerControl, TrainerState

import trol
from trol import progress
from trol.cli import main
from trol.cli.terminal import progress as progress_of
from trol.errors import DataError, UsageError
from trol.reports.description import write_card
from trol.reports.training import write_run
from trol.training import progress as watching
from trol.training import resolve, run
from trol.training import run as training
from trol.training.progress import Progress
from trol.training.trainer import GateMeans, Speed

from .ranks import attached_model
from .short import SHORT


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of `trol train`."""
    out = tmp_path_factory.mktemp("runs") / "made"
    with pytest.raises(SystemExit) as left:
        main(["train", "demo", *SHORT, "--questions", "18", "--out", str(out)])
    assert left.value.code == 0
    return out


def test_the_mean_gate_is_that_of_the_trace() -> None:
    model, ids = attached_model()
    means = GateMeans(model)
    model.eval()(input_ids=ids)
    assert means.take() == {}  # nobody asked
    means.watch()
    means.watch()  # a second time changes nothing
    with trol.trace(model) as trace:
        model(input_ids=ids)
    taken = means.take()
    wanted = trace.weights[:, 2].mean(dim=(1, 2))
    torch.testing.assert_close(torch.tensor(list(taken.values())), wanted)
    assert list(taken) == ["gate/0", "gate/1", "gate/2"]
    assert not any(layer.depth._forward_hooks for layer in model.model.layers)


def test_a_policy_without_gates_logs_none() -> None:
    model, ids = attached_model()
    means = GateMeans(model)
    means.watch()
    with trol.depth(model, "plain"):
        model(input_ids=ids)
    assert means.take() == {}


def test_speed_counts_between_two_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 2.0, 3.0])
    monkeypatch.setattr(progress.time, "perf_counter", lambda: next(clock))
    speed = Speed()
    speed.count(60)
    speed.count(40)
    assert speed.since_last() == {"tokens_per_second": 50.0}
    assert speed.since_last() == {}


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_shows_loss_rate_speed_gates_and_time(
    monkeypatch: pytest.MonkeyPatch, terminal: bool
) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(stream, "isatty", lambda: terminal)
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", -1.0)
    monkeypatch.setenv("COLUMNS", "160")
    shown, state, control = Progress("step2"), TrainerState(), TrainerControl()
    state.max_steps, state.global_step = 20, 10  # resumed at step 10
    args: Any = None
    logs = {"loss": 1.25, "learning_rate": 2e-3, "tokens_per_second": 5400.4, "gate/0": 0.25}
    shown.on_train_begin(args, state, control)
    shown.on_log(args, state, control, logs=logs)
    state.global_step = 15
    shown.on_step_end(args, state, control)
    shown.on_train_end(args, state, control)
    assert "loss 1.250, lr 2.0e-03, 5400 tokens/s, gates 0.25" in stream.getvalue()
    assert "15/20" in stream.getvalue()


@pytest.mark.parametrize("terminal", [True, False])
def test_a_long_thing_shows_how_far_it_is(monkeypatch: pytest.MonkeyPatch, terminal: bool) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(stream, "isatty", lambda: terminal)
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", -1.0)
    monkeypatch.setenv("COLUMNS", "160")
    with progress_of("measuring", "plan") as shown:
        shown(5, 20)  # goes on from there
        shown(6, 20, "last look")
    assert "6/20" in stream.getvalue()
    assert "last look" in stream.getvalue()
    if not terminal:
        assert stream.getvalue().startswith("measuring: plan 5/20\nlast look: plan 6/20, ")
        assert stream.getvalue().endswith(" s left\n")


def test_what_is_quick_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_of("measuring") as shown:
        shown(1, 2)
    assert capsys.readouterr().err == ""


def test_many_gates_are_shown_as_heights() -> None:
    logs = {"loss": 1.0, "learning_rate": 1.0} | {f"gate/{i}": i / 8 for i in range(9)}
    assert watching._figures(logs).endswith("gates ▁▂▃▄▅▆▇██")


def test_a_run_leaves_curves_a_page_and_a_card(folder: Path) -> None:
    results = json.loads((folder / "training.json").read_text(encoding="utf-8"))
    assert "gates" not in results["losses"]["reason"]  # the plain model learns
    curve = results["losses"]["step2"]
    assert [len(gates) for gates in curve["gates"]] == [2] * len(curve["steps"])
    assert results["validation"]["n"] == 18
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert page.count("<svg") == 7  # four losses, two stages with gates, accuracy
    for kind in results["validation"]["by_type"]:
        assert f"<td>{kind}</td>" in page
    card_text = (folder / "README.md").read_text(encoding="utf-8")
    assert card_text.startswith("---\nlibrary_name: transformers\ntags:\n- trol\n")
    assert (
        f"| step2 | projector, mixers, decoder | boards | {curve['losses'][-1]:.3f} |" in card_text
    )


def test_page_and_card_need_a_finished_run(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"training\.json cannot be read.*run `trol train`"):
        write_run(tmp_path)
    (tmp_path / "training.json").write_text('{"seed": 0}', encoding="utf-8")
    (tmp_path / "recipe.yaml").write_text("{}", encoding="utf-8")
    with pytest.raises(DataError, match="lacks losses"):
        write_card(tmp_path)


def test_tensorboard_gets_the_same_figures(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = tmp_path / "out"
    results = run(resolve("demo", SHORT), out, only=["step1"], report_to=["tensorboard"])
    read = EventAccumulator(str(tmp_path / "out.logs" / "step1"))
    read.Reload()
    losses = [event.value for event in read.Scalars("train/loss")]
    assert losses == pytest.approx(results["losses"]["step1"]["losses"])
    gates = [event.value for event in read.Scalars("train/gate/1")]
    assert gates == pytest.approx([both[1] for both in results["losses"]["step1"]["gates"]])


def test_trackio_gets_the_same_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trackio = pytest.importorskip("trackio")
    logged: list[dict[str, Any]] = []
    monkeypatch.setattr(trackio, "init", lambda **_: None)
    monkeypatch.setattr(trackio, "log", lambda logs, **_: logged.append(logs))
    monkeypatch.setattr(trackio, "finish", lambda: None)
    monkeypatch.setattr(trackio, "config", {}, raising=False)
    monkeypatch.setattr(trackio, "freeze", lambda **_: pytest.fail("nothing may leave"))
    results = run(resolve("demo", SHORT), tmp_path / "out", only=["step1"], report_to=["trackio"])
    losses = [logs["train/loss"] for logs in logged if "train/loss" in logs]
    assert losses == results["losses"]["step1"]["losses"]


def test_a_tracker_that_is_not_installed_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules[training.__module__], "find_spec", lambda _: None)
    with pytest.raises(UsageError, match="pip install trackio"):
        run(resolve("demo", SHORT), tmp_path / "out", report_to=["trackio"])
