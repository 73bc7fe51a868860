"""The limit: what the host itself takes for the layer visits that are really made.

    fixed(n)  = time of the host with no layer left (embedding, norm, head) for n tokens or rows
    layer(n)  = (host(n) - fixed(n)) / layers
    limit     = fixed(N) + sum over all visits of layer(how many tokens or rows make the visit)

All of it is measured in the same rounds as what is held against it, and taken round by round.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class HostTimes:
    """The bare host's milliseconds at one number of tokens or rows, round by round."""

    whole: list[float]
    """With all its layers."""
    fixed: list[float]
    """With none of them."""
    layers: int

    def layer(self) -> list[float]:
        """What one layer takes; nothing at least, whatever hiccup the round had."""
        pairs = zip(self.whole, self.fixed, strict=True)
        return [max(whole - fixed, 0.0) / self.layers for whole, fixed in pairs]


def limit_of(times: Mapping[int, HostTimes], at: int, visits: Mapping[int, float]) -> list[float]:
    """The limit, round by round.

    Args:
        times: number of tokens or rows -> the host's times there.
        at: the number at which the fixed part is paid.
        visits: number of tokens or rows -> how many layer visits so many of them make.
    """
    limits = list(times[at].fixed)
    for number, count in visits.items():
        if number and count:
            layer = times[number].layer()
            limits = [limit + count * one for limit, one in zip(limits, layer, strict=True)]
    return limits


def scaled(times: list[float], by: float) -> list[float]:
    """`by` times each."""
    return [by * one for one in times]
