"""Recipes: carried, resolved, overridden, and refused with a cure."""

from pathlib import Path

import pytest
import yaml

from trol.errors import UsageError
from trol.training import names, resolve

RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.mark.parametrize("name", names())
def test_a_carried_recipe_resolves_to_yaml_that_resolves_to_itself(
    name: str, tmp_path: Path
) -> None:
    recipe = resolve(name)
    again = tmp_path / "again.yaml"
    again.write_text(recipe.yaml(), encoding="utf-8")
    assert resolve(again) == recipe


@pytest.mark.parametrize("name", names())
def test_a_carried_recipe_is_short_and_its_header_is_a_command(name: str) -> None:
    lines = (RECIPES / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 40
    assert lines[0].startswith("# trol ")


def test_overrides_reach_into_stages_and_policy() -> None:
    recipe = resolve("tiny", ["seed=3", "stages.step2.learning_rate=1e-4", "policy.passes=1"])
    assert (recipe.seed, recipe.policy["passes"]) == (3, 1)
    assert recipe.stages["step2"].learning_rate == 1e-4
    assert recipe.stages["step1"] == resolve("tiny").stages["step1"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("sed=1", "Did you mean 'seed'"),
        ("stages.step1.step=9", "Did you mean 'steps'"),
        ("stages.step1.steps=many", "stages.step1.steps is 'many'"),
        ("stages.step1.steps=0", "give 1 or more"),
        ("stages.step1.data=board", "Did you mean 'boards'"),
        ("stages.step1.train=[mixer]", "Did you mean 'mixers'"),
        ("stages.new={data: boards}", "lacks train"),
        ("stages.step3.steps=1", "unknown stage 'step3'"),
        ("stages.step1.learning_rate=nan", "give 0 to 10"),
        ("stages.step1.packed=7", "give 0 to 1"),
        ("stages.step1.train=decoder", "must be a list"),
        ("stages={}", "no stage"),
        ("policy.policy=trol_mixr", "Did you mean 'trol_mixer'"),
        ("policy=plain", "must be keys and values"),
        ("seed=-1", "give 0 to"),
        ("bits=5", "Known: 0, 4, 8"),
        ("precision=fp8", "precision 'fp8'"),
        ("keep=0", "keep is 0; give 1 to"),
        ("save_every=-1", "give 0 to"),
        ("host=a/b", "both a preset and a host"),
        ("preset={}", "names no model"),
        ("stages.step1.epochs=1", "give 1 or more of the one and 0 of the other"),
        ("stages.step1.schedule=cosin", "Did you mean 'cosine'"),
        ("stages.step1.final_rate=1", "give 0 to the learning rate"),
        ("stages.step1.accumulate=5", "give a multiple"),
        ("stages.step1.lora_alpha=8", "lora is 0; give a rank"),
        ("stages.step1.per_visit=true", "lora is 0; give a rank"),
        ("stages.step1.lora_targets=[q_proj]", "lora is 0; give a rank"),
        ("stages.step1.data=trol-2.27", "Did you mean 'trol-2.27m'"),
        ("stages.step1.data=chat.txt", "unknown stages.step1.data"),
        ("bits=4", "8 bits|4 bits and cannot learn"),
        ("seed", "write key=value"),
        ("seed.deep=1", "nothing lies below it"),
    ],
)
def test_a_wrong_override_is_told_with_the_cure(override: str, message: str) -> None:
    with pytest.raises(UsageError, match=message.replace("(", r"\(")):
        resolve("tiny", [override])


def test_updates_that_are_not_merged_follow_no_decoder_that_is_trained_whole() -> None:
    apart = ["stages.step2.lora=4", "stages.step2.merge=false"]
    with pytest.raises(UsageError, match="stage reason trains the decoder itself"):
        resolve("tiny", apart)
    only = ["stages={step2: {train: [decoder], data: boards, steps: 1, lora: 4, merge: false}}"]
    assert not resolve("tiny", only).stages["step2"].merge


@pytest.mark.parametrize("data", ["mix.yaml", "chats/a.jsonl", "chats/a.json", "trol-2.27m"])
def test_a_stage_learns_from_files_too(data: str) -> None:
    assert resolve("any-vlm", [f"stages.step1.data={data}"]).stages["step1"].data == data


def test_a_missing_recipe_and_a_broken_one_are_told(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="Did you mean 'tiny'"):
        resolve("tinny")
    with pytest.raises(UsageError, match="no recipe file"):
        resolve(tmp_path / "none.yaml")
    broken = tmp_path / "broken.yaml"
    broken.write_text("stages: [", encoding="utf-8")
    with pytest.raises(UsageError, match="no YAML"):
        resolve(broken)
    broken.write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match="is not text"):
        resolve(broken)
    broken.write_text(yaml.safe_dump([1]), encoding="utf-8")
    with pytest.raises(UsageError, match="not keys and values"):
        resolve(broken)
