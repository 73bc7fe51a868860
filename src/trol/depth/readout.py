"""Reading a state where it stands: the host's final norm and head on the output of any layer."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from trol.host.head import behind_the_stack, finished, head_of
from trol.host.layers import find_decoder


class Readout:
    """logits(x) = head(norm(x)), scaled and capped as the host does behind its last layer.

    Args:
        host: the model that owns the head; its decoder owns the final norm.

    Raises:
        HostError: when it is called on a host that has no head or no norm under a known name.
    """

    def __init__(self, host: Any) -> None:
        self.host = host

    def __call__(self, state: Tensor) -> Tensor:
        """The logits of states that leave the stack here. Shape: [..., D] -> [..., V]."""
        stack: Any = find_decoder(self.host)
        return finished(self.head(behind_the_stack(stack, state)), stack.config)

    @property
    def head(self) -> nn.Module:
        """The linear map to the vocabulary."""
        return head_of(self.host)

    @property
    def flops(self) -> int:
        """FLOPs of reading one token."""
        return 2 * self.head.weight.numel()  # type: ignore[union-attr,operator]
