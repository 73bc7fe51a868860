"""The runner keeps what it measured and refuses another recipe; the rule gives each verdict."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cli.command import run as command
from trol.checkpoints.adapter import text_digest
from trol.errors import UsageError
from trol.reports.study import figures
from trol.studies import STUDIES, hop_learners, study_of
from trol.studies.learning import kept
from trol.studies.running import run
from trol.studies.single_layers import KINDS
from trol.studies.study import Arm, Claim, Estimate, Evidence, Study, Table, of_seed, resampled
from trol.studies.subject import Subject, make_tiny
from trol.training import Recipe
from trol.training import run as train

from .test_boards import AMOUNTS as BOARDS


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_tiny(tmp_path_factory.mktemp("host")))


AMOUNTS = {"windows": 2, "window": 16, "chosen_by": 2}

HOPS = {"questions": 24, "width": 16}
SHORT = dict.fromkeys(("steps", "alignment", "data"), BOARDS)
"""Studies that train for minutes at tiny size -> amounts that take seconds; of others `HOPS`."""


def counting(asked: list[str], fails: str = "") -> Study:
    """A study of three arms, the last of which needs the first; `fails` breaks off."""

    def arm(name: str, *needs: str) -> Arm:
        def measure(values: Any) -> Any:
            if name == fails:
                raise KeyboardInterrupt
            asked.append(name)
            return [1.0 + len(values), 2.0]

        return Arm(name, measure, needs)

    return Study(
        name="counting",
        hypothesis="",
        design="",
        controls="",
        amounts={"tiny": AMOUNTS, "real": AMOUNTS},
        arms=lambda subject: [arm("a"), arm("b"), arm("c", "a")],
        claims=(Claim("c is more", "here", "c - a", "above", 0, lambda e: e.difference("c", "a")),),
        tables=lambda e: [Table("means", ["arm", "mean"], [[n, f"{e.mean(n)}"] for n in e.values])],
    )


def test_it_goes_on_where_it_was_stopped(host: str, tmp_path: Path) -> None:
    asked: list[str] = []
    subject = Subject(host, AMOUNTS, 1, tmp_path)
    with pytest.raises(KeyboardInterrupt):
        run(counting(asked, fails="c"), subject)
    assert asked == ["a", "b"]
    done: list[tuple[int, int]] = []
    result = run(counting(asked), subject, progress=lambda *at: done.append(at))
    assert asked == ["a", "b", "c"]
    assert done == [(0, 3), (1, 3), (2, 3), (3, 3)]
    assert result is not None
    assert result["claims"][0]["value"] == 0.5
    assert result == run(counting(asked), subject)
    assert asked == ["a", "b", "c"]


def test_shards_together_are_the_whole(host: str, tmp_path: Path) -> None:
    asked: list[str] = []
    subject = Subject(host, AMOUNTS, 1, tmp_path / "parts")
    assert run(counting(asked), subject, shard=(0, 2)) is None
    assert asked == ["a", "c"]
    whole = run(counting(asked), subject, shard=(1, 2))
    assert asked == ["a", "c", "b"]
    assert whole == run(counting([]), Subject(host, AMOUNTS, 1, tmp_path / "whole"))


def test_a_shard_measures_what_it_needs(host: str, tmp_path: Path) -> None:
    asked: list[str] = []
    assert run(counting(asked), Subject(host, AMOUNTS, 1, tmp_path), shard=(2, 3)) is None
    assert asked == ["a", "c"]


def test_more_seeds_go_on_from_fewer(host: str, tmp_path: Path) -> None:
    asked: list[str] = []
    run(counting(asked), Subject(host, AMOUNTS, 1, tmp_path))
    assert run(counting(asked), Subject(host, AMOUNTS, 2, tmp_path)) is not None
    assert asked == ["a", "b", "c"]


@pytest.mark.parametrize("what", ["windows", "weights"])
def test_a_changed_recipe_is_refused(what: str, host: str, tmp_path: Path) -> None:
    subject = Subject(host, AMOUNTS, 1, tmp_path)
    run(counting([]), subject)
    amounts = {**AMOUNTS, "windows": 3} if what == "windows" else AMOUNTS
    other = Subject(host, amounts, 1, tmp_path)
    if what == "weights":
        other.model.model.norm.weight.data += 1
    with pytest.raises(UsageError, match=what):
        run(counting([]), other)


@pytest.mark.parametrize("side", ["above", "below"])
@pytest.mark.parametrize(
    ("low", "high", "above"),
    [(0.1, 0.3, True), (-0.3, -0.1, False), (-0.1, 0.1, None), (0.0, 0.2, None)],
)
def test_the_rule_gives_each_verdict(
    side: Any, low: float, high: float, above: bool | None
) -> None:
    claim = Claim("", "", "", side, 0.0, lambda e: Estimate(0, 0, 0))
    verdict = claim.verdict(Estimate((low + high) / 2, low, high))
    if above is None:
        assert verdict == "not decided at this size"
    else:
        assert verdict == ("reproduced" if above == (side == "above") else "refuted")


def test_a_statistic_that_no_unit_has_decides_nothing() -> None:
    claim = Claim("", "", "", "below", 1.0, lambda e: resampled(lambda units: float("nan"), 3))
    said = claim.json(Evidence({}, 4, 1, {}))
    assert (said["value"], said["low"], said["high"]) == (None, None, None)
    assert said["verdict"] == "not measured"
    assert figures(said) == ["–", "nothing to compare", "below 1"]


def test_a_side_that_is_none_is_refused() -> None:
    with pytest.raises(UsageError, match=r"side of a claim 'abvoe'.* Did you mean 'above'"):
        Claim("", "", "", "abvoe", 0.0, lambda e: Estimate(0, 0, 0))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("low", "high", "shown"),
    [
        (0.1, 0.2, "0.100 to 0.200"),
        (0.98016, 0.99, "0.9802 to 0.9900"),
        (0.9, 0.979996, "0.900000 to 0.979996"),
    ],
)
def test_an_end_is_told_from_the_bound(low: float, high: float, shown: str) -> None:
    claim = Claim("", "", "", "above", 0.98, lambda e: Estimate(low, low, high))
    assert figures(claim.json(Evidence({}, 4, 1, {})))[1] == shown


def test_seeds_are_told_of_where_something_is_drawn(host: str, tmp_path: Path) -> None:
    def drawing(subject: Subject) -> list[Arm]:
        return [Arm(of_seed("a", seed), lambda _: [1.0]) for seed in range(subject.seeds)]

    alike = counting([])
    same = run(alike, Subject(host, AMOUNTS, 2, tmp_path / "alike"))
    seeded = replace(alike, arms=drawing, claims=())
    drawn = run(seeded, Subject(host, AMOUNTS, 2, tmp_path / "drawn"))
    assert drawn is not None
    assert same is not None
    assert (drawn["seeds"], same["seeds"]) == (2, None)


@pytest.mark.parametrize(("size", "tries", "least"), [(5, 100, 91), (40, 60, 51)])
def test_an_interval_holds_the_mean_as_often_as_it_says(size: int, tries: int, least: int) -> None:
    """Plain percentiles of resamples hold the mean of five normal numbers in 84 of 100 cases."""
    source = np.random.default_rng(size)
    held = 0
    for _ in range(tries):
        values = source.normal(1.0, 1.0, size)
        estimate = resampled(lambda units, values=values: float(values[units].mean()), size)
        assert estimate.value == pytest.approx(values.mean())
        held += estimate.low <= 1.0 <= estimate.high
    assert least <= held <= tries


def test_pairing_takes_the_spread_of_units_away() -> None:
    units = np.random.default_rng(0).normal(0, 5, 12)
    values = {"full": list(units), "s0": list(units + 0.1), "s1": list(units + 0.3)}
    evidence = Evidence(values, 4, 2, {})
    paired = evidence.difference("s0", "full")
    assert (paired.low, paired.high) == pytest.approx((0.1, 0.1))
    seeds = evidence.difference(["s0", "s1"], "full")
    assert seeds.value == pytest.approx(0.2)
    assert seeds.high - seeds.value == pytest.approx(12.706 * 0.1, rel=0.05)  # t, one degree


def unlearnt(subject: Subject, label: str, recipe: Recipe) -> Path:
    """What `learnt` gives, but for the learning."""
    name = f"{label}-{recipe.seed}-{text_digest(recipe.yaml())[:12]}"
    return kept(subject, name, lambda into: train(recipe, into, only=()))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for all studies, as the command has it: they share what they train."""
    return tmp_path_factory.mktemp("studies")


@pytest.mark.parametrize("name", STUDIES)
def test_each_study_runs_at_tiny_size(
    name: str, host: str, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hop_learners, "learnt", unlearnt)  # test_hops.py and test_boards.py train
    study = study_of(name)
    assert study.name == name
    amounts = study.amounts["tiny"]
    if study.pretrained:
        subject = Subject(host, amounts, 2, place / name)
    else:
        subject = Subject("", {**amounts, **SHORT.get(name, HOPS)}, 1, place / name)
    result = run(study, subject)
    assert result is not None
    assert [claim["claim"] for claim in result["claims"]] == [c.text for c in study.claims]
    for claim in result["claims"]:
        assert claim["value"] is None or claim["low"] <= claim["high"]
        measured = ("reproduced", "refuted", "not decided at this size")
        assert claim["verdict"] in (measured if claim["value"] is not None else ("not measured",))
    assert all(len(row) == len(t["heading"]) for t in result["tables"] for row in t["rows"])
    assert set(study.amounts) == {"tiny", "real"}
    assert set(study.amounts["tiny"]) == set(study.amounts["real"]) == set(amounts)


def test_what_a_stack_has_no_layers_for_is_not_decided() -> None:
    """Of four layers none is inner; the claim says so, in the place of an error."""
    study = study_of("single-layers")
    names = ["full", *(f"{kind} {layer}" for kind in KINDS for layer in range(4))]
    values = {name: [3.0, 3.5, 2.5] for name in names}
    claims = [claim.json(Evidence(values, 4, 1, {})) for claim in study.claims]
    assert any(claim["value"] is None for claim in claims)


def test_the_command_lists_runs_and_refuses(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert command("study") == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in STUDIES)
    assert command("study", "single-layer") == 2
    assert "single-layers" in capsys.readouterr().err
    assert command("study", "single-layers", "--size", "huge") == 2
    small = replace(study_of("single-layers"), amounts={"tiny": AMOUNTS})
    monkeypatch.setattr("trol.studies.study_of", lambda name: small)
    words = ("study", "single-layers", "--size", "tiny", "--out", tmp_path, "--json")
    assert command(*words, "--shard", "0/2") == 0
    assert not json.loads(capsys.readouterr().out)["results"][0]["complete"]
    assert command(*words, "--shard", "1/2") == 0
    (result,) = json.loads(capsys.readouterr().out)["results"]
    page = (tmp_path / "single-layers" / "study.html").read_text()
    stored = json.loads((tmp_path / "single-layers" / "study.json").read_text())
    assert stored["claims"] == result["claims"]
    for claim in result["claims"]:
        assert claim["verdict"] in page
    assert "verdicts mean nothing" in page
    assert ">None<" not in page  # nothing is said of what a run has not, such as one seed


@pytest.mark.parametrize(
    ("pretrained", "model", "size", "said"),
    [
        (True, None, "tiny", "on a random model, size tiny\n  A random model knows nothing"),
        (True, "HOST", "tiny", "on HOST, size tiny\n  "),
        (False, None, "tiny", "on small models that it trains, size tiny\n  "),
        (False, "HOST", "real", "on HOST, size real\n  "),
    ],
)
def test_what_verdicts_were_found_on(
    pretrained: bool,
    model: str | None,
    size: str,
    said: str,
    host: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On the terminal and the page; a random model is said to be one, and no other."""
    claim = Claim("It is so", "somebody", "ones", "above", 0.5, lambda e: e.difference("a", "b"))
    arms = [Arm("a", lambda _: [1.0, 1.0]), Arm("b", lambda _: [0.0, 0.0])]
    small = replace(
        study_of("single-layers"),
        amounts={"tiny": {"layers": 2}, "real": {"layers": 2}},
        arms=lambda subject: arms,
        claims=(claim,),
        tables=lambda evidence: [],
        pretrained=pretrained,
    )
    monkeypatch.setattr("trol.studies.study_of", lambda name: small)
    named = [] if model is None else ["--model", host]
    assert command("study", "single-layers", "--size", size, *named, "--out", tmp_path) == 0
    shown = capsys.readouterr().out.replace(host, "HOST")
    page = (tmp_path / "single-layers" / "study.html").read_text().replace(host, "HOST")
    assert said in shown
    assert said.partition(", size")[0].removeprefix("on ") in page
    is_random = pretrained and model is None
    assert [("knows nothing" in text) for text in (shown, page)] == [is_random] * 2
