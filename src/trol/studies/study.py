"""What a study is: arms that are measured, and claims that an interval of a statistic decides.

A study is a short file. Its arms are measured one by one and kept; all else (claims, tables) is
worked out from what they gave, without a model.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from trol.studies.subject import Subject

Size = Literal["tiny", "real"]
"""How much is measured: on a random or a very small model, or for real."""

RESAMPLES = 2000
"""How often the units of a statistic are drawn anew for its interval."""

RULE = (
    "Reproduced: the whole 95 % interval of the statistic lies on the claim's side of its bound. "
    "Refuted: the whole interval lies on the other side. Otherwise: not decided at this size."
)


@dataclass(frozen=True)
class Estimate:
    """A statistic with its 95 % interval; NaN where no unit has it."""

    value: float
    low: float
    high: float


def resampled(statistic: Callable[..., float], *sizes: int) -> Estimate:
    """A statistic of all units, and where it lies in 95 % of resamples of them (bootstrap).

    Args:
        statistic: takes, for each kind of unit, which units are drawn: an array of their numbers.
        sizes: how many units of each kind there are; all of a kind are drawn together, so that
            what was measured on the same unit stays paired.
    """
    generator = np.random.default_rng(0)
    value = float(statistic(*map(np.arange, sizes)))
    if np.isnan(value):
        return Estimate(value, value, value)
    drawn = [
        statistic(*(generator.integers(size, size=size) for size in sizes))
        for _ in range(RESAMPLES)
    ]
    low, high = np.nanquantile(drawn, [0.025, 0.975])
    return Estimate(value, float(low), float(high))


@dataclass(frozen=True)
class Evidence:
    """What was measured, and at what size."""

    values: Mapping[str, Any]
    """Arm -> what it gave, as JSON."""
    layers: int
    """Layers of the model."""
    seeds: int
    amounts: Mapping[str, Any]
    """What the size says, by name."""

    def units(self, *arms: str) -> NDArray[np.float64]:
        """Arms that gave one number for each unit. Shape: [arms, units]."""
        return np.array([self.values[arm] for arm in arms], dtype=float)

    def mean(self, arm: str) -> float:
        """The mean of an arm's units."""
        return float(self.units(arm).mean())

    def difference(self, more: Sequence[str] | str, less: Sequence[str] | str) -> Estimate:
        """Mean of some arms above that of others, on the same units.

        Several arms are those of the seeds, which are drawn anew as the units are.
        """
        groups = [[one] if isinstance(one, str) else list(one) for one in (more, less)]
        above, below = (self.units(*group) for group in groups)

        def statistic(units: Any, seeds: Any) -> float:
            means = (
                part[:, units][seeds if len(part) > 1 else [0]].mean() for part in (above, below)
            )
            return float(next(means) - next(means))

        return resampled(statistic, above.shape[1], max(len(above), len(below)))


def of_seed(name: str, seed: int) -> str:
    """The name of an arm of a seed."""
    return f"{name}, seed {seed}"


def of_seeds(name: str, evidence: Evidence) -> list[str]:
    """The arms of that name, seed by seed."""
    return [of_seed(name, seed) for seed in range(evidence.seeds)]


@dataclass(frozen=True)
class Claim:
    """A sentence that somebody has said, and the statistic that decides it."""

    text: str
    source: str
    """Who says it, and where."""
    statistic: str
    """What is estimated, and its unit."""
    side: Literal["above", "below"]
    """Where the statistic lies if the claim is right: above `bound`, or below."""
    bound: float
    estimate: Callable[[Evidence], Estimate]

    def verdict(self, estimate: Estimate) -> str:
        """What the interval says of the claim, by `RULE`."""
        if estimate.low > self.bound:
            return "reproduced" if self.side == "above" else "refuted"
        if estimate.high < self.bound:
            return "refuted" if self.side == "above" else "reproduced"
        return "not decided at this size"

    def json(self, evidence: Evidence) -> dict[str, Any]:
        """The claim with its estimate and verdict."""
        estimate = self.estimate(evidence)
        known = not np.isnan(estimate.value)
        return {
            "claim": self.text,
            "source": self.source,
            "statistic": self.statistic,
            "side": self.side,
            "bound": self.bound,
            "value": estimate.value if known else None,
            "low": estimate.low if known else None,
            "high": estimate.high if known else None,
            "verdict": self.verdict(estimate),
        }


@dataclass(frozen=True)
class Arm:
    """One measurement."""

    name: str
    measure: Callable[[Mapping[str, Any]], Any]
    """Takes the values of the arms that it needs; returns JSON."""
    needs: tuple[str, ...] = ()
    """Arms that are measured before it."""


@dataclass(frozen=True)
class Table:
    """A table of the figures behind the claims."""

    title: str
    heading: list[str]
    rows: list[list[str]]


@dataclass(frozen=True)
class Study:
    """A question about depth, and how it is answered."""

    name: str
    hypothesis: str
    design: str
    controls: str
    amounts: Mapping[Size, Mapping[str, Any]]
    """Size -> how much is measured, by name."""
    arms: Callable[["Subject"], Sequence[Arm]]
    claims: tuple[Claim, ...]
    tables: Callable[[Evidence], Sequence[Table]]
    pretrained: bool = True
    """Whether it needs a pretrained model; the arms of others make small ones of their own, and
    take a named model in their place."""
