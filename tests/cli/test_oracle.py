"""`trol oracle`: from a saved model to a report, in one run or by shards, and what it refuses."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import trol
from cli import command
from training import standins
from trol.cli.oracle import _router_text
from trol.data.own_files import SPLITS
from trol.depth import attached
from trol.evaluation import tasks
from trol.evaluation.items import Item
from trol.evaluation.oracle import Batch
from trol.evaluation.store import read_header, read_rows
from trol.evaluation.tasks import Task

LAYERS = 4
MENU = ("--menu", "uniform:4")


run = partial(command.run, "oracle")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    return standins.llm(tmp_path_factory.mktemp("llama"), num_hidden_layers=LAYERS)


@pytest.fixture(autouse=True)
def few_questions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four short questions in the place of the library's docstrings."""
    pairs = list(zip(standins.ASKED, standins.ANSWERED, strict=True))
    asked = [Item(None, question, answer, "words") for question, answer in pairs]

    def items(count: int, seed: int, split: str = "test") -> list[Item]:
        del seed
        return asked[:1] if split == "validation" else asked[:count]

    metrics = ("rougeL", "exact", "loss")
    monkeypatch.setitem(tasks.TASKS, "docstrings", Task(items, metrics=metrics, new_tokens=5))


def test_one_run_leaves_a_report(
    llama: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(llama, *MENU, "--out", tmp_path / "o", "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert result["complete"]
    assert result["metric"] == "rougeL"
    assert [level["cost"] for level in result["menu"]] == [1, 2, 3, 4]
    assert 0 < result["equal_budget"]["share"] <= 1
    assert set(result["metrics"]) == {"rougeL", "exact", "loss"}
    assert result["controls"]["best_of_n"]["n"] == 4  # as many as levels
    assert result["run"]["command"]
    assert json.loads((tmp_path / "o" / "oracle.json").read_text()) == result
    rows = read_rows(tmp_path / "o")
    assert len(rows) == 4 * 4
    assert {row.plan for row in rows} == {level["plan"] for level in result["menu"]}
    assert read_header(tmp_path / "o")["layers"] == LAYERS


def test_shards_make_the_same_report_as_one_run(
    llama: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run(llama, *MENU, "--out", whole, "--json") == 0
    wanted = json.loads(capsys.readouterr().out)
    assert run(llama, *MENU, "--out", parts, "--shard", "0/2") == 0
    assert "Missing: --shard 1/2" in capsys.readouterr().out
    assert not (parts / "oracle.json").exists()
    assert run(llama, *MENU, "--out", parts, "--shard", "0/2", "--json") == 0
    assert json.loads(capsys.readouterr().out)["missing"] == ["1/2"]
    assert run(llama, *MENU, "--out", parts, "--shard", "1/2", "--json") == 0
    result = json.loads(capsys.readouterr().out)
    for key in ("equal_budget", "per_sequence", "mix"):
        assert result[key] == pytest.approx(wanted[key])


def test_an_interrupted_run_goes_on(
    llama: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answers, calls = Batch.answers, []

    def cut(self: Batch, *args: Any) -> Any:
        if len(calls) == 3:
            raise KeyboardInterrupt
        calls.append(args)
        return answers(self, *args)

    with monkeypatch.context() as patched:
        patched.setattr(Batch, "answers", cut)
        assert run(llama, *MENU, "--out", tmp_path) == 130
    assert "the same command goes on from there" in capsys.readouterr().err
    assert len(read_rows(tmp_path)) == 3 * 4
    assert run(llama, *MENU, "--out", tmp_path) == 0
    assert f"{tmp_path}/oracle.html" in capsys.readouterr().out


def test_plan_files_and_text_are_a_menu(
    llama: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = {"plan": "0-1", "visits": [1, 1, 0, 0]}
    (tmp_path / "half.json").write_text(json.dumps(plan))
    menu = f"all,0 3,{tmp_path / 'half.json'}"
    assert run(llama, "--menu", menu, "--samples", 0, "--out", tmp_path / "o", "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert [level["plan"] for level in result["menu"]] == ["0 3", "0-1", "0-3"]
    assert result["controls"]["best_of_n"] is None


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--menu", "0-1,0-2"), "add 'all' to --menu"),
        (("--menu", "all"), "one level"),
        (("--menu", "all,0-9"), "this stack has 4 layers"),
        (("--menu", "uniform:8"), "give 2 to 4"),
        (("--metric", "rouge2"), "no references for rouge2"),
        (("--metric", "rogueL"), "Did you mean 'rougeL'"),
        (("--task", "nothing"), "unknown task"),
        (("--questions", "1"), "2 or more"),
        (("--split", "validation"), "has 1 questions"),
        (("--split", "tset"), "Did you mean 'test'"),
        (("--shard", "2/2"), "such as 0/2"),
        (("--scope", "question"), "Known: all, answer"),
    ],
)
def test_bad_input_is_refused_with_the_cure(
    llama: str,
    tmp_path: Path,
    words: tuple[str, ...],
    said: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(llama, *MENU, *words, "--out", tmp_path / "o") == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


def test_a_folder_of_another_menu_is_refused(
    llama: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(llama, *MENU, "--out", tmp_path, "--shard", "0/2") == 0
    assert run(llama, "--menu", "exit:4", "--out", tmp_path, "--shard", "1/2") == 2
    assert "belongs to another oracle" in capsys.readouterr().err


def test_a_router_is_trained_on_the_rows(
    llama: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "router"
    assert run(llama, *MENU, "--out", tmp_path / "o", "--router", folder, "--json") == 0
    result = json.loads(capsys.readouterr().out)["router"]
    assert result["questions"] < 30
    words = _router_text(result)
    assert "Fewer than 30 questions: these figures say little" in words
    assert f"Learnt from the {result['split']} split of {result['task']}: measure it on" in words
    assert result["split"] == "test"
    assert "say little" not in _router_text({**result, "questions": 30})
    assert json.loads((folder / "router.json").read_text()) == result
    assert [at["cost"] for at in result["dials"]][-1] == LAYERS  # dial 1: the full model
    model = trol.load(trol.load_model(llama)[0], folder)
    policy = attached(model)[1].depth_policy
    assert [str(plan) for plan in policy.menu][-1] in ("all", "0-3")


def test_a_router_is_refused_where_questions_skip(llama: str, tmp_path: Path) -> None:
    words = (llama, *MENU, "--out", tmp_path / "o", "--router", tmp_path / "r", "--scope", "all")
    assert run(*words) == 2
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--after", 4), "after is 4, but this stack has 4 layers"),
        (("--after", 2), "does not visit each of the layers 0-1 once"),
        (("--menu", "0,all,0 1-3:2"), "'all', which comes last"),
        (("--router", "{out}"), "give the router its own folder"),
        (("--router", "{model}"), "which is no adapter of this command"),
    ],
)
def test_a_router_that_cannot_be_is_refused_before_any_answer(
    llama: str, tmp_path: Path, words: tuple, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "o"
    given = [str(word).format(out=out, model=llama) for word in words]
    assert run(llama, *MENU, "--router", tmp_path / "r", *given, "--out", out) == 2
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("split", SPLITS)
def test_plans_are_chosen_by_another_split_than_the_one_that_is_asked(
    split: str, llama: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = tasks.TASKS["docstrings"]
    drawn: list[str] = []

    def items(count: int, seed: int, split: str = "test") -> list[Item]:
        drawn.append(split)
        return task.items(count, seed)

    monkeypatch.setitem(tasks.TASKS, "docstrings", replace(task, items=items))
    words = ("--task", "docstrings", "--menu", "influence:2", "--questions", 3, "--samples", 0)
    assert run(llama, *words, "--scope", "all", "--split", split, "--out", tmp_path) == 0
    assert len(drawn) == len(set(drawn)) == 2
    assert split in drawn


def test_the_default_menu_is_chosen_by_influence_from_half_of_the_layers(
    llama: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--task", "docstrings", "--questions", 3, "--samples", 0, "--scope", "all")
    assert run(llama, *words, "--out", tmp_path, "--json") == 0
    menu = json.loads(capsys.readouterr().out)["menu"]
    assert [level["cost"] for level in menu] == [2, 3, 4]
    assert run(llama, *words, "--out", tmp_path, "--json") == 0  # the same menu again
    assert json.loads(capsys.readouterr().out)["menu"] == menu
