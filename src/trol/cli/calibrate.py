"""`trol calibrate`: thresholds that save most while the answers stay as they were, as an adapter.

Of a model that traverses: the thresholds of its gates, so that small second visits are left out.
With `--exit`, or of a model that carries early exits: the threshold of the exits.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from trol.cli import models, terminal
from trol.cli.terminal import option, run_record
from trol.errors import UsageError, unknown

if TYPE_CHECKING:
    from trol.evaluation.exit_calibration import ExitCalibration
    from trol.evaluation.gates import GateCalibration
    from trol.evaluation.items import Item
    from trol.policies.exits import EarlyExit

EXAMPLES = (
    "trol calibrate --data boards --quality 0.99 --out runs/sparse",
    "trol calibrate --exit margin --data boards --quality 0.9 --out runs/margin",
    "trol calibrate smollm2 --exit margin --data text:README.md --first 20 --every 3",
)
RESULT = "calibration.json"

GATE_QUALITY = 0.99
"""Share of answers, where --quality says nothing."""
EXIT_QUALITY, EXIT_QUESTIONS = 0.95, 300
"""Share of tokens, where --quality says nothing; and how many questions are asked."""
WINDOWS, WINDOW = 100, 48
"""How many windows of plain text are read for exits, and their tokens, where nothing is said.
The windows are what is counted, so many short ones show more than a few long ones."""

DATA_HELP = (
    "Questions to calibrate on: boards, docstrings, text:FILE, chat:FILE, alpaca:FILE, ... "
    "Default: boards for a model that sees, docstrings for one that reads."
)
QUALITY_HELP = (
    f"Share of answers as under full traversal (default: {GATE_QUALITY}); with --exit, share of "
    f"tokens as the full model says them ({EXIT_QUALITY})."
)
QUESTIONS_HELP = (
    f"How many. Default: four times what the quality needs; with --exit, {EXIT_QUESTIONS}, of "
    f"text:FILE {WINDOWS} windows."
)
WINDOW_HELP = f"Tokens of text:FILE read at once. Default: {WINDOW}."
EVERY_HELP = "Exits: look before each K-th layer. Default: as many layers as a look costs."
EXIT_HELP = "Calibrate early exits: entropy, margin, saturation or patience."


@dataclass(frozen=True)
class Request:
    """What the command line asks for; None where it says nothing."""

    quality: float | None
    confidence: float
    measure: str | None
    cost: float | None
    first: int | None
    every: int | None
    questions: int | None
    window: int | None
    seed: int

    @property
    def gate_goals(self) -> dict[str, Any]:
        """What thresholds of gates must reach."""
        return {"quality": self.quality or GATE_QUALITY, "confidence": self.confidence}

    @property
    def exit_goals(self) -> dict[str, Any]:
        """What exits must reach: a quality, unless a cost is given."""
        default = EXIT_QUALITY if self.cost is None else None
        quality = default if self.quality is None else self.quality
        return {"quality": quality, "cost": self.cost, "confidence": self.confidence}

    def check(self) -> None:
        """Raises `UsageError` for what no model can do, be it with gates or with exits."""
        from trol.evaluation.calibration import check_share

        if self.quality is not None:
            check_share("quality", self.quality)
        check_share("confidence", self.confidence)
        try:
            self._check_exits()
        except UsageError:
            if self.measure is not None:
                raise
            self.check_gates()

    def _check_exits(self) -> None:
        from trol.evaluation.calibration import check_exit_wishes
        from trol.policies.exits import MEASURES

        if self.measure not in (None, *MEASURES):
            raise unknown("exit", self.measure, MEASURES)
        check_exit_wishes(**self.exit_goals, answers=self.questions or EXIT_QUESTIONS)

    def check_gates(self) -> None:
        """Raises `UsageError` for what no gates can do."""
        from trol.evaluation.calibration import check_gate_wishes

        for name in ("cost", "first", "every"):
            if getattr(self, name) is not None:
                raise UsageError(
                    f"--{name} is for early exits; add --exit MEASURE, or leave --{name} out to "
                    "calibrate the gates of this model."
                )
        check_gate_wishes(**self.gate_goals, questions=self.questions)


def calibrate(
    model: terminal.Model = terminal.DEFAULT_MODEL,
    *,
    data: Annotated[str | None, option("--data", "NAME", DATA_HELP, "--task")] = None,
    quality: Annotated[float | None, option("--quality", "Q", QUALITY_HELP)] = None,
    confidence: Annotated[float, option("--confidence", "C", "That the quality holds.")] = 0.9,
    measure: Annotated[str | None, option("--exit", "MEASURE", EXIT_HELP)] = None,
    cost: Annotated[
        float | None, option("--cost", "SHARE", "Exits: share of the layers to run instead.")
    ] = None,
    first: Annotated[
        int | None, option("--first", "LAYER", "Exits: the first layer looked before. Default: 1.")
    ] = None,
    every: Annotated[int | None, option("--every", "K", EVERY_HELP)] = None,
    questions: Annotated[int | None, option("--questions", "N", QUESTIONS_HELP, min=1)] = None,
    window: Annotated[int | None, option("--window", "N", WINDOW_HELP, min=4)] = None,
    seed: terminal.Seed = 0,
    chat_template: terminal.ChatTemplate = None,
    out: Annotated[Path, option("--out", "DIR", "The adapter's folder.")] = Path("runs/calibrated"),
    as_json: terminal.AsJson = False,
) -> None:
    """Find which second visits MODEL can spare, or early exits.

    It says beforehand how much it measures. Nothing is kept on the way: stopped, it begins anew.
    """
    from trol.checkpoints.adapter import check_adapter_folder
    from trol.depth import is_attached
    from trol.evaluation.tasks import default_task, task_of

    request = Request(quality, confidence, measure, cost, first, every, questions, window, seed)
    request.check()
    windows = data is not None and task_of(data).windows
    if window is not None and not windows:
        raise UsageError("--window is for plain text; give --data text:FILE, or leave it out.")
    check_adapter_folder(out, beside=(RESULT,))
    with terminal.quiet_libraries():
        opened, processor = models.open_model(model, chat_template=chat_template)
        onto = "trol.detach(model)" if is_attached(opened) else "model"
        request = replace(request, measure=_measure(opened, request))
        data = data or default_task(processor)
        calibrated, about = _calibrated(opened, processor, data, request)
        result = {"model": model, "data": data, **about, **calibrated.json(), "out": str(out)}
        result["run"] = run_record(seed)
        _save(opened, calibrated.policy, out, result)

    def text() -> str:
        lines = (_gates_text if request.measure is None else _exits_text)(calibrated)
        lines.append(f"Written to {out}; trol.load({onto}, {str(out)!r}) attaches it.")
        return "\n".join(lines)

    terminal.report(result, as_json=as_json, text=text)


def _measure(model: Any, request: Request) -> str | None:
    """The measure of the exits to calibrate, or None where it is the gates of the model.

    Raises:
        UsageError: there are no gates and no measure is named, or there are and exits are meant.
    """
    from trol.depth import attached, is_attached
    from trol.evaluation.calibration import mixer_of
    from trol.policies.exits import EarlyExit

    if request.measure is not None:
        return request.measure
    policy = attached(model)[1].depth_policy if is_attached(model) else None
    if isinstance(policy, EarlyExit):
        return policy.measure
    mixer_of(model)
    request.check_gates()
    return None


def _calibrated(
    model: Any, processor: Any, data: str, request: Request
) -> tuple[Any, dict[str, Any]]:
    """The calibrated thresholds of gates or of exits, and what was asked of them."""
    from trol.evaluation.calibration import calibrate_gates, questions_for
    from trol.evaluation.exit_calibration import calibrate_exits
    from trol.evaluation.tasks import questions_of, task_of

    windows = task_of(data).windows
    if request.measure is None:
        goals = request.gate_goals
        count = request.questions or questions_for(**goals)
        search = partial(calibrate_gates, new_tokens=task_of(data).new_tokens)
    else:
        goals = request.exit_goals
        count = request.questions or (WINDOWS if windows else EXIT_QUESTIONS)
        search = partial(calibrate_exits, policy=(policy := _exit_policy(model, request)))
    items = questions_of(
        model,
        processor,
        data,
        count,
        seed=request.seed,
        split="validation",
        window=(request.window or WINDOW) if windows else None,
    )
    if request.measure is not None:
        terminal.note(_beforehand(model, processor, items, policy))
    with terminal.progress("calibrating", "batch") as bar:
        calibrated = search(model, processor, items, **goals, progress=bar)
    return calibrated, {"questions": len(items), **goals}


def _beforehand(model: Any, processor: Any, items: list[Item], policy: EarlyExit) -> str:
    """How much is measured: answers, their tokens, looks, and how dear a look is."""
    from trol.evaluation.exit_calibration import sweeps
    from trol.evaluation.items import tokenizer_of
    from trol.host.layers import find_decoder, layer_list

    encode = partial(tokenizer_of(processor), add_special_tokens=False)
    tokens = sum(len(one.ids or encode(one.answer)["input_ids"]) for one in items)
    layers: Any = layer_list(find_decoder(model))
    looks = sum(map(policy.looks, range(len(layers))))
    least, most = sweeps(model, policy)
    dear = f"A look costs {_dear(model):.1f} layers"
    return (
        f"Measuring {len(items)} answers, about {tokens:,} tokens, {least} to {most} times: at "
        f"{looks} looks in {len(layers)} layers, then as tokens really leave. {dear}; "
        "--first and --every look less often, --questions reads less."
    )


def _dear(model: Any) -> float:
    """What a look costs, in layers: the weights that the head reads for each of a layer."""
    from trol.depth.readout import Readout
    from trol.host.layers import find_decoder, layer_list

    layers: Any = layer_list(find_decoder(model))
    return Readout(model).flops / 2 / sum(part.numel() for part in layers[0].parameters())


def _save(model: Any, policy: Any, out: Path, result: dict[str, Any]) -> None:
    import trol
    from trol.depth import attached, is_attached
    from trol.files import write_json
    from trol.policies.mixer import TrolMixer

    if isinstance(policy, TrolMixer) or policy.heads:
        attached(model)[1].depth_policy = policy  # its trained parameters stay where they are
    else:
        if is_attached(model):
            trol.detach(model)
        trol.attach(model, policy)
    trol.save(model, out)
    write_json(out / RESULT, result)


def _gates_text(calibrated: GateCalibration) -> list[str]:
    thresholds = [calibrated.policy.threshold(layer) for layer in range(len(calibrated.shares))]
    rows = [["layer", "tau", "second visits made"]]
    for layer, (tau, share) in enumerate(zip(thresholds, calibrated.shares, strict=True)):
        rows.append(
            [str(layer), "none: one visit" if tau is None else f"{tau:g}", f"{100 * share:.1f} %"]
        )
    unit = "FLOPs" if calibrated.flops else "layer visits"
    lines = [
        terminal.table(rows),
        f"{100 * calibrated.kept.share:.2f} % of {calibrated.kept.questions} answers are those of "
        "full traversal, on questions that nothing was searched on (lower confidence limit "
        f"{100 * calibrated.at_least:.2f} %, p = {calibrated.p_value:.3g} that less than the "
        "wanted quality is kept).",
        f"A prompt takes {calibrated.cost[1]:.2f} times the plain model's {unit}; full traversal "
        f"{calibrated.cost[0]:.2f} (predicted).",
    ]
    for read in calibrated.prefill:
        at_once = "one question" if read.questions == 1 else f"{read.questions} questions at once"
        saved = 1 - read.ratio["sparse"] / read.ratio["full"]
        lines.append(
            f"Reading {at_once}, up to {read.tokens} tokens: {read.ratio['sparse']:.2f} times the "
            f"plain model's time, full traversal {read.ratio['full']:.2f} (spread "
            f"{max(read.spread.values()):.2f}): {100 * saved:.0f} % saved."
        )
    if all(tau == 0 for tau in thresholds):
        lines.append("No second visit can be left out; lower --quality, or give more --questions.")
    return lines


def _exit_policy(model: Any, request: Request) -> EarlyExit:
    """The exits to calibrate: those that the model carries, or new ones.

    Raises:
        UsageError: they do not fit the model, or its trained heads.
    """
    from trol.depth import attached, is_attached
    from trol.depth.attachment import check
    from trol.host.layers import find_decoder, layer_list
    from trol.policies.exits import EarlyExit

    decoder = find_decoder(model)
    # Looks that cost more than the layers between them save nothing.
    most = max(1, len(layer_list(decoder) or ()) - 2)
    settings: dict[str, Any] = {"first": 1, "every": min(most, max(1, round(_dear(model))))}
    policy = attached(model)[1].depth_policy if is_attached(model) else None
    if isinstance(policy, EarlyExit):
        settings = {key: policy.settings()[key] for key in ("first", "every", "heads")}
    elif policy is not None and policy.name != "plain":
        terminal.note(f"trol: {policy.name} is taken off: exits are calibrated on the plain model.")
    options = {"first": request.first, "every": request.every}
    options = {key: value for key, value in options.items() if value is not None}
    if settings.get("heads") and settings | options != settings:
        raise UsageError(
            f"the model's exit heads were trained for first={settings['first']} and "
            f"every={settings['every']}; leave --first and --every out."
        )
    new = EarlyExit(request.measure, 1.0, **settings | options)  # type: ignore[arg-type]
    check(decoder, new)
    return new


def _exits_text(calibrated: ExitCalibration) -> list[str]:
    policy, ran, share = calibrated.policy, calibrated.ran, calibrated.flops_share
    if share is None:
        flops = ", its FLOPs are not known"
    else:
        flops = f", {100 * share:.3g} % of the FLOPs per answer token, looks included"
    lines = [
        f"{policy.measure} >= {policy.thresholds[0]:g}, looked at before every layer from "
        f"{policy.first}" + (f", each {policy.every}." if policy.every > 1 else "."),
        f"{100 * ran.executed:.1f} % of the layers run{flops}; {100 * ran.quality:.1f} % of the "
        f"tokens agree with the full model ({len(ran.qualities)} answers, {calibrated.tokens} "
        "tokens).",
    ]
    if calibrated.other is not None:
        ways = ("hole", "project") if policy.skipped_kv == "hole" else ("project", "hole")
        lines.append(
            f"skipped_kv={ways[0]!r} is written: it keeps no less than {ways[1]!r}, which kept "
            f"{100 * calibrated.other.quality:.1f} % at the first threshold that was run."
        )
    if share is not None and share >= 1:
        lines.append(
            "These exits save nothing on this model: its looks, which read the head, cost as much "
            "as the skipped layers or more. Look less often (--every K) or later (--first LAYER)."
        )
    if calibrated.p_value is not None:
        lines.append(f"p = {calibrated.p_value:.3g} that less than the wanted quality is kept.")
    if ran.executed == 1:
        lines.append("No token leaves early; lower --quality, or train exit heads.")
    return lines
