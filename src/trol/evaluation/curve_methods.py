"""The methods that a curve compares: how each makes its policies, cheap ones to dear ones."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from itertools import chain
from pathlib import Path
from typing import Any

from trol.checkpoints import adapter
from trol.depth import AbstractPolicy, Scope, attached, detach, is_attached
from trol.depth.policy import from_settings, to_settings
from trol.errors import UsageError, unknown
from trol.evaluation.answers import LOWER_IS_BETTER
from trol.evaluation.hidden_states import layers_of
from trol.evaluation.plan_search import CHOOSING, ChosenPlan, chosen_plan, items_to_choose_by
from trol.evaluation.store import Measurements, OracleResult
from trol.policies.exits import EarlyExit
from trol.policies.planned import Planned, kept_count

STATIC = {"skip": "uniform", "exit": "exit", "random": "random", "middle": "middle"}
"""Method -> the static plans that it draws; those of `skip` are evenly spaced."""

SEARCHED = ("influence", "greedy")
"""Methods whose plans are chosen by measuring."""

TRAINED = ("controller", "router")
"""Methods with trained parameters, which are registered policies of the same name."""

METHODS = (*STATIC, *SEARCHED, EarlyExit.name, *TRAINED)

ORACLE = "oracle"
"""A method that is not measured here: its curve is read from the folder of `trol oracle`."""

THRESHOLDS = (0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.7, 0.9)
"""Thresholds of `MEASURE` for exits that decide while running."""

MEASURE = "margin"
"""The measure of how sure a prediction is, where no adapter names another."""

WAITS = (1, 2, 3, 4)
"""Thresholds of the measure `patience`, which counts looks."""

DIALS = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9)
"""Quality dials of a router."""

UNKNOWN = ("flops", "prefill_flops", "ms", "prefill_ms")
"""Costs that an oracle has no figures of: it chooses after all levels have answered."""

STEP = Decimal("0.1")

MOST = 100
"""Shares of one curve: more is a slip of the keyboard."""


@dataclass(frozen=True)
class Candidate:
    """One point to be measured: a model, and its policy for each seed."""

    keep: float | None
    """The share of the layers that was asked for; None where it is decided while running."""
    settings: dict[str, Any]
    """The settings by which this point differs from others, as JSON values."""
    model: Any
    policies: tuple[AbstractPolicy, ...]
    """The policy of each seed."""


@dataclass(frozen=True)
class Request:
    """The methods of a curve, its shares and seeds, and what the methods need.

    `adapters` are folders by name, each with its model opened: the policy is attached, and the
    host is the same or trained along with it.
    """

    methods: tuple[str, ...]
    keeps: tuple[float, ...]
    questions: int | None = None
    seeds: int = 3
    scope: Scope = "answer"
    adapters: Mapping[str, Any] | None = None
    oracle: Path | None = None

    def carrying(self, policy: str) -> dict[str, Any]:
        """The adapters whose policy has this registered name."""
        adapters = self.adapters or {}
        return {name: model for name, model in adapters.items() if policy_of(model).name == policy}


def policy_of(model: Any) -> AbstractPolicy:
    """The policy that a model carries."""
    return attached(model)[1].depth_policy


def with_adapter(model: Any, folder: str | Path) -> Any:
    """A model with an adapter's policy that shares all weights with `model`, which stays as it is.

    Raises as `trol.load`.
    """
    shared = chain(model.parameters(), model.buffers())
    other = copy.deepcopy(model, {id(tensor): tensor for tensor in shared})
    if is_attached(other):
        detach(other)
    return adapter.load(other, folder)


def check_methods(methods: Sequence[str], oracle: Path | None) -> None:
    """Raises where no method is named, one is unknown, or the oracle's folder holds none.

    Raises:
        UsageError: any of these.
        DataError: the oracle's file is damaged.
    """
    known = [*METHODS, ORACLE]
    if not methods:
        raise UsageError(f"no method named; choose among {', '.join(known)}.")
    for method in methods:
        if method not in known:
            raise unknown("method", method, known)
    if oracle is not None:
        OracleResult.read(oracle)
    elif ORACLE in methods:
        raise UsageError(
            "the method oracle is drawn from a finished oracle; run `trol oracle MODEL --out DIR` "
            "and give --oracle DIR."
        )


def check_adapters(request: Request) -> None:
    """Raises `UsageError` where a method lacks its adapter, or an adapter its method."""
    for method in TRAINED:
        if method in request.methods and not request.carrying(method):
            raise UsageError(
                f"the method {method} has parameters that are trained, and no folder of --adapters "
                f"holds a {method}; train one with `trol train RECIPE`, where the recipe's policy "
                f"is {method}, and give --adapters its folder."
            )
    for name, model in (request.adapters or {}).items():
        kind = policy_of(model).name
        known = (*TRAINED, EarlyExit.name)
        if kind not in known:
            raise UsageError(
                f"the adapter {name} holds a {kind}, but curves are drawn of {', '.join(known)}; "
                "leave it out of --adapters."
            )
        if kind not in request.methods:
            raise UsageError(f"the adapter {name} holds a {kind}; add {kind} to --methods.")


def candidates(
    method: str, model: Any, processor: Any, task: str, request: Request
) -> list[Candidate]:
    """The points of one method on one task, the full model not among them."""
    if method in STATIC or method in SEARCHED:
        return _plans(method, model, processor, task, request)
    if method == EarlyExit.name:
        return _exits(model, request)
    values = {"dial": DIALS} if method == "router" else {}
    return [
        one
        for name, other in request.carrying(method).items()
        for one in _sweep(other, policy_of(other), {"adapter": name}, request.seeds, **values)
    ]


def _plans(method: str, model: Any, processor: Any, task: str, request: Request) -> list[Candidate]:
    """The points at the shares at which some layer goes; where none does, it is the full model.

    A plan is chosen once, by validation questions, and the seeds differ in the questions they
    answer; plans drawn at random differ as well.
    """
    layers, points, items = layers_of(model), [], []
    if method in SEARCHED or request.scope != "answer":
        items = items_to_choose_by(model, processor, task, part=CHOOSING)
    kept = Measurements()  # shares have many of them in common
    for keep in request.keeps:
        if kept_count(layers, keep) == layers:
            continue
        plans = [
            chosen_plan(
                STATIC.get(method, method),
                model,
                processor,
                items,
                keep,
                scope=request.scope,
                seed=seed,
                measured=kept,
            )
            for seed in (range(request.seeds) if method == "random" else (0,))
        ]
        plans *= request.seeds // len(plans)
        policies = tuple(
            Planned(one.plan, scope=request.scope, keep_first=one.keep_first) for one in plans
        )
        points.append(Candidate(keep, _settings(plans), model, policies))
    return points


def _settings(plans: Sequence[ChosenPlan]) -> dict[str, Any]:
    """The plan, or the plans of the seeds, and the first tokens at full depth, if there are any."""
    texts, firsts = [str(one.plan) for one in plans], [one.keep_first for one in plans]
    settings: dict[str, Any] = {"plan": texts[0]} if len(set(texts)) == 1 else {"plans": texts}
    if any(firsts):
        settings["keep_first"] = firsts[0] if len(set(firsts)) == 1 else firsts
    return settings


def _exits(model: Any, request: Request) -> list[Candidate]:
    """A sweep of thresholds without trained heads, and what each adapter adds to it.

    An adapter with its own heads, or with a host that was trained along, gives another sweep; one
    that only sets a threshold on this model gives the point of that threshold.
    """
    plain = EarlyExit(MEASURE, scope=request.scope)
    points = _sweep(model, plain, {"measure": MEASURE}, request.seeds, threshold=THRESHOLDS)
    for name, other in request.carrying(EarlyExit.name).items():
        own = policy_of(other)
        settings = to_settings(own)
        same_host = other.get_input_embeddings().weight is model.get_input_embeddings().weight
        if same_host and not settings["heads"]:
            thresholds: Sequence[float] = (settings["threshold"],)
        else:
            thresholds = WAITS if settings["measure"] == "patience" else THRESHOLDS
        about = {"adapter": name, "measure": settings["measure"]}
        points += _sweep(other, own, about, request.seeds, threshold=thresholds)
    return points


def _sweep(
    model: Any, policy: AbstractPolicy, about: dict[str, Any], seeds: int, **values: Sequence[float]
) -> list[Candidate]:
    """One policy at several values of one of its settings; as it is, where none is named."""
    several = [{name: value} for name, each in values.items() for value in each] or [{}]
    return [
        Candidate(
            None,
            {**about, **setting},
            model,
            (from_settings({**to_settings(policy), **setting}) if setting else policy,) * seeds,
        )
        for setting in several
    ]


def shares_of(text: str) -> list[float]:
    """`first:last[:step]`, both ends included, or one share, as numbers in rising order.

    Raises:
        UsageError: it is no such range, or a share is outside (0, 1].
    """
    try:
        numbers = [Decimal(part) for part in text.split(":")]
    except InvalidOperation:
        numbers = []
    if len(numbers) not in (1, 2, 3) or not all(number.is_finite() for number in numbers):
        raise UsageError(
            f"--keep is {text!r}; give first:last or first:last:step, such as 0.1:1.0 or "
            "0.25:1:0.25, or one share."
        )
    first, last = numbers[0], numbers[min(1, len(numbers) - 1)]
    step = numbers[2] if len(numbers) == 3 else STEP
    for share in (first, last):
        kept_count(1, float(share))
    if first > last or step <= 0:
        raise UsageError(
            f"--keep {text} has no shares: it begins at {first}, ends at {last} and goes by "
            f"{step}; begin with the smaller share and give a step above 0."
        )
    count = int((last - first) / step) + 1
    if count > MOST:
        raise UsageError(
            f"--keep {text} names {count} shares; give a step that makes {MOST} or fewer."
        )
    return [float(first + step * number) for number in range(count)]


def oracle_of(folder: Path, task: str, scope: str, layers: int) -> OracleResult:
    """The result in the folder of the oracle of this task, scope and number of layers.

    Raises:
        UsageError: it is of another task, scope or stack; or none is there.
        DataError: its file is damaged.
    """
    result = OracleResult.read(folder)
    if result.task != task:
        raise UsageError(
            f"the oracle in {folder} was asked {result.task}; name a folder of the task {task} "
            "with --oracle."
        )
    if result.layers != layers:
        raise UsageError(
            f"the oracle in {folder} chose among plans of {result.layers} layers, this model has "
            f"{layers}; name a folder of this model with --oracle."
        )
    if result.scope != scope:
        raise UsageError(
            f"the oracle in {folder} was made with scope {result.scope}, these curves with "
            f"{scope}; give --scope {result.scope}, or run `trol oracle --scope {scope}`."
        )
    return result


def oracle_points(result: OracleResult, folder: Path, keeps: Sequence[float]) -> list[Any]:
    """The oracle's points at these shares, at the one that equals the full model, and at its end.

    One set of questions, so no spread. The budget is a mean over sequences; a share below that of
    the cheapest level has no point.
    """
    curve = sorted(result.curve, key=lambda point: point["share"])
    places = {len(curve) - 1}
    for share in (result.equal_budget["share"], *keeps):
        # The dearest point that costs no more, -1 where there is none.
        places.add(sum(point["share"] <= share + 1e-9 for point in curve) - 1)
    return [_oracle_point(curve[place], result, folder) for place in sorted(places) if place >= 0]


def _oracle_point(point: dict[str, float], result: OracleResult, folder: Path) -> dict[str, Any]:
    def one(value: float) -> dict[str, Any]:
        return {"mean": value, "spread": None, "values": [value]}

    return {
        "keep": point["share"],
        "settings": {"oracle": str(folder)},
        "metrics": {result.metric: one(_sign(result) * point["oracle"])},
        "visits": one(point["layers"]),
        "visits_share": one(point["share"]),
        **dict.fromkeys(UNKNOWN),
        **dict.fromkeys(f"{name}_{'ratio' if 'ms' in name else 'share'}" for name in UNKNOWN),
        "cosines": None,
    }


def made_on(result: OracleResult) -> dict[str, Any]:
    """The questions of an oracle, and what the full model scored on them; a loss as it is."""
    return {
        "n": result.n,
        "split": result.split,
        "metric": result.metric,
        "seed": result.run.get("seed"),
        "full": _sign(result) * result.full,
    }


def _sign(result: OracleResult) -> int:
    return -1 if result.metric in LOWER_IS_BETTER else 1
