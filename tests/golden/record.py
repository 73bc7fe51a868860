"""What a model does while it runs, layer by layer: outputs of each visit, gates, and counts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from trol.depth import attached
from trol.depth.visits import LayerRun
from trol.host.layers import layer_list


class Record:
    """L layers; of each call the tensors [B, T, D] of the latest one, and counts over all calls."""

    def __init__(self, layers: int) -> None:
        self.inputs: Tensor | None = None
        """What enters the first layer."""
        self.final: Tensor | None = None
        """What leaves the final norm."""
        self.visits: list[dict[int, Tensor]] = [{} for _ in range(layers)]
        """By visit number: what that visit gave."""
        self.mixed: list[Tensor] = [torch.empty(0)] * layers
        self.gates: list[Tensor] = [torch.empty(0)] * layers
        self.gate_calls = 0
        self.layer_calls = [0] * layers

    def tensors(self, logits: Tensor, cache: Any) -> dict[str, Tensor]:
        """By the names that golden sets use. Shapes: [B, T, ...] or [L, B, ...]."""
        assert self.inputs is not None
        assert self.final is not None
        mixed = torch.stack(self.mixed)
        held = {
            "logits": logits,
            "inputs_embeds": self.inputs,
            "mixed": mixed,
            "mixed_last_layer_only": mixed[-1],
            "final_norm": self.final,
            # A layer that visits once goes past the visit loop: its output is its first pass.
            "pass1": torch.stack(
                [v.get(1, m) for v, m in zip(self.visits, self.mixed, strict=True)]
            ),
            "cache_k": torch.stack([slot.keys for slot in cache.layers]),
            "cache_v": torch.stack([slot.values for slot in cache.layers]),
        }
        if all(2 in visits for visits in self.visits):
            held["pass2"] = torch.stack([visits[2] for visits in self.visits])
        if self.gate_calls:
            held["gate"] = torch.stack(self.gates)
        return {name: tensor.detach() for name, tensor in held.items()}


@contextmanager
def recording(model: nn.Module) -> Iterator[Record]:
    """Records what the layers of an attached model do inside the block."""
    _, stack = attached(model)
    layers = layer_list(stack)
    assert layers is not None
    record, running = Record(len(layers)), [0]
    handles = [stack.norm.register_forward_hook(_noting(record))]
    for number, layer in enumerate(layers):
        handles += _hooks(record, running, number, layer)
    original = LayerRun.apply

    def apply(run: LayerRun, state: Tensor, plane: int, *given: Any, **named: Any) -> Tensor:
        out = original(run, state, plane, *given, **named)
        record.visits[running[0]][plane] = out
        return out

    try:
        with patch.object(LayerRun, "apply", apply):
            yield record
    finally:
        for handle in handles:
            handle.remove()


def _noting(record: Record) -> Any:
    def note(_module: nn.Module, _args: Any, out: Tensor) -> None:
        record.final = out

    return note


def _hooks(record: Record, running: list[int], number: int, layer: Any) -> list[Any]:
    def enter(_module: nn.Module, args: tuple[Any, ...]) -> None:
        running[0] = number
        record.visits[number] = {}
        if number == 0:
            record.inputs = args[0]

    def leave(_module: nn.Module, _args: Any, out: Any) -> None:
        record.mixed[number] = out[0] if isinstance(out, tuple) else out

    def count(_module: nn.Module, _args: Any, _out: Any) -> None:
        record.layer_calls[number] += 1

    def gate(_module: nn.Module, _args: Any, out: Tensor) -> None:
        record.gate_calls += 1
        record.gates[number] = out

    handles = [
        layer.register_forward_pre_hook(enter),
        layer.register_forward_hook(leave),
        layer.self_attn.register_forward_hook(count),  # not reached where a visit is broken off
    ]
    if hasattr(layer, "depth"):
        handles.append(layer.depth.register_forward_hook(gate))
    return handles
