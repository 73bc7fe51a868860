"""One layer at a time: left out, visited twice, with and without the first token spared."""

import math
from collections.abc import Sequence
from functools import partial

import numpy as np

from trol.policies.mixer import TrolMixer
from trol.studies.study import Arm, Claim, Estimate, Evidence, Study, Table, resampled
from trol.studies.subject import Subject, leaving_out, planned, twice

FULL = "full"
KINDS = ("skip", "skip, first token spared", "second visit", "both visits")


def _arms(subject: Subject) -> list[Arm]:
    layers = subject.layers
    arms = [Arm(FULL, lambda _: subject.losses("plain"))]
    for layer in range(layers):
        policies = (
            planned(leaving_out(layer, layers)),
            planned(leaving_out(layer, layers), keep_first=1),
            planned(twice(layer, layers)),
        )
        for kind, policy in zip(KINDS, policies, strict=False):
            arms.append(Arm(f"{kind} {layer}", partial(_losses, subject, policy)))
        arms.append(Arm(f"{KINDS[-1]} {layer}", partial(_mean_of_both, subject, layer)))
    return arms


def _losses(subject: Subject, policy: object, _: object) -> list[float]:
    return subject.losses(policy)  # type: ignore[arg-type]


def _mean_of_both(subject: Subject, layer: int, _: object) -> list[float]:
    """out = (L(x) + L(L(x))) / 2 in one layer."""
    tau = [0.0 if one == layer else None for one in range(subject.layers)]
    mixer = TrolMixer(initial_gate=0.5, tau=tau, scope="all")
    return subject.losses_attached(mixer)


def _all(evidence: Evidence, kind: str, layers: Sequence[int] | None = None) -> np.ndarray:
    """Nats above the full model. Shape: [layers, windows]."""
    numbers = range(evidence.layers) if layers is None else layers
    return evidence.units(*(f"{kind} {layer}" for layer in numbers)) - evidence.units(FULL)


def _inner(evidence: Evidence) -> range:
    """All layers but the two first and the two last; none of a stack of four."""
    return range(2, evidence.layers - 2)


def _kinder(evidence: Evidence) -> Estimate:
    skip, second = (_all(evidence, kind) for kind in ("skip", "second visit"))

    def share(units: np.ndarray) -> float:
        return float((second[:, units].mean(1) < skip[:, units].mean(1)).mean())

    return resampled(share, skip.shape[1])


def _at_first_token(evidence: Evidence) -> Estimate:
    inner = _inner(evidence)
    if not inner:
        return Estimate(math.nan, math.nan, math.nan)
    skip, kept = (_all(evidence, kind, inner) for kind in KINDS[:2])

    def share(choose: np.ndarray, judge: np.ndarray) -> float:
        undone = (skip - kept)[:, 0::2][:, choose].mean(1)
        best = int(undone.argmax())
        harm, left = (part[best, 1::2][judge].mean() for part in (skip, kept))
        return float(1 - left / harm)

    units = skip.shape[1]
    return resampled(share, (units + 1) // 2, units // 2)


def _helps(evidence: Evidence) -> Estimate:
    both = _all(evidence, "both visits")

    def above_full(choose: np.ndarray, judge: np.ndarray) -> float:
        best = int(both[:, 0::2][:, choose].mean(1).argmin())
        return float(both[best, 1::2][judge].mean())

    units = both.shape[1]
    return resampled(above_full, (units + 1) // 2, units // 2)


def _tables(evidence: Evidence) -> list[Table]:
    rows = [
        [str(layer), *(f"{_all(evidence, kind, [layer]).mean():.3f}" for kind in KINDS)]
        for layer in range(evidence.layers)
    ]
    title = f"Nats per token above the full model's {evidence.mean(FULL):.3f}"
    return [Table(title, ["layer", *KINDS], rows)]


STUDY = Study(
    name="single-layers",
    hypothesis=(
        "In a pretrained decoder a layer that is visited twice harms less than one that is left "
        "out; the harm of some layers is done at the first token, where the attention sink is."
    ),
    design=(
        "Each layer alone is left out, or visited twice with the second visit's output, or twice "
        "with the mean of both outputs, by all tokens; all other layers are visited once. The loss "
        "of each window of text, in nats per token."
    ),
    controls=(
        "The full model on the same windows; the same with the first token of each window spared. "
        "Where a layer is picked, half of the windows pick and the others judge."
    ),
    amounts={"tiny": {"windows": 4, "window": 32}, "real": {"windows": 12, "window": 96}},
    arms=_arms,
    claims=(
        Claim(
            "Visiting a layer twice, for the second output alone, harms less than leaving it out",
            "first runs of trol",
            "share of the layers whose second visit costs less than their absence",
            "above",
            0.5,
            _kinder,
        ),
        Claim(
            "There is an inner layer most of whose harm, left out, is done at the first token",
            "Sun et al., arXiv 2402.17762 (massive activations), as trol reads it",
            "share of the harm that sparing the first token undoes, in the layer where it is most",
            "above",
            0.5,
            _at_first_token,
        ),
        Claim(
            "Repeating a layer never helps without training, even averaged with the first visit",
            "TroL's Table 7 (arXiv 2406.12246), layer by layer",
            "nats above the full model, both visits averaged in the layer where that costs least",
            "above",
            0.0,
            _helps,
        ),
    ),
    tables=_tables,
)
