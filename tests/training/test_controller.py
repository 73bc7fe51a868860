"""Controllers learn by recipes: what a visit costs, or how many are wanted, is what they make."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from training import standins
from trol.depth import attached, trace
from trol.depth.attachment import gates_of
from trol.errors import UsageError
from trol.training import resolve, run
from trol.training.opening import reopened
from trol.training.recipe import Recipe

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*")

LAYERS = 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("controller")
    standins.llm(place / "llm", num_hidden_layers=LAYERS)
    standins.chats(place / "read", pictures=False, rows=16)
    return place


def recipe(folder: Path, policy: dict[str, Any], **changes: Any) -> Recipe:
    stage = {
        "train": ["mixers"],
        "data": str(folder / "read" / "chat.jsonl"),
        "steps": 40,
        "batch": 8,
        "mixer_learning_rate": 0.1,
        "warmup_steps": 1,
    }
    stage |= {key: changes.pop(key) for key in list(changes) if key in (*stage, "accumulate")}
    written = {
        "host": str(folder / "llm"),
        "policy": {"policy": "controller"} | policy,
        "stages": {"control": stage},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(written | changes), encoding="utf-8")
    return resolve(path)


def executed(folder: Path, out: Path, *, training: bool = False) -> float:
    """The share of visits that answer tokens make, as chosen at evaluation or drawn."""
    model, processor = reopened(out)
    model.train(training)
    text = processor.apply_chat_template(
        [[{"role": "user", "content": standins.ASKED[0]}, {"role": "assistant", "content": "7"}]],
        return_dict=True,
        return_tensors="pt",
        return_assistant_tokens_mask=True,
    )
    masks = text.pop("assistant_masks")
    shares = []
    for seed in range(16 if training else 1):
        torch.manual_seed(seed)
        with torch.no_grad(), trace(model) as seen:
            model(**text, labels=text["input_ids"].where(masks.bool(), -100))
        shares.append(seen.visits[:, masks.bool()].float().mean())
    return float(torch.stack(shares).mean())


def test_a_target_is_reached_and_told(folder: Path, tmp_path: Path) -> None:
    settings = recipe(folder, {"target": 0.6, "weight": 10.0})
    results = run(settings, tmp_path / "out")
    logged = results["losses"]["control"]["gates"]
    assert len(logged[0]) == LAYERS - 2
    first, last = ((sum(means) + 2) / LAYERS for means in (logged[0], logged[-1]))
    assert first > 0.9
    assert abs(last - 0.6) < 0.1
    assert abs(executed(folder, tmp_path / "out", training=True) - 0.6) < 0.1
    config = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))
    assert config["model_type"] == "trol_host"


@pytest.mark.parametrize(("alpha", "share"), [(0.0, 1.0), (20.0, 2 / LAYERS)])
def test_what_visits_cost_decides_how_many_are_made(
    folder: Path, tmp_path: Path, alpha: float, share: float
) -> None:
    """Free, and never pushed: the full model. Dear: only the layers that always run are left."""
    rate = 0.1 if alpha else 0.005  # random layers help nobody: fast controllers would drop them
    settings = recipe(folder, {"alpha": alpha}, steps=20, mixer_learning_rate=rate)
    run(settings, tmp_path / "out")
    assert executed(folder, tmp_path / "out") == pytest.approx(share)


def test_the_token_agnostic_control_decides_for_all_tokens_alike(
    folder: Path, tmp_path: Path
) -> None:
    run(recipe(folder, {"input": "ones", "target": 0.6}), tmp_path / "out")
    model, processor = reopened(tmp_path / "out")
    inputs = processor("which digit is it? red or blue?", return_tensors="pt")
    with torch.no_grad(), trace(model.eval()) as seen:
        model.generate(**inputs, max_new_tokens=6, do_sample=False)
    answered = seen.visits[:, 0, inputs["input_ids"].shape[1] :]
    assert (answered == answered[:, :1]).all()


@pytest.mark.parametrize(
    "changes",
    [
        {"train": ["mixers", "decoder"]},
        {"accumulate": 4},
        {"checkpointing": True},
        {"precision": "bf16"},
    ],
    ids=["decoder too", "accumulated", "checkpointed", "bf16"],
)
def test_every_way_to_train(folder: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    """Every module moves; the backbone moves only where it is to."""
    settings = recipe(folder, {"alpha": 1.0}, steps=3, **changes)
    before, _ = reopened_untrained(settings)
    run(settings, tmp_path / "out")
    after, _ = reopened(tmp_path / "out")
    weights = zip(before.state_dict().items(), after.state_dict().values(), strict=True)
    moved = {name for (name, old), new in weights if not torch.equal(old, new)}
    assert sum(".depth.bias_" in name for name in moved) == LAYERS - 2
    assert any(".depth." not in name for name in moved) == ("decoder" in changes.get("train", ()))
    gates = [gate for gate in gates_of(attached(after)[1]) if gate is not None]
    assert len(gates) == LAYERS - 2


def test_a_router_is_not_trained_by_a_recipe(folder: Path) -> None:
    with pytest.raises(UsageError, match="a router decides by 0 and 1"):
        recipe(folder, {"policy": "router", "menu": ["0-1", "all"]})


def reopened_untrained(settings: Recipe) -> tuple[Any, Any]:
    from transformers import set_seed

    from trol.training.opening import opened

    set_seed(settings.seed)
    return opened(settings, None)
