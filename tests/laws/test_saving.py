"""Saved == loaded, and what does not belong together is refused."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText

from hosts import HOSTS, Host
from hosts.checks import greedy
from trol import depth, load_model
from trol.checkpoints.adapter import CONFIG_NAME, WEIGHTS_NAME, load, save
from trol.depth import attach, attached, detach, is_attached
from trol.errors import AdapterError, TrolError, UsageError
from trol.family.loading import load_host
from trol.policies.mixer import TrolMixer

from .subjects import assert_same, attach_settled, gap, made, policy_cases

pytestmark = pytest.mark.usefixtures("no_grad")


@pytest.mark.parametrize(("host", "name"), policy_cases("llama", "gpt2", "gemma3_vl"))
def test_an_adapter_comes_back(host: Host, name: str, tmp_path: Path) -> None:
    """Two files, no pickle; policy, settings and gates are the same on a fresh host."""
    model, inputs = attach_settled(host.build(), made(name), seed=5), host.inputs()
    said = greedy(model, inputs)
    save(model, tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {CONFIG_NAME, WEIGHTS_NAME}
    fresh = load(host.build(), tmp_path)
    assert attached(fresh)[1].depth_policy == attached(model)[1].depth_policy == made(name)
    assert_same(greedy(fresh, inputs), said, 0)
    save(model, tmp_path)  # over itself
    detach(model)
    assert_same(greedy(load(model, tmp_path), inputs), said, 0)


def test_loading_draws_no_random_gates_and_another_seed_differs(tmp_path: Path) -> None:
    host = HOSTS["llama"]
    inputs, logits = host.inputs(), []
    for seed in (1, 2):
        save(attach_settled(host.build(), made("trol"), seed=seed), tmp_path / str(seed))
        for torch_seed in (3, 4):
            torch.manual_seed(torch_seed)
            logits.append(load(host.build(), tmp_path / str(seed))(**inputs).logits)
    assert torch.equal(logits[0], logits[1])
    assert torch.equal(logits[2], logits[3])
    assert gap(logits[0], logits[2]) > 1e-2


def test_another_host_is_refused_by_both_names(tmp_path: Path) -> None:
    save(attach(HOSTS["llama"].build(), TrolMixer()), tmp_path)
    written = json.loads((tmp_path / CONFIG_NAME).read_text())
    for other in (HOSTS["qwen2"].build(), HOSTS["llama"].build(layers=6)):
        with pytest.raises(AdapterError, match=written["host_digest"]) as caught:
            load(other, tmp_path)
        assert "LlamaModel" in str(caught.value)
        assert type(other.model).__name__ in str(caught.value)
        assert not is_attached(other)


@pytest.mark.parametrize(
    "spoilt",
    [
        "no config",
        "no weights",
        "config",
        "list",
        "weights",
        "cut",
        "other",
        "policy",
        "setting",
        "type",
    ],
)
def test_damaged_adapters_are_refused(spoilt: str, tmp_path: Path) -> None:
    """One clear error, and the host stays as it was."""
    host = HOSTS["llama"]
    save(attach(host.build(), TrolMixer()), tmp_path)
    config, weights = tmp_path / CONFIG_NAME, tmp_path / WEIGHTS_NAME
    text, raw = json.loads(config.read_text()), weights.read_bytes()
    if spoilt == "no config":
        config.unlink()
    elif spoilt == "no weights":
        weights.unlink()
    elif spoilt == "config":
        config.write_text("{not json")
    elif spoilt == "list":
        config.write_text("[]")
    elif spoilt == "weights":
        weights.write_bytes(b"\x00" * len(raw))
    elif spoilt == "cut":
        weights.write_bytes(raw[:-10])
    elif spoilt == "other":
        config.write_text(json.dumps(text | {"sharing": "shared"}))
    elif spoilt == "policy":
        config.write_text(json.dumps(text | {"policy": "trol_mixr"}))
    elif spoilt == "type":
        config.write_text(json.dumps(text | {"tau": "x"}))
    elif spoilt == "setting":
        config.write_text(json.dumps(text | {"passess": 2}))
    model = host.build()
    bare = model(**host.inputs()).logits
    known = {"policy": "Did you mean 'trol_mixer'", "setting": "Did you mean 'passes'"}
    known["type"] = "setting tau is 'x': "
    with pytest.raises(AdapterError, match=re.escape(str(tmp_path))) as caught:
        load(model, tmp_path)
    assert known.get(spoilt, "") in str(caught.value)
    assert not is_attached(model)
    assert torch.equal(model(**host.inputs()).logits, bare)


def test_nothing_to_save_and_nowhere_to_load(tmp_path: Path) -> None:
    host = HOSTS["llama"]
    with pytest.raises(UsageError, match=r"call trol\.attach"):
        save(host.build(), tmp_path / "x")
    assert not (tmp_path / "x").exists()
    save(attach(host.build(), TrolMixer()), tmp_path)
    with pytest.raises(UsageError, match="attached to this model already"):
        load(attach(host.build(), "all"), tmp_path)


WITHOUT_TROL = """
import sys
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
for auto in (AutoModelForCausalLM, AutoModelForImageTextToText):
    try:
        auto.from_pretrained(sys.argv[1])
    except ValueError as error:
        assert "trol_host" in str(error), error
    else:
        raise SystemExit("opened")
"""


def test_a_saved_model_cannot_be_opened_without_trol(tmp_path: Path) -> None:
    """transformers would drop the gates with a warning and answer as the bare host."""
    model = attach_settled(HOSTS["llama"].build(), made("trol"))
    model.save_pretrained(tmp_path)
    subprocess.run([sys.executable, "-c", WITHOUT_TROL, str(tmp_path)], check=True)
    detach(model)
    model.save_pretrained(tmp_path / "plain")
    assert "trol" not in (tmp_path / "plain" / "config.json").read_text()


def test_a_saved_model_opens_with_trol(tmp_path: Path) -> None:
    from .test_generate import _tokenizer

    host = HOSTS["llama"]
    for name in ("trol", "trol_three", "skip_first"):
        model, inputs = attach_settled(host.build(), made(name)), host.inputs()
        folder = tmp_path / name
        model.save_pretrained(folder)
        _tokenizer().save_pretrained(folder)
        opened, _tokens = load_model(str(folder))
        assert gap(greedy(opened.eval(), inputs)[1], greedy(model, inputs)[1]) <= 5e-5
        assert attached(opened)[1].depth_policy == made(name)


def test_load_model_names_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(TrolError, match=str(tmp_path / "nothing")):
        load_model(str(tmp_path / "nothing"))


def test_saving_takes_the_attached_policy_not_the_one_for_a_while(tmp_path: Path) -> None:
    host = HOSTS["llama"]
    model = attach_settled(host.build(), made("trol"))
    with depth(model, "exit@1"):
        save(model, tmp_path)
    assert attached(load(host.build(), tmp_path))[1].depth_policy == made("trol")


def test_a_host_that_came_from_a_checkpoint_is_saved_and_opened(tmp_path: Path) -> None:
    """transformers writes some families under the names of their old checkpoints: not here."""
    host = HOSTS["llava"]
    host.build().save_pretrained(tmp_path / "plain")
    opened = AutoModelForImageTextToText.from_pretrained(tmp_path / "plain").eval()
    model, inputs = attach_settled(opened, made("trol")), host.inputs()
    said = greedy(model, inputs)
    model.save_pretrained(tmp_path / "attached")
    config = json.loads((tmp_path / "attached" / "config.json").read_text(encoding="utf-8"))
    assert config["model_type"] == "trol_host"
    again = load_host(tmp_path / "attached")
    assert_same(greedy(again.eval(), inputs), said, 5e-5)
