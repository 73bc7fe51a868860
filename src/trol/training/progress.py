"""Progress of a stage of training: its figures behind the bar."""

from typing import Any

from transformers import TrainerCallback

from trol.progress import Shown

GATE = "gate/"
"""Prefix of the logged names of gates, before the layer's number."""

HEIGHTS = "▁▂▃▄▅▆▇█"
"""A gate's mean as a character, 0 to 1."""

AS_NUMBERS = 8
"""Layers, at most, whose gates are shown as numbers."""


class Progress(Shown, TrainerCallback):
    """Shows loss, learning rate, tokens per second, gates and time left of a stage on stderr."""

    def __init__(self, name: str) -> None:
        super().__init__(name, "step")

    def on_train_begin(self, _: Any, state: Any, *__: Any, **___: Any) -> None:
        """Shows where a stage begins, or goes on."""
        self(state.global_step, state.max_steps)

    def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
        """Takes over the newest figures."""
        if "loss" in logs:
            self.figures = _figures(logs)

    def on_step_end(self, _: Any, state: Any, *__: Any, **___: Any) -> None:
        """Moves the bar, or prints a line when the last one is old."""
        self(state.global_step, state.max_steps)

    def on_train_end(self, *_: Any, **__: Any) -> None:
        """Closes the bar with what it shows, or prints the last line."""
        self.close(last=True)


def _figures(logs: dict[str, float]) -> str:
    """`loss 1.234, lr 1.0e-03, 5200 tokens/s, gates 0.48 0.51`."""
    parts = [f"loss {logs['loss']:.3f}", f"lr {logs['learning_rate']:.1e}"]
    if "tokens_per_second" in logs:
        parts.append(f"{logs['tokens_per_second']:.0f} tokens/s")
    gates = [value for key, value in logs.items() if key.startswith(GATE)]
    if len(gates) > AS_NUMBERS:
        tops = [min(int(gate * len(HEIGHTS)), len(HEIGHTS) - 1) for gate in gates]
        parts.append("gates " + "".join(HEIGHTS[top] for top in tops))
    elif gates:
        parts.append("gates " + " ".join(f"{gate:.2f}" for gate in gates))
    return ", ".join(parts)
