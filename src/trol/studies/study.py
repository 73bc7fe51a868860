"""What a study is: arms that are measured, and claims that an interval of a statistic decides.

A study is a short file. Its arms are measured one by one and kept; all else (claims, tables) is
worked out from what they gave, without a model.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit

from trol.errors import unknown

if TYPE_CHECKING:
    from trol.studies.subject import Subject

Side = Literal["above", "below"]

Size = Literal["tiny", "real"]
"""How much is measured: on a random or a very small model, or for real."""

RESAMPLES = 2000
"""How often the units of a statistic are drawn anew for its interval."""

RULE = (
    "Reproduced: the whole 95 % interval of the statistic lies on the claim's side of its bound. "
    "Refuted: the whole interval lies on the other side. Otherwise: not decided at this size; not "
    "measured where the model has nothing that the claim compares."
)


@dataclass(frozen=True)
class Estimate:
    """A statistic with its 95 % interval; NaN where there is nothing to compare."""

    value: float
    low: float
    high: float


NOTHING = Estimate(math.nan, math.nan, math.nan)
"""What there is to say where a model has nothing that a claim compares."""


def resampled(statistic: Callable[..., float], *sizes: int) -> Estimate:
    """A statistic of all units with its 95 % interval, from resamples of them (bootstrap).

        value +- t sqrt(n / (n - 1)) s

    s is the standard deviation of the statistic over resamples, n how many units there are of the
    rarest kind of which there are several, t the 97.5 % quantile of Student's t with n - 1 degrees
    of freedom. The mean of one kind of unit has the textbook's interval; plain percentiles of
    resamples would hold the mean of five seeds in 84 of 100 cases.

    Args:
        statistic: takes, for each kind of unit, which units are drawn: an array of their numbers.
        sizes: how many units of each kind there are; all of a kind are drawn together, so that
            what was measured on the same unit stays paired.
    """
    generator = np.random.default_rng(0)
    value = float(statistic(*map(np.arange, sizes)))
    if np.isnan(value):
        return NOTHING
    drawn = [
        statistic(*(generator.integers(size, size=size) for size in sizes))
        for _ in range(RESAMPLES)
    ]
    fewest = min((size for size in sizes if size > 1), default=2)
    margin = stdtrit(fewest - 1, 0.975) * math.sqrt(fewest / (fewest - 1)) * np.nanstd(drawn)
    return Estimate(value, float(value - margin), float(value + margin))


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
        """Arms that gave one number for each unit. Shape: [arms, units].

        Raises:
            UsageError: a claim or a table names an arm that the study has not.
        """
        for arm in arms:
            if arm not in self.values:
                raise unknown("arm", arm, self.values)
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
    side: Side
    """Where the statistic lies if the claim is right: above `bound`, or below."""
    bound: float
    estimate: Callable[[Evidence], Estimate]

    def __post_init__(self) -> None:
        if self.side not in get_args(Side):
            raise unknown("side of a claim", self.side, get_args(Side))

    def verdict(self, estimate: Estimate) -> str:
        """What the interval says of the claim, by `RULE`."""
        if np.isnan(estimate.value):
            return "not measured"
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
