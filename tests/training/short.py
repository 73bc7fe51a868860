"""The demo's recipe with a few steps a stage, for tests of the machinery around them."""

from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

STAGES = ("vision", "reason", "step1", "step2")
STEPS = {"vision": 4, "reason": 9, "step1": 5, "step2": 6}
SHORT = [
    "preset.hidden_size=32",
    *(f"stages.{name}.steps={steps}" for name, steps in STEPS.items()),
    *(f"stages.{name}.batch=4" for name in STAGES),
    "stages.reason.boards=12",  # three epochs of three steps
    "stages.step2.lora=2",
]
"""The second stage sees its boards several times, the last one learns by low-rank updates."""


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")
