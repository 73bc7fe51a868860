"""Plans that are known without looking at a model: which share of the layers is kept, and where.

Every method keeps the same number of layers for the same share, so that plans of one share cost
the same and differ only in which layers they skip.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable

from trol.depth import Plan
from trol.errors import UsageError, unknown


def kept_count(layers: int, keep: float) -> int:
    """How many of `layers` layers a share keeps: max(1, round(keep * layers)).

    Raises:
        UsageError: `keep` is outside (0, 1], or there is no layer.
    """
    if layers < 1:
        raise UsageError(f"a stack of {layers} layers has no plan; give at least one layer.")
    if not 0 < keep <= 1:  # NaN as well
        raise UsageError(
            f"keep is {keep}, but is the share of the layers that stay; give a number above 0 and "
            "at most 1, such as 0.5."
        )
    return max(1, round(keep * layers))


def plan_of(kept: Iterable[int], layers: int) -> Plan:
    """The plan that visits the layers `kept` once and skips the others of `layers` layers."""
    stays = frozenset(kept)
    return Plan([int(layer in stays) for layer in range(layers)])


def uniform(layers: int, kept: int, seed: int) -> list[int]:
    """Evenly spaced layers, the first and the last among them.

    Layer i of the k that stay is round(i (L - 1) / (k - 1)); one alone is the first. Unified Layer
    Skipping (https://arxiv.org/abs/2404.06954, section 3).
    """
    del seed
    if kept == 1:
        return [0]
    steps = kept - 1
    return [(2 * i * (layers - 1) + steps) // (2 * steps) for i in range(kept)]


def at_random(layers: int, kept: int, seed: int) -> list[int]:
    """The first and the last layer, and layers between them in a seed's order.

    The paper's random routes (https://arxiv.org/abs/2410.20022) change with every forward pass;
    a plan stays for the whole sequence. As with its controllers, the first and the last layer
    always run. With one seed, the layers of a smaller share are among those of a larger one.
    """
    between = list(range(1, layers - 1))
    random.Random(f"plan/{layers}/{seed}").shuffle(between)
    return sorted([0, layers - 1, *between][:kept] if layers > 1 else [0])


def early_exit(layers: int, kept: int, seed: int) -> list[int]:
    """The first layers: the last ones are off, which is an exit before layer `kept`."""
    del layers, seed
    return list(range(kept))


def middle(layers: int, kept: int, seed: int) -> list[int]:
    """All layers but one block in the middle; the front keeps one more where the rest is odd."""
    del seed
    front = (kept + 1) // 2
    return [*range(front), *range(layers - (kept - front), layers)]


STATIC: dict[str, Callable[[int, int, int], list[int]]] = {
    "uniform": uniform,
    "random": at_random,
    "exit": early_exit,
    "middle": middle,
}
"""Method -> (layers, how many stay, seed) -> the layers that stay, in order."""


def static_plan(method: str, layers: int, keep: float, seed: int = 0) -> Plan:
    """The plan by which a stack of `layers` layers keeps max(1, round(keep * layers)) of them.

    `seed` is read by `random` alone.

    Raises:
        UsageError: the method is unknown, or `keep` is outside (0, 1].
    """
    if method not in STATIC:
        raise unknown("method", method, STATIC)
    return plan_of(STATIC[method](layers, kept_count(layers, keep), seed), layers)
