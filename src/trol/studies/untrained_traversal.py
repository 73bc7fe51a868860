"""All layers traversed with gates that nobody trained, and half steps in the place of visits."""

import copy
from dataclasses import KW_ONLY, dataclass
from functools import partial
from itertools import chain
from typing import Any

from trol.depth import AbstractPolicy, Answer, Bounds, Plan, Scope, Visit, depth
from trol.evaluation.answers import losses
from trol.host.layers import find_decoder, layer_list
from trol.policies.base import DataclassPolicy
from trol.policies.mixer import TrolMixer
from trol.studies.study import Arm, Claim, Evidence, Study, Table
from trol.studies.subject import Subject, planned, rounded

FULL, TWICE, INITIAL = "full", "gates 1", "own initialisation, seed {}"
GATES = (0.01, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7)
NAIVE, HALVED = "block of {} twice", "block of {} in two half steps"


@dataclass(eq=False, repr=False)
class HalfSteps(DataclassPolicy):
    """a_0 = 1/2 on some layers: out = x + (L(x) - x) / 2; all others are visited once."""

    name = "half_steps"

    layers: tuple[int, ...]
    _: KW_ONLY
    scope: Scope = "all"

    def bounds(self, layer: int) -> Bounds:
        return Bounds(0, 1) if layer in self.layers else Bounds(1, 1)

    def again(self, visit: Visit) -> Answer:
        return 0.5 if visit.number == 0 and visit.layer in self.layers else float(not visit.number)


def doubled(model: Any, block: range) -> tuple[Any, AbstractPolicy]:
    """A host with the layers of a block twice in its list, and half steps on all of these.

    A second visit begins at the first one's output, so x + (L(x) - x) / 2 twice is no policy of the
    host itself. On this host, which shares all weights, it is: L stands there twice. It cannot
    keep a cache, since both would write to the same place.
    """
    weights = {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())}
    other = copy.deepcopy(model, dict(weights))
    layers, config = layer_list(find_decoder(other)), other.config.get_text_config()
    assert layers is not None  # or find_decoder had raised
    order = [number for number in range(len(layers)) for _ in range(1 + (number in block))]
    stack = [copy.deepcopy(layers[number], dict(weights)) for number in order]
    del layers[:]
    layers.extend(stack)
    config.num_hidden_layers = len(stack)
    if kinds := getattr(config, "layer_types", None):
        config.layer_types = [kinds[number] for number in order]
    return other, HalfSteps(tuple(at for at, number in enumerate(order) if number in block))


def _halved(subject: Subject, block: range, _: object) -> list[float]:
    model, policy = doubled(subject.model, block)
    with depth(model, policy):
        return rounded(losses(model, subject.processor, subject.windows()))


def blocks(layers: int) -> dict[str, range]:
    """Blocks of about an eighth of the layers, by where they lie; and all layers."""
    size = max(1, round(layers / 8))
    begins = {"low": layers // 8, "middle": int(0.4 * layers), "high": int(0.65 * layers)}
    named = {f"{name} layers": range(at, at + size) for name, at in begins.items()}
    return {**named, "all layers": range(layers)}


def _arms(subject: Subject) -> list[Arm]:
    layers = subject.layers
    arms = [Arm(FULL, lambda _: subject.losses("plain"))]
    for gate in GATES:
        mixer = TrolMixer(initial_gate=gate, scope="all")
        arms.append(Arm(f"gates {gate}", partial(_attached, subject, mixer, 0)))
    arms.append(Arm(TWICE, lambda _: subject.losses(planned(Plan([2] * layers)))))
    for seed in range(subject.seeds):
        published = TrolMixer(initial_gate=None, scope="all")
        arm = partial(_attached, subject, published, seed)
        arms.append(Arm(INITIAL.format(seed), arm))
    for name, block in blocks(layers).items():
        plan = planned(Plan([1 + (layer in block) for layer in range(layers)]))
        if len(block) < layers:  # all layers twice is there already
            arms.append(Arm(NAIVE.format(name), partial(_planned, subject, plan)))
        arms.append(Arm(HALVED.format(name), partial(_halved, subject, block)))
    return arms


def _attached(subject: Subject, mixer: TrolMixer, seed: int, _: object) -> list[float]:
    return subject.losses_attached(mixer, seed)


def _planned(subject: Subject, policy: AbstractPolicy, _: object) -> list[float]:
    return subject.losses(policy)


def _initial(evidence: Evidence) -> list[str]:
    return [INITIAL.format(seed) for seed in range(evidence.seeds)]


def _tables(evidence: Evidence) -> list[Table]:
    rows = []
    for arm in evidence.values:
        change = evidence.difference(arm, FULL)
        interval = f"{change.value:+.3f} [{change.low:+.3f}, {change.high:+.3f}]"
        rows.append([arm, f"{evidence.mean(arm):.3f}", interval])
    return [Table("Nats per token", ["arm", "loss", "above the full model"], rows)]


STUDY = Study(
    name="untrained-traversal",
    hypothesis="A second visit that nobody trained harms, the more the larger its weight is.",
    design=(
        "All layers are traversed by all tokens, out = (1 - g) L(x) + g L(L(x)), with one constant "
        "g everywhere, and with gates as nn.Linear initialises them. Blocks of an eighth of the "
        "layers are repeated layer by layer, as they are and in two half steps, x + (L(x) - x) / 2 "
        "twice. The loss of each window of text, in nats per token."
    ),
    controls="The full model on the same windows; several seeds of the initialisation.",
    amounts={"tiny": {"windows": 4, "window": 32}, "real": {"windows": 10, "window": 128}},
    arms=_arms,
    claims=(
        Claim(
            "Traversal without training, gates as TroL begins them, harms a pretrained model",
            "TroL's Table 7 (arXiv 2406.12246)",
            "nats above the full model with gates as initialised",
            "above",
            0.0,
            lambda evidence: evidence.difference(_initial(evidence), FULL),
        ),
        Claim(
            "TroL's own initialisation harms more than a constant gate of .5",
            "first runs of trol",
            "nats above those of constant gates of .5",
            "above",
            0.0,
            lambda evidence: evidence.difference(_initial(evidence), "gates 0.5"),
        ),
        Claim(
            "Gates of .01 change next to nothing",
            "trol's default for attaching",
            "nats above the full model",
            "below",
            0.02,
            lambda evidence: evidence.difference("gates 0.01", FULL),
        ),
        Claim(
            "Repeating the middle layers in two half steps costs next to nothing",
            "arXiv 2605.23872 (damped repetition), layer by layer",
            "nats above the full model",
            "below",
            0.02,
            lambda evidence: evidence.difference(HALVED.format("middle layers"), FULL),
        ),
        Claim(
            "Two half steps of the middle layers lower the loss without training",
            "arXiv 2605.23872 (damped repetition), layer by layer",
            "nats above the full model",
            "below",
            0.0,
            lambda evidence: evidence.difference(HALVED.format("middle layers"), FULL),
        ),
    ),
    tables=_tables,
)
