"""Depth columns are what traces and clocks say; shared questions score as one process scores."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from torch.distributed.run import __file__ as torchrun

from trol import trace
from trol.depth import depth
from trol.evaluation import evaluate, sharing
from trol.evaluation.answers import answers, greedy
from trol.evaluation.depth_columns import TRACED, DepthColumns
from trol.evaluation.items import board_items, fitted_prompts
from trol.family.loading import load_model

KEYS = {"layer_visits_per_token", "flops_per_question", "prefill_ms", "decode_ms"}
KEYS |= {"questions", "tokens"}


@pytest.fixture(scope="module")
def opened() -> tuple[Any, Any]:
    return load_model("trol-tiny")


@pytest.mark.parametrize("plan", ["plain", "0-1:2", "1"])
def test_columns_are_what_a_trace_says(plan: str, opened: tuple[Any, Any]) -> None:
    model, processor = opened
    items = board_items(6, 0)
    inputs = fitted_prompts(model, processor, items, 4)
    columns = DepthColumns(model)
    with depth(model, plan):
        with trace(model) as seen:
            greedy(model, inputs, 4)
        answers(model, processor, items, new_tokens=4, around=columns.batch)
        columns.time(fitted_prompts(model, processor, items[:1], 4))
    found = columns.json()
    assert set(found) == KEYS
    assert found["layer_visits_per_token"] == seen.cost.layer_visits / int(seen.real.sum())
    assert found["flops_per_question"] == seen.cost.flops / 6
    assert (found["questions"], found["tokens"]) == (6, int(seen.real.sum()))
    assert found["prefill_ms"] > 0
    assert found["decode_ms"] > 0


def test_only_the_first_batches_are_traced(opened: tuple[Any, Any]) -> None:
    model, processor = opened
    columns = DepthColumns(model)
    items = board_items(TRACED + 10, 0)
    answers(model, processor, items, new_tokens=2, batch=TRACED - 4, around=columns.batch)
    assert columns.json()["questions"] == TRACED + 10  # whole batches, until there are as many
    answers(model, processor, items, new_tokens=2, around=columns.batch)
    assert columns.json()["questions"] == TRACED + 10


def test_columns_of_nothing_are_unknown(opened: tuple[Any, Any]) -> None:
    assert set(DepthColumns(opened[0]).json().values()) == {None, 0}


def test_each_task_has_its_columns(opened: tuple[Any, Any]) -> None:
    tasks = evaluate(*opened, ["boards", "docstrings"], questions=3)["tasks"]
    found = [task["depth_columns"] for task in tasks.values()]
    assert all(set(each) == KEYS and each["questions"] == 3 for each in found)
    assert found[0]["flops_per_question"] != found[1]["flops_per_question"]


@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("count", [1, 63, 64, 65, 200, 260])
def test_questions_are_dealt_in_whole_batches_and_come_back_in_order(
    count: int, processes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    items: list[Any] = list(range(count))
    parts: list[list[Any]] = []
    for number in range(processes):
        monkeypatch.setattr(sharing, "place", lambda number=number: (number, processes))
        parts.append(sharing.dealt(items))
    assert sorted(one for part in parts for one in part) == items
    whole = [items[at : at + 64] for at in range(0, count, 64)]
    for part in parts:
        batches = [part[at : at + 64] for at in range(0, len(part), 64)]
        assert all(batch in whole for batch in batches)

    def gather(out: list[Any], own: list[Any]) -> None:
        assert own in parts
        out[:] = parts

    monkeypatch.setattr(sharing.distributed, "all_gather_object", gather)
    for part in parts:
        assert sharing.gathered(part, count) == items


def test_two_processes_measure_what_one_measures() -> None:
    source = str(Path(__file__).parents[2] / "src")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": source}
    words = ["-m", "trol", "eval", "trol-tiny", "--tasks", "boards,docstrings"]
    words += ["--questions", "70", "--json"]
    starts = [[], [torchrun, "--standalone", "--nproc_per_node", "2"]]
    results = []
    for start in starts:
        command = [sys.executable, *start, *words]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        (line,) = done.stdout.splitlines()  # one process speaks
        results.append(json.loads(line)["tasks"])
    for task in results[0]:
        for each in results:
            del each[task]["depth_columns"]
        assert results[0][task] == results[1][task]
