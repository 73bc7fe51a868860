"""Gates are known to their neighbours: PEFT, accelerate, DDP, what saves and what offloads."""

from __future__ import annotations

import threading
import warnings
from contextvars import copy_context
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

import trol.family
from hosts import HOSTS
from trol import depth, load, save, speculate
from trol.depth import attach, attached
from trol.depth.attachment import gates_of
from trol.errors import UsageError
from trol.policies.exits import EarlyExit
from trol.policies.mixer import TrolMixer
from trol.policies.router import Router

from .subjects import POLICIES, attach_settled, made

GATED = ("trol", "trol_three", "exit_heads", "controller", "router")


def said(model: Any) -> list[list[int]]:
    with torch.no_grad():
        ids = HOSTS["llama"].inputs(length=8)["input_ids"]
        return model.generate(ids, max_new_tokens=4, do_sample=False).tolist()


def gates(model: Any) -> list[nn.Module]:
    return [gate for gate in gates_of(attached(model)[1]) if gate is not None]


@pytest.mark.parametrize("name", GATED)
def test_lora_on_all_linear_maps_leaves_gates_alone(name: str) -> None:
    model = attach(HOSTS["llama"].build(), made(name))
    before = [type(gate) for gate in gates(model)]
    tuned = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"))
    assert [type(gate) for gate in gates(tuned)] == before
    ids = HOSTS["llama"].inputs()["input_ids"]
    tuned(input_ids=ids, labels=ids).loss.backward()


LEARNING = {
    **POLICIES,
    "passes 1": lambda: TrolMixer(passes=1),
    "some without": lambda: TrolMixer(tau=[None, 0.0, 0.3, None]),
    "shared, some without": lambda: TrolMixer(sharing="shared", tau=[None, 0.0, 0.0, None]),
    "heads": lambda: EarlyExit("margin", 0.5, heads=True),
    "menu": lambda: Router(["0 3", "all"], hidden=8),
}


@pytest.mark.parametrize("name", LEARNING)
def test_parameters_that_learn_have_a_gradient(name: str) -> None:
    """What DDP waits for, a step gives: gates that the policy never asks are attached frozen."""
    host = HOSTS["llama"]
    model = attach(host.build(), LEARNING[name]()).train()
    ids = host.inputs()["input_ids"]
    labels = ids.clone()
    labels[:, :3] = -100
    model(input_ids=ids, labels=labels).loss.backward()
    for gate in gates(model):
        for parameter in gate.parameters():
            assert parameter.requires_grad == (parameter.grad is not None)


assert trol.family  # importing it tells the Auto classes how such folders are opened


def places() -> dict[str, str]:
    ends = ["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"]
    layers = {f"model.layers.{i}": "disk" if i > 1 else "cpu" for i in range(4)}
    return {**dict.fromkeys(ends, "cpu"), **layers}


def _opened_in_part(model: Any, folder: Path) -> Any:
    model.save_pretrained(folder / "host")
    return AutoModelForCausalLM.from_pretrained(
        folder / "host", device_map=places(), offload_folder=folder / "weights"
    ).eval()


OFFLOADS = {
    "opened in part": _opened_in_part,
    "cpu_offload": lambda model, _: cpu_offload(model),
    "disk_offload": lambda model, folder: disk_offload(model, folder / "weights") or model,
    "dispatched": lambda model, folder: dispatch_model(
        model, places(), offload_dir=folder / "weights", main_device="cpu"
    ),
}


@pytest.mark.filterwarnings("ignore:You are calling .generate:UserWarning")
@pytest.mark.parametrize("road", ["attach", "load", "attach first"])
@pytest.mark.parametrize("way", OFFLOADS)
def test_gates_of_an_offloaded_host_have_data_and_a_place(
    way: str, road: str, tmp_path: Path
) -> None:
    host = HOSTS["llama"]
    whole = attach_settled(host.build(), made("trol"))
    save(whole, tmp_path / "adapter")
    model = host.build()
    if road == "attach first":
        model = OFFLOADS[way](attach_settled(model, made("trol")), tmp_path)
    else:
        model = OFFLOADS[way](model, tmp_path) or model
        if road == "load":
            load(model, tmp_path / "adapter")
        else:
            attach_settled(model, made("trol"))
    assert said(model) == said(whole)


def test_saving_adapters_alone_says_so(tmp_path: Path) -> None:
    model = attach_settled(HOSTS["llama"].build(), made("trol"))
    try:
        model.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]))
    except ValueError as error:  # transformers 5.24 wants a PEFT that is not released yet
        if "peft" not in str(error).lower():
            raise
        pytest.skip(str(error))
    with pytest.warns(UserWarning, match=r"trol\.save\(model, folder\)"):
        model.save_pretrained(tmp_path)


def test_pushing_what_hides_its_policy_is_refused(tmp_path: Path) -> None:
    model = attach(HOSTS["llama"].build(), TrolMixer())
    with pytest.raises(UsageError, match=r"model\.push_to_hub"):
        model.save_pretrained(tmp_path / "x", push_to_hub=True)
    assert not (tmp_path / "x").exists()


def streamed(model: Any, *, with_context: bool = False) -> list[Any]:
    """What `generate` gives in a thread of its own, as for a streamer."""
    out: list[Any] = []

    def work() -> None:
        out.append(said(model))

    run = (copy_context().run, (work,)) if with_context else (work, ())
    thread = threading.Thread(target=run[0], args=run[1])
    thread.start()
    thread.join()
    return out[0]


@pytest.mark.parametrize("carries", [None, "trol"])
def test_a_thread_started_inside_a_block_is_told(carries: str | None) -> None:
    """The block is in force in it only with the context; without, the thread is warned."""
    model = HOSTS["llama"].build()
    if carries:
        attach_settled(model, made(carries))
    outside = said(model)
    with depth(model, "exit@1"):
        inside = said(model)
        assert inside != outside
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert streamed(model, with_context=True) == inside
        with pytest.warns(UserWarning, match="started inside it"):
            assert streamed(model) == outside
    with speculate(model, "exit@2") as spoken:
        assert streamed(model, with_context=True) == outside
        rounds = spoken.rounds
        assert rounds
        with pytest.warns(UserWarning, match="started inside it"):
            assert streamed(model) == outside
        assert spoken.rounds == rounds
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert streamed(model) == outside
