"""`trol train any-llm` on what people have: stock templates, damaged rows, missing files."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from data.samples import lines, said
from training import standins
from trol.data import mixture as quarantine
from trol.data.check import check
from trol.data.mixture import open_mixture, read_mixture
from trol.errors import DataError, TrolError, UsageError
from trol.training import resolve, run
from trol.training.recipe import Recipe, Stage
from trol.training.stage_data import WARMUP, sized


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen3, the README's example host, with the template that it comes with."""
    folder = tmp_path_factory.mktemp("hosts") / "qwen3"
    standins.llm(folder, "qwen3", head_dim=16)
    trl = find_spec("trl")
    if trl is None:
        pytest.skip("TRL, which carries the template, is not installed")
    template = Path(str(trl.origin)).parent / "chat_templates" / "qwen3.jinja"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = template.read_text(encoding="utf-8")
    tokenizer.save_pretrained(folder)
    return folder


def recipe(host: Path, data: Path, *more: str) -> Recipe:
    steps = [
        f"stages.{stage}.{one}"
        for stage in ("step1", "step2")
        for one in (f"data={data}", "batch=4", "accumulate=2")
    ]
    settings = ["stages.step2.lora=2", "precision=fp32", "checkpointing=false"]
    return resolve("any-llm", [f"host={host}", *steps, *settings, *more])


def turns(turn: int) -> list[dict[str, str]]:
    pairs = zip(standins.ASKED * 2, standins.ANSWERED * 2, strict=True)
    question, answer = list(pairs)[turn]
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def two_turns(rows: int) -> list[Any]:
    return [{"messages": [*turns(row % 4), *turns(row % 4 + 1)]} for row in range(rows)]


def test_the_readmes_host_trains_on_two_turns(qwen3: Path, tmp_path: Path) -> None:
    data = lines(tmp_path / "chat.jsonl", two_turns(8))
    results = run(recipe(qwen3, data), tmp_path / "out")
    assert results["steps"] == 4
    written = json.loads((tmp_path / "out" / "training.json").read_text())
    assert written["stages"]["step1"] == {"steps": 2, "warmup_steps": 0, "left_out": 0}
    tokenizer = AutoTokenizer.from_pretrained(qwen3)
    assert not check(open_mixture(data), processor=tokenizer).damaged, "one door"


def test_damaged_rows_are_counted_and_the_run_goes_on(qwen3: Path, tmp_path: Path) -> None:
    rows = two_turns(8)
    rows[2] = said("\ud800 broken", "text")
    rows[5]["messages"][1]["tool_calls"] = [{"type": "function", "function": {"name": "look"}}]
    data = lines(tmp_path / "chat.jsonl", [json.dumps(row) for row in rows])
    with pytest.warns(UserWarning, match=r"left out chat\.jsonl, row \d: "):
        results = run(recipe(qwen3, data), tmp_path / "out")
    assert [one["left_out"] for one in results["stages"].values()] == [2, 2]
    assert {one.split(":")[0] for one in results["left_out"]["step1"]} == {
        "chat.jsonl, row 2",
        "chat.jsonl, row 5",
    }


def test_if_all_rows_are_left_out_one_line_says_why(qwen3: Path, tmp_path: Path) -> None:
    data = lines(tmp_path / "chat.jsonl", [said("what?", "a " * 600)] * 3)
    with (
        pytest.warns(UserWarning, match="left out"),
        pytest.raises(DataError, match=r"none of the 3 rows .*row \d: .*at most 512") as end,
    ):
        run(recipe(qwen3, data), tmp_path / "out")
    assert "\n" not in str(end.value)


@pytest.mark.parametrize(
    ("content", "error", "words"),
    [
        (None, UsageError, "there is no file"),
        ("", DataError, "has no rows"),
        ("\n\n", DataError, "has no rows"),
    ],
)
def test_missing_and_empty_files_are_refused_before_the_model_is_opened(
    content: str | None,
    error: type[TrolError],
    words: str,
    tmp_path: Path,
) -> None:
    data = tmp_path / "chat.jsonl"
    if content is not None:
        data.write_text(content)
    with pytest.raises(error, match=words):  # and not that there is no such host
        run(recipe(tmp_path / "no-host", data), tmp_path / "out")
    pairs = [f"stages.step1.data=alpaca:{tmp_path}/none.json"]
    with pytest.raises(TrolError, match=r"none\.json"):
        run(recipe(tmp_path / "no-host", data, *pairs), tmp_path / "out")


def test_a_quarantine_that_holds_all_rows_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    data = lines(tmp_path / "chat.jsonl", [said(" "), said("hi", "")])
    described = read_mixture(data)
    mixture = open_mixture(described)
    place = quarantine.quarantine_path(described)
    quarantine.write_quarantine(place, mixture.sizes(), check(mixture).damaged)
    assert place.is_relative_to(tmp_path / "cache"), "nothing lies beside the data"
    with pytest.raises(DataError, match=r"1 empty_question, 1 empty_answer, as .*quarantine"):
        run(recipe(tmp_path / "no-host", data), tmp_path / "out")
    beside = tmp_path / "chat.quarantine.jsonl"
    place.rename(beside)
    assert quarantine.quarantine_path(described) == beside, "who put one there wants it read"


@pytest.mark.parametrize(("steps", "warmup"), [(1, 0), (6, 1), (79, 19), (80, 20), (9000, 20)])
def test_the_warm_up_of_a_short_run_is_a_share_of_it(steps: int, warmup: int) -> None:
    stage = Stage(train=("mixers",), data="chat.jsonl", epochs=1, batch=2)
    resolved = sized(stage, range(2 * steps))
    assert (resolved.steps, resolved.warmup_steps) == (steps, warmup)
    assert resolved.warmup_steps <= WARMUP * steps
