"""`trol plan` and `trol export`: from a saved model to a plan file to a shorter plain model."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer

import trol
from cli.command import run
from training import standins
from trol.checkpoints import export as exporting
from trol.cli.models import GivenPlan, given_plan, policy_of, read_plan, write_plan
from trol.data.own_files import Pair
from trol.data.pairs import BUILT_IN
from trol.depth import Plan
from trol.errors import DataError, UsageError
from trol.evaluation import draft_search as draft_plans
from trol.evaluation.answers import losses
from trol.evaluation.draft_search import MOST_TOKENS, Costs
from trol.evaluation.plan_search import plan_loss
from trol.evaluation.store import Measurements
from trol.evaluation.tasks import task_of
from trol.policies.planned import Planned

LAYERS = 4


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    return standins.llm(tmp_path_factory.mktemp("llama"), num_hidden_layers=LAYERS)


@pytest.fixture
def few_docstrings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Four pairs in the place of the library's; the splits that were asked for."""
    splits: list[str] = []

    def pairs(split: str, **_: Any) -> list[Pair]:
        splits.append(split)
        return [
            Pair(question, answer, "words")
            for question, answer in zip(standins.ASKED, standins.ANSWERED, strict=True)
        ]

    monkeypatch.setitem(BUILT_IN, "docstrings", pairs)
    return splits


def test_a_plan_is_printed_and_written(
    llama: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "made" / "plan.json"
    assert run("plan", llama, "--method", "exit", "--keep", 0.5, "--out", out) == 0
    text = capsys.readouterr().out
    assert text == f"0-1\n2 of {LAYERS} layers, written to {out}\n"
    written = json.loads(out.read_text())
    assert written["plan"] == "0-1"
    assert written["visits"] == [1, 1, 0, 0]
    assert (written["method"], written["keep"], written["model"]) == ("exit", 0.5, llama)
    assert written["run"]["seed"] == 0
    assert read_plan(str(out)) == Plan("exit@2")


@pytest.mark.parametrize("method", ["influence", "greedy"])
def test_a_plan_is_chosen_by_questions_of_the_validation_split(
    method: str,
    llama: str,
    tmp_path: Path,
    few_docstrings: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "plan.json"
    words = ("--keep", 0.5, "--questions", 4, "--scope", "all", "--out", out, "--json")
    assert run("plan", llama, "--method", method, *words) == 0
    result = json.loads(capsys.readouterr().out)
    assert result == {**json.loads(out.read_text()), "file": str(out)}
    assert sum(result["visits"]) == 2
    assert (result["task"], result["questions"], result["scope"]) == ("docstrings", 4, "all")
    assert few_docstrings == ["validation"]


@pytest.mark.parametrize(
    ("words", "cure"),
    [
        (("--keep", "0"), "give a number above 0 and at most 1"),
        (("--keep", "1.1"), "give a number above 0 and at most 1"),
        (("--keep", "0.5", "--method", "unifrom"), "Did you mean 'uniform'"),
        (("--keep", "0.5", "--scope", "answers"), "Did you mean 'answer'"),
        (("--keep", "0.5", "--out", "."), "name the file that the plan is to be in"),
        (("--keep", "0.5", "--method", "greedy", "--task", "docstring"), "Did you mean"),
    ],
)
def test_bad_usage(
    words: tuple[str, ...],
    cure: str,
    llama: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run("plan", llama, *words) == 2
    assert cure in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_pictures_for_a_model_that_reads_text_are_refused(
    llama: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--keep", 0.5, "--method", "influence", "--task", "boards", "--questions", 2)
    assert run("plan", llama, *words, "--out", tmp_path / "plan.json") == 1
    assert "reads text alone" in capsys.readouterr().err


def test_a_plan_file_is_read_back_whatever_the_plan(tmp_path: Path) -> None:
    for text in ("0 2-3:2", "all", "exit@0", "0-3"):
        path = tmp_path / "plan.json"
        result = write_plan(path, Plan(text), LAYERS, {"method": "by hand"})
        assert result["visits"] == list(Plan(text).for_layers(LAYERS))
        assert read_plan(str(path)).for_layers(LAYERS) == Plan(text).for_layers(LAYERS)
    assert read_plan("0-7:2 8-23") == Plan("0-7:2 8-23")


@pytest.mark.parametrize(
    ("content", "cure"),
    [
        (None, "there is no plan file"),
        ("{", "cannot be read as JSON"),
        ("[1, 0]", "no list of whole numbers 'visits'"),
        ('{"visits": [1, 0.5]}', "no list of whole numbers 'visits'"),
        ('{"visits": [1, 1, 0], "plan": "0-2"}', "but its visits are those of '0-1'"),
        ('{"visits": [1], "plan": "0", "keep_first": -1}', "plan.json is -1; give a whole"),
        ('{"visits": [1], "plan": "0", "keep_first": "1"}', "plan.json is '1'; give a whole"),
    ],
)
def test_what_is_no_plan_file(content: str | None, cure: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UsageError, match="plan") as caught:
        given_plan(str(path))
    assert cure in str(caught.value)


def test_a_plan_file_says_for_which_tokens_it_is(tmp_path: Path) -> None:
    """An old file has no keep_first, and plan text is for every token."""
    path, plan = tmp_path / "plan.json", Plan("0-1 3")
    for about, scope, first in (
        ({}, None, 0),
        ({"scope": "answer", "keep_first": 0}, "answer", 0),
        ({"scope": "all", "keep_first": 1}, "all", 1),
    ):
        write_plan(path, plan, LAYERS, about)
        assert given_plan(str(path)) == GivenPlan(plan, scope, first)
        assert policy_of(str(path)) == Planned(plan, scope=scope or "all", keep_first=first)  # type: ignore[arg-type]
    assert policy_of("0-1 3") == "0-1 3"
    assert given_plan("0-1 3") == GivenPlan(plan)


def test_a_depth_of_a_plan_file_is_for_its_tokens(
    llama: str, tmp_path: Path, few_docstrings: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """`trol eval --depth FILE` scores as the plan does for the tokens that the file names."""
    path, model = tmp_path / "plan.json", AutoModelForCausalLM.from_pretrained(llama)
    tokenizer = AutoTokenizer.from_pretrained(llama)
    items = task_of("docstrings").items(4, 0, "test")
    seen = set()
    for scope, first in (("all", 0), ("all", 1), ("answer", 0)):
        about = {"scope": scope, "keep_first": first}
        write_plan(path, Plan("0 3"), LAYERS, about)
        words = ("--tasks", "docstrings", "--metrics", "loss", "--depth", path, "--json")
        assert run("eval", llama, *words) == 0
        result = json.loads(capsys.readouterr().out)
        expected = plan_loss(model, tokenizer, items, Plan("0 3"), scope, keep_first=first)  # type: ignore[arg-type]
        loss = result["tasks"]["docstrings"]["metrics"]["loss"]
        assert loss == pytest.approx(expected, abs=1e-6)
        assert ("keep_first=1" in result["depth"]) == bool(first)
        seen.add(loss)
    assert len(seen) == 3


def test_an_export_is_never_silent_about_what_a_plan_costs(
    llama: str, tmp_path: Path, few_docstrings: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "plan.json"
    write_plan(path, Plan("0 3"), LAYERS, {"scope": "all", "keep_first": 1})
    assert run("export", llama, tmp_path / "a", "--plan", path) == 0
    output, notes = capsys.readouterr()
    assert "the first tokens visit every layer), and the checkpoint" in notes
    assert "of docstrings, nats per token: " in output
    assert "the plan for keep_first=1" in output
    assert "this checkpoint" in output
    assert run("export", llama, tmp_path / "b", "--plan", "0 3", "--unmeasured", "--json") == 0
    output, notes = capsys.readouterr()
    assert json.loads(output)["loss"] is None
    assert "was chosen for" not in notes
    words = ("--plan", "0 3", "--unmeasured", "--task", "docstrings")
    assert run("export", llama, tmp_path / "c", *words) == 2
    assert "leave one out" in capsys.readouterr().err


def test_a_plan_says_what_sparing_the_first_token_gives(
    llama: str, tmp_path: Path, few_docstrings: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "plan.json"
    words = ("--keep", 0.5, "--questions", 4, "--out", out, "--chat-template", "{{ messages }}")
    assert run("plan", llama, "--method", "middle", "--scope", "all", *words) == 0
    text, content = capsys.readouterr().out, json.loads(out.read_text())
    assert set(content["losses"]) == {"full", "keep_first=0", "keep_first=1"}
    best = min((0, 1), key=lambda first: content["losses"][f"keep_first={first}"])
    assert content["keep_first"] == best
    assert f"this plan, where {'the first token' if best else 'every token'}" in text
    assert f"{content['losses']['full']:.3f} the full model" in text


@torch.no_grad()
def test_an_export_opens_without_trol(
    llama: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan, short = tmp_path / "plan.json", tmp_path / "short"
    assert run("plan", llama, "--method", "uniform", "--keep", 0.75, "--out", plan) == 0
    capsys.readouterr()
    assert run("export", llama, short, "--plan", plan, "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert result["kept"] == [0, 2, 3]
    assert result["difference"] < 1e-6
    assert "trol" not in (short / "config.json").read_text()
    model, opened = (AutoModelForCausalLM.from_pretrained(folder) for folder in (llama, short))
    tokenizer = AutoTokenizer.from_pretrained(short)
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": standins.ASKED[0]}], return_tensors="pt", return_dict=True
    )
    assert len(opened.model.layers) == 3
    trol.attach(model, "0 2-3")
    assert torch.equal(opened(**inputs).logits, model(**inputs).logits)
    answers = [
        one.generate(**inputs, max_new_tokens=5, do_sample=False).tolist()
        for one in (opened, model)
    ]
    assert answers[0] == answers[1]


@torch.no_grad()
def test_a_model_that_sees_is_compared_with_a_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[set[str]] = []
    compared = exporting._compared

    def noted(*given: Any) -> float:
        seen.append(set(given[3]))
        return compared(*given)

    monkeypatch.setattr(exporting, "_compared", noted)
    host, short = standins.vlm(tmp_path / "vlm"), tmp_path / "short"
    assert run("export", host, short, "--plan", "1") == 0
    assert "layers '1' of 2 as 1 layers" in capsys.readouterr().out
    assert [("pixel_values" in names) for names in seen] == [False, True]
    opened = AutoModelForImageTextToText.from_pretrained(short)
    assert opened.config.text_config.num_hidden_layers == 1
    assert (short / "processor_config.json").is_file()


def test_a_shipped_model_needs_trol_and_is_not_exported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("export", "trol-tiny", tmp_path / "short", "--plan", "0-3") == 1
    assert "needs trol to open" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_destination_in_use_is_refused_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert run("export", "absent/model", tmp_path, "--plan", "0-3") == 2
    assert "exists and is not empty" in capsys.readouterr().err


def test_a_destination_that_cannot_be_made_is_refused_first(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run("export", "absent/model", "/proc/nope", "--plan", "0-3") == 2
    said = capsys.readouterr().err
    assert "cannot write into '/proc/nope'" in said
    assert "name a folder that can be made" in said


def test_a_folder_is_no_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in (tmp_path, tmp_path / "plan.json"):
        folder.mkdir(exist_ok=True)
        with pytest.raises(UsageError, match="is a folder, and a folder is no plan"):
            read_plan(str(folder))
    (tmp_path / "3").mkdir()
    monkeypatch.chdir(tmp_path)
    assert read_plan("3") == Plan("3")
    long = " ".join(f"{layer}:2" for layer in range(0, 200, 2))  # no name of a file is so long
    assert read_plan(long) == Plan(long)


@pytest.mark.parametrize("method", ["greedy", "draft", "influence"])
@pytest.mark.parametrize("after", [0, 1, 3])
def test_a_stopped_plan_goes_on_where_it_was(
    method: str,
    after: int,
    llama: str,
    tmp_path: Path,
    few_docstrings: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made: list[int] = []
    measuring = Measurements.value

    def stopped(self: Measurements, name: str, measure: Any) -> Any:
        def counted() -> Any:
            if len(made) == after:
                raise KeyboardInterrupt
            made.append(1)
            return measure()

        return measuring(self, name, counted)

    # The wall clock decides which drafts are hopeless.
    fixed = Costs(0.1, 0.1, dict.fromkeys(range(1, MOST_TOKENS + 1), 1.0))
    monkeypatch.setattr(draft_plans, "costs_of", lambda *_: fixed)
    words = ("plan", llama, "--method", method, "--keep", 0.5, "--questions", 4, "--out")
    assert run(*words, tmp_path / "whole.json") == 0
    capsys.readouterr()
    whole = (tmp_path / "whole.json").read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["whole.json"]
    out, kept = tmp_path / "plan.json", tmp_path / "plan.measured.jsonl"
    monkeypatch.setattr(Measurements, "value", stopped)
    code = run(*words, out)
    monkeypatch.setattr(Measurements, "value", measuring)
    if code == 0:  # it was through before
        assert (method, after) == ("influence", 3)
        return
    assert code == 130
    said = capsys.readouterr().err
    assert f"{method} makes {3 if method == 'influence' else ''}" in said
    assert f"Stopped. {kept} keeps {after} measurements" in said
    lines = kept.read_text().splitlines()
    assert len(lines) == 1 + after
    kept.write_text("\n".join(lines) + '\n{"torn')
    assert run(*words, out, "--seed", 1) == 2
    assert "unfinished run with other settings (seed 0 there, 1 here)" in capsys.readouterr().err
    assert kept.read_text().splitlines() == lines
    monkeypatch.setattr(Measurements, "value", again := Counted(measuring))
    assert run(*words, out) == 0
    monkeypatch.setattr(Measurements, "value", measuring)
    assert (f"{after} of them are in" in capsys.readouterr().err) == bool(after)
    assert not kept.exists()
    assert json.loads(out.read_text())["visits"] == json.loads(whole)["visits"]
    assert again.kept == after


class Counted:
    """Stands in for `Measurements.value`: how many values were there before."""

    def __init__(self, measuring: Any) -> None:
        self.measuring, self.kept = measuring, 0
        self.seen: set[str] = set()

    def __get__(self, instance: Measurements, _: type) -> Any:
        def value(name: str, measure: Any) -> Any:
            self.kept += name in instance.values and name not in self.seen
            self.seen.add(name)
            return self.measuring(instance, name, measure)

        return value


def test_no_file_of_measurements(tmp_path: Path) -> None:
    path = tmp_path / "kept.jsonl"
    for damage in ("{\n", "[1]\n", "\xff\n"):
        path.write_text(damage, encoding="latin-1")
        with pytest.raises(DataError, match="remove it"):
            Measurements(path, {"seed": 0})
    with pytest.raises(UsageError, match="name a folder that can be made"):
        Measurements(tmp_path / "absent" / "kept.jsonl", {})


@pytest.mark.parametrize("scope", ["answer", "question", "all", None])
def test_a_plan_says_for_whom_and_an_export_warns(
    scope: str | None,
    llama: str,
    tmp_path: Path,
    few_docstrings: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "plan.json"
    chosen = ("--method", "influence", "--scope", scope) if scope else ("--method", "middle")
    assert run("plan", llama, *chosen, "--keep", 0.5, "--questions", 4, "--out", out) == 0
    output = capsys.readouterr().out
    assert json.loads(out.read_text()).get("scope") == scope
    assert (f"chosen for scope={scope}: " in output) == (scope is not None)
    words = ("export", llama, tmp_path / "short", "--plan", out, "--task", "docstrings")
    assert run(*words, "--questions", 3, "--json") == 0
    output, notes = capsys.readouterr()
    assert (f"was chosen for scope={scope}" in notes) == (scope in ("answer", "question"))
    spares = json.loads(out.read_text())["keep_first"] > 0
    assert ("the checkpoint applies it to every token" in notes) == (
        scope in ("answer", "question") or spares
    )
    loss = json.loads(output)["loss"]
    full, short = AutoModelForCausalLM.from_pretrained(llama), tmp_path / "short"
    tokenizer = AutoTokenizer.from_pretrained(short)
    items = task_of("docstrings").items(3, 0, "test")
    for name, model in (
        ("full", full),
        ("all", AutoModelForCausalLM.from_pretrained(short)),
    ):
        each = losses(model, tokenizer, items)
        assert loss[name] == pytest.approx(sum(each) / len(each), abs=1e-6)
    assert set(loss) == {"task", "questions", "full", "chosen", "all"}
    first = json.loads(out.read_text())["keep_first"]
    assert (loss["chosen"] is None) == (scope in (None, "all") and not first)
    assert few_docstrings[-1] == "test"


def test_an_export_tells_what_the_plan_costs(
    llama: str, tmp_path: Path, few_docstrings: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("export", llama, tmp_path / "short", "--plan", "0-1", "--task", "docstrings")
    assert run(*words) == 0
    assert "Loss of 4 answers of docstrings, nats per token: " in capsys.readouterr().out
    assert run("export", "absent/model", tmp_path / "other", "--plan", "0", "--task", "no") == 2
