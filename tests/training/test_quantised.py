"""Four and eight bits in training: what is quantised, and gradients that reach below."""

import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from training import standins
from trol.errors import HostError, UsageError
from trol.host.weights import is_quantised
from trol.training import resolve
from trol.training.adapters import finished, learner_of, merged
from trol.training.opening import opened
from trol.training.recipe import Recipe
from trol.training.stage_data import stage_data
from trol.training.trainable import check_quantised, let_gradients_through, part_of

bnb = pytest.importorskip("bitsandbytes")

pytestmark = pytest.mark.filterwarnings("ignore:.*gemm_4bit_forward.*")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("hosts")
    standins.llm(place / "llm")
    standins.vlm(place / "vlm")
    standins.chats(place, pictures=True)
    standins.chats(place / "text", pictures=False)
    return place


def recipe(folder: Path, *overrides: str, name: str = "any-vlm") -> Recipe:
    host, data = ("vlm", "chat.jsonl") if name == "any-vlm" else ("llm", "text/chat.jsonl")
    stages = [
        f"stages.{stage}.{key}"
        for stage in ("step1", "step2")
        for key in (f"data={folder / data}", "batch=4", "accumulate=1", "learning_rate=1e-2")
    ]
    return resolve(name, [f"host={folder / host}", *stages, "checkpointing=false", *overrides])


def batch_of(data) -> dict[str, torch.Tensor]:
    return data.collate([data.rows[i] for i in range(4)])


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("name", ["any-vlm", "any-llm"])
def test_the_decoder_alone_is_quantised(folder: Path, bits: int, name: str) -> None:
    model, _ = opened(recipe(folder, f"bits={bits}", name=name), None)
    kind = bnb.nn.Linear4bit if bits == 4 else bnb.nn.Linear8bitLt
    maps = {n for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    quantised = {n for n, m in model.named_modules() if isinstance(m, kind)}
    wanted = {n for n in maps if part_of(f"{n}.weight") == "decoder" and not n.endswith("lm_head")}
    assert quantised == wanted
    assert all(
        p.dtype in (torch.float32, torch.bfloat16)
        for n, p in model.named_parameters()
        if part_of(n) != "decoder"
    )


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("bits", [4, 8])
def test_gradients_pass_after_an_evaluation(folder: Path, bits: int, precision: str) -> None:
    """bitsandbytes repacks 4-bit weights in an evaluation, and then has no gradient."""
    settings = recipe(folder, f"bits={bits}", f"precision={precision}")
    model, processor = opened(settings, None)
    stage = settings.stages["step1"]
    grads = []
    for evaluate in (False, True):
        learner = learner_of(model, stage)
        data = stage_data(learner, processor, stage, 0)
        batch = batch_of(data)
        learner.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            if evaluate:
                with torch.no_grad():
                    data.reader.eval()(**batch)
            data.reader.train()(**batch)["loss"].backward()
        grads.append({n: p.grad.clone() for n, p in learner.named_parameters() if p.requires_grad})
    assert {part_of(n) for n in grads[0]} == {"projector", "mixers"}
    for name, grad in grads[1].items():
        assert grad.abs().max() > 0, name
        assert torch.equal(grad, grads[0][name]), name


def test_a_model_that_was_packed_before_is_unpacked(folder: Path) -> None:
    torch.manual_seed(0)
    layer = bnb.nn.Linear4bit(64, 64, bias=False, quant_type="nf4", compute_dtype=torch.bfloat16)
    layer = layer.to("cpu")
    state = torch.randn(2, 64, dtype=torch.bfloat16, requires_grad=True)
    layer.train()(state).sum().backward()
    before, state.grad = state.grad, None
    with torch.no_grad():
        layer.eval()(state.detach())
    let_gradients_through(nn.Sequential(layer))
    layer.eval()(state).sum().backward()
    assert state.grad is not None
    assert (state.grad - before).abs().max() < 1e-2 * before.abs().max()


@pytest.mark.parametrize("bits", [4, 8])
def test_it_learns_as_the_full_weights_do(folder: Path, bits: int) -> None:
    losses = {}
    for kind in (0, bits):
        settings = recipe(folder, f"bits={kind}", "precision=fp32", name="any-llm")
        torch.manual_seed(0)
        model, tokenizer = opened(settings, None)
        stage = settings.stages["step2"]
        torch.manual_seed(0)
        learner = learner_of(model, stage)
        data = stage_data(learner, tokenizer, stage, 0)
        data.reader.train()
        batch = batch_of(data)
        steps = torch.optim.AdamW([p for p in learner.parameters() if p.requires_grad], 3e-3)
        curve = []
        for _ in range(30):
            loss = data.reader(**batch)["loss"]
            steps.zero_grad()
            loss.backward()
            steps.step()
            curve.append(loss.item())
        losses[kind] = curve[0], curve[-1]
        ended = finished(learner, stage)
        assert is_quantised(ended) == bool(kind)
    fell = {kind: first - last for kind, (first, last) in losses.items()}
    assert fell[0] > 1
    assert fell[bits] > 0.9 * fell[0]


def test_what_cannot_be_is_told(folder: Path) -> None:
    with pytest.raises(UsageError, match="8 bits and cannot learn"):
        recipe(folder, "bits=8", "stages.step2.lora=0", "stages.step2.merge=true")
    with pytest.raises(UsageError, match="Known: 0, 4, 8"):
        recipe(folder, "bits=3")
    settings = recipe(folder, "bits=4")
    model, _ = opened(settings, None)
    with pytest.raises(HostError, match="is quantised and cannot learn"):
        learner_of(model, resolve("tiny").stages["step2"])
    with pytest.raises(HostError, match="would round them away"):
        merged(learner_of(model, settings.stages["step2"]))
    full, _ = opened(recipe(folder, "bits=0"), None)
    with pytest.raises(HostError, match="quantised are: none"):
        check_quantised(full)


def test_nothing_is_done_to_full_weights() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        let_gradients_through(nn.Linear(2, 2))
