"""A recipe runs: who is frozen stays, both arms start alike, what is saved opens again."""

from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
import torch
from torch import Tensor

from trol import depth
from trol.cli.train import _validation
from trol.depth import attached
from trol.errors import TrainingError, UsageError
from trol.family.loading import load_model
from trol.training import resolve, run
from trol.training.trainable import part_of

SHORT = [
    "preset.hidden_size=32",
    "stages.vision.steps=4",
    "stages.reason.steps=4",
    "stages.step1.steps=4",
    "stages.step2.steps=4",
    *(f"stages.{name}.batch=4" for name in ("vision", "reason", "step1", "step2")),
]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model after the stages that need no policy."""
    out = tmp_path_factory.mktemp("runs") / "shared"
    run(resolve("demo", SHORT), out, only=["vision", "reason"])
    return out


def weights(folder: Path) -> dict[str, Tensor]:
    return dict(load_model(folder)[0].state_dict())


def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    """The parts of which some parameter moved."""
    return {part_of(name) for name in before if not torch.equal(before[name], after[name])}


@pytest.mark.parametrize(
    ("stage", "parts"),
    [("step1", {"projector", "mixers"}), ("step2", {"projector", "mixers", "decoder"})],
)
def test_only_the_named_parts_learn(shared: Path, tmp_path: Path, stage: str, parts: set) -> None:
    results = run(resolve("demo", SHORT), tmp_path / "one", start=shared, only=[stage])
    assert changed(weights(shared), weights(Path(results["model"]))) == parts
    assert len(results["losses"][stage]["losses"]) > 1


def test_the_twin_never_traverses_and_leaves_its_gates_alone(shared: Path, tmp_path: Path) -> None:
    recipe = resolve("demo", [*SHORT, "policy.passes=1"])
    results = run(recipe, tmp_path / "twin", start=shared, only=["step1"])
    model, _ = load_model(results["model"])
    assert attached(model)[1].depth_policy.passes == 1
    assert changed(weights(shared), dict(model.state_dict())) == {"projector"}


def test_low_rank_updates_train_the_decoder_and_are_merged(shared: Path, tmp_path: Path) -> None:
    recipe = resolve("demo", [*SHORT, "stages.step2.lora=2", "stages.step2.muon=0"])
    results = run(recipe, tmp_path / "lora", start=shared, only=["step2"])
    before, after = weights(shared), weights(Path(results["model"]))
    assert set(after) == set(before)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    inside = {name for name in moved if part_of(name) == "decoder"}
    assert inside
    assert all("proj" in name for name in inside)  # neither norms nor the token table
    assert {part_of(name) for name in moved} == {"projector", "mixers", "decoder"}


def test_parts_that_the_data_never_use_are_refused(shared: Path, tmp_path: Path) -> None:
    recipe = resolve("demo", [*SHORT, "stages.reason.train=[vision]"])  # words without pictures
    with pytest.raises(TrainingError, match=r"trains vision, of which its data \(symbols\) use"):
        run(recipe, tmp_path / "blind", only=["reason"])


def test_a_model_is_judged_by_what_it_learnt_last(shared: Path, tmp_path: Path) -> None:
    model = copytree(shared, tmp_path / "model")
    (model / "recipe.yaml").write_text(resolve("demo", SHORT).yaml())
    assert _validation(model, 0) is None
    assert "digit" in _validation(model, 9)["by_type"]
    last = resolve("demo", [*SHORT, "stages.step2.data=hops"])
    (model / "recipe.yaml").write_text(last.yaml())
    assert set(_validation(model, 24)["by_type"]) == {"1 hop", "2 hops"}


def test_the_same_seed_trains_the_same_model(tmp_path: Path) -> None:
    recipe = resolve("demo", [*SHORT, "seed=5"])
    one, two = (run(recipe, tmp_path / name) for name in ("a", "b"))
    assert one["losses"] == two["losses"]
    assert not changed(weights(tmp_path / "a"), weights(tmp_path / "b"))


def test_a_run_leaves_what_it_was_made_of_and_nothing_half_written(shared: Path) -> None:
    assert resolve(shared / "recipe.yaml") == resolve("demo", SHORT)
    assert (shared / "training.json").is_file()
    assert [path.name for path in shared.parent.iterdir()] == ["shared"]


def test_an_unknown_stage_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no stage 'step3'"):
        run(resolve("demo", SHORT), tmp_path / "never", only=["step3"])
    assert not any(tmp_path.iterdir())


def test_a_trained_model_answers_differently_with_traversal_off(shared: Path) -> None:
    model, _ = load_model(shared)
    ids = torch.tensor([[1, 6, 8, 9, 7]])
    with torch.no_grad():
        on = model(input_ids=ids).logits
        with depth(model, "plain"):
            off: Any = model(input_ids=ids).logits
    assert (on - off).abs().max() > 1e-2


def test_a_file_in_the_way_and_a_bad_preset_are_refused_before_training(tmp_path: Path) -> None:
    taken = tmp_path / "taken"
    taken.write_text("mine", encoding="utf-8")
    with pytest.raises(UsageError, match="is a file"):
        run(resolve("demo", SHORT), taken)
    assert taken.read_text(encoding="utf-8") == "mine"
    with pytest.raises(UsageError, match="no model can be made from preset"):
        run(resolve("demo", [*SHORT, "preset.heads=3"]), tmp_path / "never")


def test_a_folder_of_other_files_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("precious", encoding="utf-8")
    with pytest.raises(UsageError, match="no training run's"):
        run(resolve("demo", SHORT), tmp_path)
    assert (tmp_path / "notes.txt").read_text(encoding="utf-8") == "precious"
