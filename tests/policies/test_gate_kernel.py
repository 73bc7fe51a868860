"""The Triton kernel and the operators that it stands for give the same; and it is never needed."""

import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator

import pytest
import torch

from hosts import HOSTS
from laws.subjects import attach_settled
from trol.depth import attach, executor
from trol.errors import HostError, UsageError
from trol.host import torch_internals as triton_
from trol.policies import mixer
from trol.policies.mixer import TrolMixer

TWINS = """
    import torch
    from trol.depth.policy import mixture
    from trol.policies.gate_kernel import gated_mixture
    from trol.policies.mixer import Gate

    torch.manual_seed(0)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for width in (24, 64, 100, 8193):
            gate = Gate(width, None).to(dtype)
            x, y = (torch.randn(2, 3, width).to(dtype) for _ in range(2))
            with torch.no_grad():
                fused, twin = gated_mixture(x, y, gate.weight, gate.bias), mixture(x, y, gate(x))
            assert fused.dtype == dtype
            apart = (fused - twin).abs().max().item()
            assert apart <= 32 * torch.finfo(dtype).eps * twin.abs().max().item(), (dtype, width)
"""


def test_the_kernel_is_its_twin() -> None:
    """By Triton's interpreter, which is asked for before Triton is imported."""
    pytest.importorskip("triton")
    interpreted = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", textwrap.dedent(TWINS)]
    done = subprocess.run(command, env=interpreted, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, ...]]]:
    """Has the mixer launch a kernel on a CPU as well: one that makes what the operators make."""
    seen: list[tuple[int, ...]] = []

    def kernel(x, y, weight, bias):
        seen.append(tuple(x.shape))
        gate = torch.sigmoid(2 * torch.nn.functional.linear(x, weight, bias))
        return torch.lerp(x, y, gate)

    monkeypatch.setattr(mixer, "fits", lambda state: True)
    monkeypatch.setattr(triton_, "_installed", lambda: True)
    monkeypatch.setattr(triton_, "_kernel", lambda *_: kernel)
    triton_._FAILED.clear()
    yield seen
    triton_._FAILED.clear()


def test_where_it_is_launched(launches: list[tuple[int, ...]]) -> None:
    """In inference, by all executors but the reference; not where gates are watched or learn."""
    host = HOSTS["llama"]
    model, inputs = attach_settled(host.build(), TrolMixer(scope="all")), host.inputs(batch=2)
    with torch.no_grad(), executor(model, "dense"):
        expected = model(**inputs).logits
    assert not launches
    with torch.no_grad():
        fused = model(**inputs).logits
        assert len(launches) == 4
        torch.testing.assert_close(fused, expected, atol=host.default_exact, rtol=0)
        launches.clear()
        with executor(model, kernel="operators"):
            model(**inputs)
        hook = model.model.layers[0].depth.register_forward_hook(lambda *_: None)
        model(**inputs)
        hook.remove()
        assert len(launches) == 3
    launches.clear()
    model(**inputs).logits.sum().backward()
    assert not launches


def test_one_that_fails_is_replaced_once_with_a_warning(
    launches: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_):
        raise RuntimeError("no compiler for this device")

    host = HOSTS["llama"]
    model, inputs = attach_settled(host.build(), TrolMixer(scope="all")), host.inputs(batch=2)
    monkeypatch.setattr(triton_, "_kernel", lambda *_: broken)
    with torch.no_grad():
        with pytest.warns(
            UserWarning, match=r"gated_mixture failed.*no compiler.*operators"
        ) as said:
            fused = model(**inputs).logits
        assert len(said) == 1
        with executor(model, "dense"):
            torch.testing.assert_close(fused, model(**inputs).logits, atol=1e-5, rtol=0)


def test_kernels_that_are_not_there_are_refused_by_name() -> None:
    model = attach(HOSTS["llama"].build(), TrolMixer())
    with (
        pytest.raises(HostError, match=r"no Triton kernel can run: it runs on CUDA devices.*cpu"),
        executor(model, kernel="triton"),
    ):
        pass
    with (
        pytest.raises(UsageError, match=r"unknown kernel 'tritn'. Did you mean 'triton'\?"),
        executor(model, kernel="tritn"),
    ):
        pass
