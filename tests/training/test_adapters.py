"""Adapters: saved, opened, trained on, merged; refused on another host."""

import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import trol
from training import standins
from training.test_quantised import batch_of, recipe
from trol.checkpoints.adapter import PARTS_NAME
from trol.cli import main
from trol.errors import AdapterError, UsageError
from trol.training.adapters import (
    finished,
    learner_of,
    merged,
    open_adapters,
    save_adapters,
    save_trained,
)
from trol.training.opening import opened
from trol.training.stage_data import stage_data

pytestmark = pytest.mark.filterwarnings("ignore:.*gemm_4bit_forward.*")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("hosts")
    standins.vlm(place / "vlm")
    standins.llm(place / "llm")
    standins.llm(place / "other", num_hidden_layers=3)
    standins.chats(place, pictures=True)
    standins.chats(place / "text", pictures=False)
    return place


def trained(model, processor, stage, steps: int = 3):
    """The learner after some steps of the stage, and the batch that it learnt from."""
    learner = learner_of(model, stage)
    data = stage_data(learner, processor, stage, 0)
    data.reader.train()
    batch = batch_of(data)
    adamw = torch.optim.AdamW([p for p in learner.parameters() if p.requires_grad], 1e-2)
    for _ in range(steps):
        adamw.zero_grad()
        data.reader(**batch)["loss"].backward()
        adamw.step()
    return learner, batch


def logits(model, batch) -> Tensor:
    with torch.no_grad():
        return model.eval()(**{k: v for k, v in batch.items() if k != "labels"}).logits


@pytest.mark.parametrize("bits", [0, 4, 8])
@pytest.mark.parametrize("per_visit", [False, True])
@pytest.mark.parametrize("name", ["any-vlm", "any-llm"])
def test_saved_opened_and_trained_on(
    folder: Path, tmp_path: Path, name: str, bits: int, per_visit: bool
) -> None:
    changes = (f"bits={bits}", "precision=fp32", f"stages.step2.per_visit={per_visit}")
    built = recipe(folder, *changes, "stages.step2.lora=4", name=name)
    stage = built.stages["step2"]
    learner, batch = trained(*opened(built, None), stage)
    learner = finished(learner, stage)
    save_trained(learner, built, tmp_path / "saved")
    again, processor = opened(built, tmp_path / "saved")
    assert isinstance(again, PeftModel)
    assert torch.equal(logits(again, batch), logits(learner, batch))
    more, _ = trained(again, processor, stage)
    assert more is again
    assert (logits(more, batch) - logits(learner, batch)).abs().max() > 1e-3


def test_gates_and_projector_of_step_1_are_saved_without_updates(
    folder: Path, tmp_path: Path
) -> None:
    built = recipe(folder, "bits=8", "precision=fp32")
    stage = built.stages["step1"]
    model, batch = trained(*opened(built, None), stage)
    model = finished(model, stage)
    save_trained(model, built, tmp_path / "saved")
    again, _ = opened(built, tmp_path / "saved")
    assert not isinstance(again, PeftModel)
    assert torch.equal(logits(again, batch), logits(model, batch))


def test_adapters_of_four_bits_are_merged_into_full_weights(folder: Path, tmp_path: Path) -> None:
    built = recipe(folder, "bits=4", "precision=fp32")
    learner, batch = trained(*opened(built, None), built.stages["step2"])
    save_adapters(learner, tmp_path / "saved")
    full = recipe(folder, "bits=0", "precision=fp32")
    learner, _ = opened(full, tmp_path / "saved")
    host = trol.detach(opened(full, None)[0])
    model = merged(open_adapters(host, tmp_path / "saved"))
    assert not any("lora_" in key for key in model.state_dict())
    assert (logits(model, batch) - logits(learner, batch)).abs().max() < 1e-4


def test_what_does_not_belong_together_is_refused(folder: Path, tmp_path: Path) -> None:
    built = recipe(folder, "precision=fp32", name="any-llm")
    learner, _ = trained(*opened(built, None), built.stages["step2"])
    saved = save_adapters(learner, tmp_path / "saved")
    other = recipe(folder, "precision=fp32", f"host={folder / 'other'}", name="any-llm")
    with pytest.raises(AdapterError, match="load it onto the model it was trained on"):
        opened(other, saved)
    with pytest.raises(UsageError, match="comes with the policy"):
        opened(recipe(folder, "policy.passes=3", name="any-llm"), saved)
    model, _ = opened(built, None)
    with pytest.raises(AdapterError, match="holds no trained adapters"):
        open_adapters(model, tmp_path)


def test_damaged_files_are_told(folder: Path, tmp_path: Path) -> None:
    built = recipe(folder, "precision=fp32")
    learner, _ = trained(*opened(built, None), built.stages["step2"])
    saved = save_adapters(learner, tmp_path / "saved")
    for damage, message in (
        (lambda at: (at / PARTS_NAME).write_bytes(b"no"), "is damaged"),
        (lambda at: _resize(at / PARTS_NAME), "this host has"),
        (lambda at: (at / "adapter_model.safetensors").write_bytes(b"no"), "cannot be put on"),
        (lambda at: (at / "adapter_config.json").write_text("{"), "cannot be put on"),
    ):
        shutil.rmtree(tmp_path / "broken", ignore_errors=True)
        shutil.copytree(saved, tmp_path / "broken")
        damage(tmp_path / "broken")
        with pytest.raises(AdapterError, match=message):
            opened(built, tmp_path / "broken")


def _resize(file: Path) -> None:
    save_file({name: tensor[:1].clone() for name, tensor in load_file(file).items()}, file)


@pytest.mark.parametrize("policy", ["plain", "plan", "trol_mixer"])
def test_a_run_with_updates_is_exported_where_a_plain_model_can_be_it(
    folder: Path, tmp_path: Path, policy: str, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {"plan": "{policy: plan, plan: '1:2', scope: all}"}
    changes = [f"policy={settings.get(policy, f'{{policy: {policy}}}')}", "precision=fp32"]
    changes += ["stages.step2.train=[decoder]", "stages.step2.lora=4"]
    built = recipe(folder, *changes, name="any-llm")
    learner, batch = trained(*opened(built, None), built.stages["step2"])
    run, plain = tmp_path / "run", tmp_path / "plain"
    save_trained(learner, built, run)
    (run / "recipe.yaml").write_text(built.yaml(), encoding="utf-8")
    with pytest.raises(SystemExit) as left:
        main(["export", str(run), str(plain), "--plan", "1:2" if policy == "plan" else "all"])
    if policy == "trol_mixer":
        assert left.value.code == 1
        assert "carries the policy 'trol_mixer'" in capsys.readouterr().err
        assert not plain.exists()
        return
    assert left.value.code == 0
    own = AutoModelForCausalLM.from_pretrained(plain)
    assert not any("lora" in name for name, _ in own.named_parameters())
    difference = (logits(own, batch) - logits(learner, batch)).abs().max()
    host = AutoModelForCausalLM.from_pretrained(built.host)
    learnt = (logits(host, batch) - logits(learner, batch)).abs().max()
    assert difference < 1e-4
    assert learnt > 1e-2
