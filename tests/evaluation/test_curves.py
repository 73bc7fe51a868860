"""Curves: points that cost what was executed, honest refusals, nothing lost from the model."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

import trol
from trol.checkpoints.adapter import text_digest
from trol.data.boards import make_board, questions
from trol.depth import attached, depth, is_attached
from trol.errors import DataError, UsageError
from trol.evaluation import answers, tasks, timing
from trol.evaluation import curve as points
from trol.evaluation import curve_methods as methods
from trol.evaluation.curve import curve
from trol.evaluation.curve_methods import Request, check_methods, shares_of, with_adapter
from trol.evaluation.items import Item
from trol.evaluation.store import SharedMeasurements
from trol.family import TrolForConditionalGeneration, tiny, tiny_processor
from trol.family.presets import byte_level_tokenizer, text_decoder
from trol.policies.controller import Controller
from trol.policies.exits import EarlyExit
from trol.policies.mixer import TrolMixer
from trol.policies.planned import Planned
from trol.policies.router import Router

LAYERS = 4
WORDS = ["What is the colour of grass?", "Green as the sea.", "How many legs?", "Four or six."]


def items(count: int, seed: int, split: str = "test") -> list[Item]:
    """Questions of a seed: other words for each."""
    del split
    return [
        Item(None, f"{WORDS[0]} {seed} {number}", WORDS[1], "colour") for number in range(count)
    ]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(points, "ROUNDS", 1)
    monkeypatch.setattr(points, "FORCED_TOKENS", 3)
    monkeypatch.setattr(methods, "THRESHOLDS", (0.0, 0.9))
    monkeypatch.setattr(methods, "DIALS", (0.0, 0.5))
    monkeypatch.setattr(timing.gc, "collect", lambda: 0)  # times are not what is tested
    small = tasks.Task(items, metrics=("rougeL", "loss"), new_tokens=4)
    monkeypatch.setitem(tasks.TASKS, "colours", small)


@pytest.fixture
def decoder() -> tuple[Any, Any]:
    tokenizer = byte_level_tokenizer(WORDS, 300)
    torch.manual_seed(0)
    config = text_decoder(tokenizer, hidden_size=16, layers=LAYERS, heads=2)
    return LlamaForCausalLM(config).eval(), tokenizer


def drawn(decoder: tuple[Any, Any], *names: str, **settings: Any) -> dict[str, Any]:
    request = Request(names, **{"keeps": (0.5, 1.0), "questions": 3, "seeds": 2, **settings})
    return curve(*decoder, ["colours"], request)


def points_of(result: dict[str, Any], method: str) -> list[dict[str, Any]]:
    return result["tasks"]["colours"]["methods"][method]["points"]


@pytest.mark.parametrize(
    ("text", "shares"),
    [
        ("0.5", [0.5]),
        ("0.8:1.0", [0.8, 0.9, 1.0]),
        ("0.25:1:0.25", [0.25, 0.5, 0.75, 1.0]),
        ("0.1:0.75:0.3", [0.1, 0.4, 0.7]),
    ],
)
def test_a_range_of_shares(text: str, shares: list[float]) -> None:
    assert shares_of(text) == shares


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0:1", r"keep is 0.0, .* above 0"),
        ("0.5:1.2", "keep is 1.2"),
        ("-0.5", "keep is -0.5"),
        ("half", "--keep is 'half'; give first:last"),
        ("nan", "give first:last"),
        ("0.1:0.5:0.1:9", "give first:last"),
        ("", "give first:last"),
        ("0.9:0.1", "begin with the smaller share"),
        ("0.1:0.9:0", "a step above 0"),
        ("0.1:0.9:0.001", "100 or fewer"),
    ],
)
def test_a_malformed_range_is_refused(text: str, expected: str) -> None:
    with pytest.raises(UsageError, match=expected):
        shares_of(text)


def test_points_say_what_was_executed(decoder: tuple[Any, Any]) -> None:
    result = drawn(decoder, "skip", "exit", "random", "influence")
    assert not is_attached(decoder[0])
    json.dumps(result, allow_nan=False)
    for method in ("skip", "exit", "random", "influence"):
        half, full = points_of(result, method)
        assert half["visits_share"] == {"mean": 0.5, "spread": 0.0, "values": [0.5, 0.5]}
        assert half["visits"]["mean"] == LAYERS / 2
        # The skipped layers still make keys and values of the answer's tokens.
        assert 0.5 < half["flops_share"]["mean"] < 1
        assert half["prefill_flops_share"]["mean"] == 1
        assert half["ms"]["mean"] > 0
        assert len(half["cosines"]) == LAYERS
        assert full["settings"] == {"plan": "all"}
        assert full["visits_share"]["mean"] == full["ms_ratio"]["mean"] == 1
        assert full["cosines"] == pytest.approx([1] * LAYERS, abs=1e-6)
    assert points_of(result, "exit")[0]["cosines"][:2] == pytest.approx([1, 1], abs=1e-6)
    assert points_of(result, "exit")[0]["settings"] == {"plan": "0-1"}
    assert points_of(result, "skip")[0]["settings"] == {"plan": "0 3"}


def test_metrics_are_those_of_the_plan(decoder: tuple[Any, Any]) -> None:
    half, full = points_of(drawn(decoder, "exit", seeds=1), "exit")
    some = items(3, 0)
    with depth(decoder[0], Planned("exit@2", scope="answer")):
        expected = answers.losses(*decoder, some)
        given = answers.answers(*decoder, some, new_tokens=4)
    assert half["metrics"]["loss"]["values"] == [pytest.approx(sum(expected) / 3)]
    rouge = answers.scores("rougeL", given, some)
    assert half["metrics"]["rougeL"]["mean"] == pytest.approx(sum(rouge) / 3)
    assert half["metrics"]["loss"]["spread"] is None  # one seed has none
    assert full["metrics"]["loss"] != half["metrics"]["loss"]


def test_with_scope_all_skipped_layers_cost_nothing(decoder: tuple[Any, Any]) -> None:
    half, _ = points_of(drawn(decoder, "skip", scope="all"), "skip")
    assert half["flops_share"]["mean"] == pytest.approx(0.5)
    assert half["prefill_flops_share"]["mean"] == pytest.approx(0.5)


def test_random_has_a_plan_for_each_seed_and_equal_plans_are_measured_once(
    decoder: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[str] = []
    real = points.measure

    def counted(sample: Any, model: Any, policy: Any) -> Any:
        measured.append(repr(policy))
        return real(sample, model, policy)

    monkeypatch.setattr("trol.evaluation.curve.measure", counted)
    result = drawn(decoder, "random", "exit", keeps=(0.74, 0.75), seeds=3)
    one, other, _ = points_of(result, "random")
    assert len(set(one["settings"]["plans"])) > 1
    assert one["metrics"] == other["metrics"]  # 0.74 and 0.75 keep the same layers
    assert len(measured) == 3 * 3  # full, random, exit


def test_parts_of_a_curve_are_the_whole(decoder: tuple[Any, Any], tmp_path: Path) -> None:
    """Whoever finishes last merges; all but times are those of one process."""
    methods, header = ("random", "exit", "early_exit"), {"made": "alike"}
    request = Request(methods, keeps=(0.5, 0.75), questions=3, seeds=2)

    def part(index: int, header: dict[str, Any] = header) -> dict[str, Any]:
        kept = SharedMeasurements(tmp_path, header, (index, 3))
        return curve(*decoder, ["colours"], request, kept=kept, shard=(index, 3))

    assert part(1) == {"complete": False, "missing": ["0/3", "2/3"]}
    assert part(0) == {"complete": False, "missing": ["2/3"]}
    with pytest.raises(UsageError, match=r"belongs to another run .*give all parts the same"):
        part(2, {"made": "otherwise"})
    merged, alone = part(2), curve(*decoder, ["colours"], request)
    for method in methods:
        for ours, theirs in zip(points_of(merged, method), points_of(alone, method), strict=True):
            same = [name for name in theirs if "ms" not in name]
            assert {name: ours[name] for name in same} == {name: theirs[name] for name in same}
    sizes = [len(path.read_text().splitlines()) - 1 for path in sorted(tmp_path.iterdir())]
    assert max(sizes) - min(sizes) <= 1  # nothing is measured twice, nor all by one


def test_a_refused_run_is_told_in_words_what_differs(tmp_path: Path) -> None:
    amounts = {"windows": 8, "window": 128}
    header = {"weights": text_digest("a"), "text": {"test": text_digest("b")}, "amounts": amounts}
    other = {**header, "weights": text_digest("c"), "amounts": {**amounts, "windows": 2}}
    SharedMeasurements(tmp_path, header, (0, 2))
    with pytest.raises(UsageError, match=r"\(other weights; windows 8 there, 2 here\)"):
        SharedMeasurements(tmp_path, other, (1, 2))


def test_a_part_that_was_killed_goes_on(
    decoder: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def part() -> dict[str, Any]:
        kept = SharedMeasurements(tmp_path, {}, (0, 1))
        request = Request(("skip",), keeps=(0.5,), questions=2, seeds=1)
        return curve(*decoder, ["colours"], request, kept=kept)

    whole, file = part(), tmp_path / "points-0-of-1.jsonl"
    file.write_text(file.read_text()[:-20])  # a kill tore the last point
    measured: list[int] = []
    real = points.measure
    monkeypatch.setattr(points, "measure", lambda *what: (measured.append(1), real(*what))[1])
    again = part()
    assert len(measured) == 1
    assert again["tasks"].keys() == whole["tasks"].keys()


def test_what_is_attached_stays(decoder: tuple[Any, Any]) -> None:
    model, _ = decoder
    trol.attach(model, TrolMixer())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    drawn(decoder, "skip", "early_exit", seeds=1)
    assert attached(model)[1].depth_policy == TrolMixer()
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_exits_sweep_thresholds(decoder: tuple[Any, Any]) -> None:
    swept = points_of(drawn(decoder, "early_exit", seeds=1), "early_exit")
    assert {point["settings"].get("measure") for point in swept[:-1]} == {"margin"}
    shares = {p["settings"].get("threshold"): p["visits_share"]["mean"] for p in swept}
    assert shares[0.0] == 1 / LAYERS  # always sure: out before layer 1
    assert shares[0.9] <= shares[None] == 1
    assert all(point["keep"] is None for point in swept[:-1])


def test_an_adapter_of_exits_without_heads_is_one_point(
    decoder: tuple[Any, Any], tmp_path: Path
) -> None:
    """On the same model; where it has heads of its own, a sweep."""
    model, tokenizer = decoder
    for name, heads in (("calibrated", False), ("heads", True)):
        trol.attach(model, EarlyExit("margin", 0.25, heads=heads))
        trol.save(model, tmp_path / name)
        trol.detach(model)
    for name, thresholds in (("calibrated", [0.25]), ("heads", [0.0, 0.9])):
        given = {name: with_adapter(model, tmp_path / name)}
        result = drawn((model, tokenizer), "early_exit", adapters=given, seeds=1)
        swept = [point["settings"] for point in points_of(result, "early_exit")]
        assert sorted(o["threshold"] for o in swept if o.get("adapter") == name) == thresholds
        assert len(swept) == 2 + len(thresholds) + 1  # a sweep without adapter, the full model


def test_adapters_are_points_and_share_the_weights(
    decoder: tuple[Any, Any], tmp_path: Path
) -> None:
    model, tokenizer = decoder
    for name, policy in {
        "half": Controller(initial=0.01),
        "router": Router(["0-1", "all"], after=1),
    }.items():
        trol.attach(model, policy)
        trol.save(model, tmp_path / name)
        trol.detach(model)
    adapters = {name: with_adapter(model, tmp_path / name) for name in ("half", "router")}
    assert not is_attached(model)
    weights = [one.get_input_embeddings().weight for one in (model, adapters["half"])]
    assert weights[0] is weights[1]
    result = drawn((model, tokenizer), "controller", "router", adapters=adapters, seeds=1)
    half, full = points_of(result, "controller")
    assert half["settings"] == {"adapter": "half"}
    assert half["visits_share"]["mean"] == 0.5  # only the first and the last layer run
    assert full["visits_share"]["mean"] == 1
    dials = {p["settings"]["dial"]: p for p in points_of(result, "router")[:-1]}
    assert dials[0.0]["visits_share"]["mean"] == 0.5
    assert dials[0.0]["settings"]["adapter"] == "router"


def test_a_trained_method_without_its_adapter_is_refused(decoder: tuple[Any, Any]) -> None:
    with pytest.raises(UsageError, match=r"holds a controller; train one with `trol train"):
        drawn(decoder, "controller")
    trol.attach(decoder[0], TrolMixer())
    with pytest.raises(UsageError, match="holds a trol_mixer"):
        drawn(decoder, "skip", adapters={"gates": decoder[0]})


def test_unknown_methods_are_named() -> None:
    with pytest.raises(UsageError, match="Did you mean 'influence'"):
        check_methods(["influense"], None)
    with pytest.raises(UsageError, match="no method named"):
        check_methods([], None)
    with pytest.raises(UsageError, match="give --oracle DIR"):
        check_methods(["oracle"], None)


def oracle_in(folder: Path, **settings: Any) -> Path:
    folder.mkdir()
    points = [
        {"layers": cost, "share": cost / LAYERS, "oracle": score}
        for cost, score in ((1, -2.0), (2, -1.5), (3, -1.0), (4, -0.5))
    ]
    result = {
        "task": "colours",
        "split": "test",
        "scope": "answer",
        "metric": "loss",
        "full": -0.7,
        "layers": LAYERS,
        "n": 9,
        "curve": points,
        "equal_budget": {"layers": 3, "share": 0.75, "score": -1.0},
    }
    (folder / "oracle.json").write_text(json.dumps({**result, **settings}))
    return folder


def test_an_oracle_is_read(decoder: tuple[Any, Any], tmp_path: Path) -> None:
    folder = oracle_in(tmp_path / "oracle")
    result = drawn(decoder, "oracle", "exit", oracle=folder)
    assert result["tasks"]["colours"]["methods"]["oracle"]["bound"]
    drawn_points = points_of(result, "oracle")
    assert [point["visits_share"]["mean"] for point in drawn_points] == [0.5, 0.75, 1.0]
    assert [point["metrics"]["loss"]["mean"] for point in drawn_points] == [1.5, 1.0, 0.5]
    assert {point["ms_ratio"] for point in drawn_points} == {None}
    on = result["tasks"]["colours"]["methods"]["oracle"]["made_on"]
    full = points_of(result, "exit")[-1]["metrics"]["loss"]["mean"]
    assert on.pop("full_here") == pytest.approx(full)
    assert on == {"n": 9, "split": "test", "metric": "loss", "seed": None, "full": 0.7}


def test_another_oracle_is_refused(
    decoder: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr("trol.evaluation.curve.measure")  # refused before any of it
    with pytest.raises(UsageError, match="no finished oracle"):
        drawn(decoder, "oracle", oracle=tmp_path)
    with pytest.raises(UsageError, match="was asked boards"):
        drawn(decoder, "oracle", oracle=oracle_in(tmp_path / "a", task="boards"))
    with pytest.raises(UsageError, match="scope all, these curves with answer; give --scope all"):
        drawn(decoder, "oracle", oracle=oracle_in(tmp_path / "c", scope="all"))
    with pytest.raises(UsageError, match="24 layers, this model has 4"):
        drawn(decoder, "oracle", oracle=oracle_in(tmp_path / "b", layers=24))
    (tmp_path / "b" / "oracle.json").write_text("{")
    with pytest.raises(DataError, match="damaged"):
        drawn(decoder, "oracle", oracle=tmp_path / "b")


def test_a_model_that_sees_is_drawn_on_boards() -> None:
    torch.manual_seed(0)
    asked = [q for seed in range(40) for q in questions(make_board("train", seed), 9)]
    processor = tiny_processor([text for q in asked for text in (q.text, q.answer)])
    config = tiny(len(processor.tokenizer), hidden_size=32, layers=LAYERS)
    model = TrolForConditionalGeneration(config).eval()
    request = Request(("skip",), (0.5,), questions=9, seeds=2)
    result = curve(model, processor, ["boards"], request)["tasks"]["boards"]
    half, full = result["methods"]["skip"]["points"]
    assert set(half["metrics"]) == {"exact", "loss"}
    assert half["visits_share"]["mean"] == 0.5
    assert full["visits"]["mean"] == LAYERS  # the policy that the model carries is out of force
