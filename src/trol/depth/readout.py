"""Reading a state where it stands: the host's final norm and head on the output of any layer."""

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from trol.axes import Logits, States
from trol.host.layers import final_norm, find_decoder, head_of, scaled_logits

LOGITS_AT_ONCE = 2**24
"""Logits that are in memory at once: 64 MiB in float32. One token's logits always are."""


class Readout:
    """logits(x) = head(norm(x)), scaled and capped as the host does behind its last layer.

    Args:
        host: the model that owns the head; its decoder owns the final norm.

    Raises:
        HostError: when it is called on a host that has no head or no norm under a known name.
    """

    def __init__(self, host: Any) -> None:
        self.host = host

    def __call__(self, state: States) -> Logits:
        """The logits of states that leave the stack here. Shape: [..., D] -> [..., V]."""
        stack: Any = find_decoder(self.host)
        return scaled_logits(self.head(final_norm(stack, state)), stack.config)

    def behind_norm(self, state: States) -> States:
        """The logits of what the head is about to read: `unread` kept it. [..., D] -> [..., V]."""
        return scaled_logits(self.head(state), find_decoder(self.host).config)

    @contextmanager
    def unread(self) -> Generator[list[Tensor]]:
        """While open, the host's head reads the first position alone, and all are kept: [B, T, D].

        For one pass whose logits [B, T, V] are not wanted as a whole: those it gives are of the
        first position. The list holds a tensor for each time that the head is called when the
        stack has been left; what policies read before is left alone.
        """
        kept: list[Tensor] = []
        left: list[bool] = []

        def first_alone(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
            if not left:  # a policy is reading, between two layers
                return None
            kept.append(args[0])
            return (args[0][:, :1], *args[1:])

        def leaves(*_: Any) -> None:
            left.append(True)

        hooks = (
            find_decoder(self.host).register_forward_hook(leaves),
            self.head.register_forward_pre_hook(first_alone),
        )
        try:
            yield kept
        finally:
            for hook in hooks:
                hook.remove()

    @property
    def at_once(self) -> int:
        """The most tokens whose logits are to be in memory at once."""
        stack: Any = find_decoder(self.host)
        return max(1, LOGITS_AT_ONCE // stack.config.vocab_size)

    @property
    def head(self) -> nn.Module:
        """The linear map to the vocabulary."""
        return head_of(self.host)

    @property
    def flops(self) -> int:
        """FLOPs of reading one token."""
        return 2 * self.head.weight.numel()  # type: ignore[union-attr,operator]
