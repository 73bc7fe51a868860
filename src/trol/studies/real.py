"""Does a trained second visit help a frozen pretrained decoder? Gates beside low-rank updates."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from trol.depth import depth
from trol.host.flops import matrix_flops
from trol.host.layers import find_decoder, layer_list
from trol.studies.study import Arm, Claim, Estimate, Evidence, Study, Table
from trol.studies.subject import Subject
from trol.studies.tuned import PLAIN, held_out, tuned, untuned
from trol.studies.untrained_traversal import blocks, doubled
from trol.training.adapters import linear_maps

SIZES = "sizes"
"""The arm that counts, for each other one that learns: parameters, steps, and FLOPs."""

BEFORE = "before"
HALVED = "middle layers in two half steps"
GATES = "gates"
AS_MANY = "LoRA of as many parameters"
LORA = "LoRA"
BOTH = "gates and LoRA"
AS_LONG = "LoRA, as much compute"
MIDDLE = "middle gates and LoRA"
AS_LONG_AS_MIDDLE = "LoRA, as much compute as with middle gates"

RANK = 8
"""Of the updates of all maps."""


@dataclass(frozen=True)
class _Way:
    """What learns in an arm, and for how much of the compute of another."""

    visits: str = ""
    """The layers that are visited twice, as `_twice` calls them; none if empty."""
    rank: int = 0
    few: bool = False
    """Whether updates are as few parameters as the gates of all layers."""
    equals: str = ""
    """Layers whose second visits' compute is spent on further steps instead."""


WAYS = {
    GATES: _Way("all layers"),
    AS_MANY: _Way(rank=1, few=True),
    LORA: _Way(rank=RANK),
    BOTH: _Way("all layers", RANK),
    AS_LONG: _Way(rank=RANK, equals="all layers"),
    MIDDLE: _Way("middle layers", RANK),
    AS_LONG_AS_MIDDLE: _Way(rank=RANK, equals="middle layers"),
}


def _twice(subject: Subject, which: str) -> range:
    return blocks(subject.layers)[which] if which else range(0)


def _width(subject: Subject) -> int:
    return subject.model.config.get_text_config().hidden_size


def _of_rank_one(subject: Subject) -> dict[str, int]:
    """The parameters of an update of rank 1 of each linear map."""
    maps: dict[str, Any] = linear_maps(subject.model)
    return {name: sum(one.weight.shape) for name, one in maps.items()}


def _few_maps(subject: Subject) -> dict[str, int]:
    """Maps, and parameters of an update of rank 1 on each, which are about as many as the gates'.

    They are the smallest map of a layer (one such: values), in evenly spaced layers.
    """
    sizes = _of_rank_one(subject)
    kinds = {name.partition(".")[2]: size for name, size in sizes.items()}
    kind = min(kinds, key=lambda name: (kinds[name], name.rpartition(".")[2] != "v_proj", name))
    count = min(subject.layers, round(subject.layers * (_width(subject) + 1) / kinds[kind]))
    chosen = (int((number + 0.5) * subject.layers / count) for number in range(count))
    return {name: kinds[kind] for number in chosen if (name := f"{number}.{kind}") in sizes}


def _compute(subject: Subject, twice: range) -> float:
    """FLOPs of reading a token with these layers visited twice, by those of the plain model."""
    layers: Any = layer_list(find_decoder(subject.model))
    costs = [matrix_flops(layer) for layer in layers]
    once = sum(costs) + matrix_flops(subject.model.get_output_embeddings())
    return 1 + sum(costs[layer] for layer in twice) / once


def _steps(subject: Subject, way: _Way) -> int:
    return round(subject.amounts["steps"] * _compute(subject, _twice(subject, way.equals)))


def _sizes(subject: Subject, _: object) -> dict[str, dict[str, float]]:
    sizes = {}
    for name, way in WAYS.items():
        twice = _twice(subject, way.visits)
        maps = _few_maps(subject) if way.few else _of_rank_one(subject)
        sizes[name] = {
            "parameters": len(twice) * (_width(subject) + 1) + way.rank * sum(maps.values()),
            "steps": _steps(subject, way),
            "compute": round(_steps(subject, way) * _compute(subject, twice), 1),
        }
    return sizes


def _learns(subject: Subject, way: _Way) -> tuple[dict[str, Any], dict[str, Any]]:
    """Policy and stage of an arm."""
    policy: dict[str, Any] = PLAIN
    stage: dict[str, Any] = {"train": (), "steps": _steps(subject, way)}
    if way.visits:
        twice = _twice(subject, way.visits)
        tau = [0.0 if layer in twice else None for layer in range(subject.layers)]
        policy = {"policy": "trol_mixer", "scope": "all", "keep_first": 1, "tau": tau}
        stage["train"] += ("mixers",)
        rate = "gate_rate_with_lora" if way.rank else "gate_rate"
        stage["mixer_learning_rate"] = subject.amounts[rate]
    if way.rank:
        stage["train"] += ("decoder",)
        stage |= {"lora": way.rank, "learning_rate": subject.amounts["rate"]}
    if way.few:
        few = {"lora_targets": tuple(_few_maps(subject))}
        stage |= {**few, "learning_rate": subject.amounts["few_rate"]}
    return policy, stage


def _trained(subject: Subject, name: str, seed: int, _: object) -> list[float]:
    policy, stage = _learns(subject, WAYS[name])
    return tuned(subject, name, policy, seed=seed, **stage)


def _before(subject: Subject, _: object) -> list[float]:
    return held_out(subject, untuned(subject), subject.processor)


def _halved(subject: Subject, _: object) -> list[float]:
    model, policy = doubled(untuned(subject), _twice(subject, "middle layers"))
    with depth(model, policy):
        return held_out(subject, model, subject.processor)


def _arms(subject: Subject) -> list[Arm]:
    arms = [
        Arm(SIZES, partial(_sizes, subject)),
        Arm(BEFORE, partial(_before, subject)),
        Arm(HALVED, partial(_halved, subject)),
    ]
    for seed in range(subject.seeds):
        arms += [Arm(_name(way, seed), partial(_trained, subject, way, seed)) for way in WAYS]
    return arms


def _name(way: str, seed: int) -> str:
    return f"{way}, seed {seed}"


def _of(way: str, evidence: Evidence) -> list[str] | str:
    """The arms of a way: one for each seed, if it learns."""
    return [_name(way, seed) for seed in range(evidence.seeds)] if way in WAYS else way


def _above(more: str, less: str) -> Callable[[Evidence], Estimate]:
    return lambda evidence: evidence.difference(_of(more, evidence), _of(less, evidence))


def _tables(evidence: Evidence) -> list[Table]:
    rows = []
    sizes: Mapping[str, Any] = evidence.values[SIZES]
    for way in (BEFORE, HALVED, *WAYS):
        arms = _of(way, evidence)
        loss = evidence.units(*([arms] if isinstance(arms, str) else arms)).mean()
        change = evidence.difference(arms, BEFORE)
        interval = f"{change.value:+.3f} [{change.low:+.3f}, {change.high:+.3f}]"
        counts = sizes.get(way, {"parameters": 0, "steps": 0, "compute": 0})
        cells = [f"{counts[name]:,}" for name in ("parameters", "steps", "compute")]
        rows.append([way, *cells, f"{loss:.3f}", "" if way == BEFORE else interval])
    heading = ["", "parameters", "steps", "compute, in plain steps", "loss", "change"]
    return [Table("Nats per token of answers that were not learnt from", heading, rows)]


def _lower(text: str, source: str, more: str, less: str) -> Claim:
    """The claim that one arm's loss is lower than another's."""
    return Claim(text, source, f"nats, {more}, above {less}", "below", 0.0, _above(more, less))


TROL = "TroL, arXiv 2406.12246"
WORTH = "what would make second visits worth their time"

STUDY = Study(
    name="real",
    hypothesis="A frozen pretrained decoder gains from second visits once these are trained.",
    design=(
        "Gates of all layers, begun at .01, learn on questions about Python's library while the "
        "decoder is frozen: alone, and with LoRA of rank 8 on all linear maps. The same with gates "
        "in an eighth of the layers, in the middle, where a second visit costs a pretrained model "
        "least. All tokens are traversed but the first, whose state is so large that one step "
        "would open or shut its gates. One arm is not trained: these middle layers in two half "
        "steps, x + (L(x) - x) / 2 twice. Nats per token of answers that were not learnt from."
    ),
    controls=(
        "The model as it was. LoRA of rank 1 on the smallest map of evenly spaced layers: about as "
        "many parameters as the gates (17,664 and 17,310 on SmolLM2-135M). LoRA of rank 8 for as "
        "many steps (its gates are .7 % more parameters there), and for as much compute: FLOPs of "
        "layers and head, so 1.8 times the steps where all layers are visited twice. All arms of a "
        "seed learn from the same questions in the same order. Weights are rounded to bfloat16 in "
        "all arms, and losses measured in float32. Rates were chosen before, by 24 validation "
        "answers after 12 steps: of gates alone and with LoRA among four, of few parameters and of "
        "LoRA of rank 8 among three each. One seed's interval is over answers alone: how much "
        "another training run would differ is in it only where there are several."
    ),
    amounts={
        "tiny": {
            "questions": 6,
            "steps": 2,
            "batch": 2,
            "rate": 1e-3,
            "few_rate": 1e-3,
            "gate_rate": 3e-4,
            "gate_rate_with_lora": 1e-4,
        },
        "real": {
            "questions": 100,
            "steps": 40,
            "batch": 4,
            "rate": 3e-3,
            "few_rate": 3e-2,
            "gate_rate": 3e-3,
            "gate_rate_with_lora": 1e-4,
        },
    },
    arms=_arms,
    claims=(
        _lower(
            "Gates trained alone lower the loss of a frozen pretrained decoder",
            f"{TROL}, as a claim about gates alone",
            GATES,
            BEFORE,
        ),
        _lower(
            "Gates alone lower it more than LoRA of as many parameters does in as many steps",
            WORTH,
            GATES,
            AS_MANY,
        ),
        _lower(
            "With LoRA, traversing all layers lowers it more than LoRA alone in as many steps",
            TROL,
            BOTH,
            LORA,
        ),
        _lower(
            "With LoRA, traversing all layers lowers it more than LoRA alone with as much compute",
            WORTH,
            BOTH,
            AS_LONG,
        ),
        _lower(
            "With LoRA, traversing the middle layers lowers it more than LoRA alone in as many "
            "steps",
            f"{TROL}, where a second visit is cheapest",
            MIDDLE,
            LORA,
        ),
        _lower(
            "With LoRA, traversing the middle layers lowers it more than LoRA alone with as much "
            "compute",
            WORTH,
            MIDDLE,
            AS_LONG_AS_MIDDLE,
        ),
        _lower(
            "Without training, the middle layers in two half steps lower it",
            "arXiv 2605.23872 (damped repetition), layer by layer",
            HALVED,
            BEFORE,
        ),
    ),
    tables=_tables,
)
