"""The harnesses give trol's own accuracy on its questions, alone and on two processes.

They are heavy, so each test is skipped where its harness is not installed; see docs/harnesses.md.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants
from torch.distributed.run import __file__ as torchrun

from trol.evaluation import evaluate
from trol.evaluation.answers import losses
from trol.evaluation.items import Item, board_items, labelled
from trol.family.loading import load_model
from trol.harness.suite import _plain_yaml, published, run_suite, task_files

from .test_packages import installed

QUESTIONS = 90
TWO = [torchrun, "--standalone", "--nproc_per_node", "2"]

pytestmark = pytest.mark.filterwarnings("ignore")


def needs(harness: str) -> None:
    if not installed(harness):
        pytest.skip(f"{harness} is not installed: it is heavy, and no part of the dev extra")


@pytest.fixture(scope="module")
def opened() -> tuple[Any, Any]:
    return load_model("trol-tiny")


@pytest.fixture(scope="module")
def own(opened: tuple[Any, Any]) -> dict[str, float]:
    tasks = evaluate(*opened, ["boards", "docstrings"], questions=QUESTIONS)["tasks"]
    assert 0.5 < tasks["boards"]["accuracy"] < 1
    return {
        "boards": tasks["boards"]["accuracy"],
        "docstrings": tasks["docstrings"]["metrics"]["rougeL"],
    }


@pytest.mark.parametrize("start", [[], TWO], ids=["one", "two"])
@pytest.mark.parametrize("harness", ["lm-eval", "lmms-eval"])
def test_a_harness_gives_trols_own_accuracy(
    harness: str, start: list[str], own: dict[str, float], tmp_path: Path
) -> None:
    needs(harness)
    source = str(Path(__file__).parents[2] / "src")
    environment = {**os.environ, "PYTHONPATH": source, "XDG_CACHE_HOME": str(tmp_path)}
    environment |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    words = ["-m", "trol", "eval", "trol-tiny", "--harness", harness, "--json"]
    words += ["--tasks", "boards,docstrings", "--questions", str(QUESTIONS)]
    command = [sys.executable, *start, *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    (line,) = done.stdout.splitlines()
    result = json.loads(line)
    assert result["tasks"]["boards"] == {"metrics": {"exact": own["boards"]}, "n": QUESTIONS}
    found = result["tasks"]["docstrings"]["metrics"]["rougeL"]
    assert found == pytest.approx(own["docstrings"], abs=1e-12)
    assert all(value is not None for value in result["depth_columns"].values())


def test_continuations_are_answer_for_lm_eval(opened: tuple[Any, Any]) -> None:
    needs("lm-eval")
    from trol.harness.lm_eval import wrapped

    model, processor = opened
    items = [Item(None, f"is there a {n}?", "yes no yes", "t") for n in (7, 8)]
    items.append(Item(None, "how many tiles are there in the top left?", "red", "t"))
    batch = labelled(model, processor, items)
    requests = []
    for ids, labels, mask in zip(
        batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True
    ):
        row, words = ids[mask.bool()].tolist(), int((labels >= 0).sum())
        requests.append((None, row[:-words], row[-words:]))
    asked = wrapped(model, processor, batch_size=2)
    found = asked._loglikelihood_tokens(requests)
    for (total, _), one, loss in zip(found, requests, losses(model, processor, items), strict=True):
        assert total == pytest.approx(-loss * len(one[2]), rel=1e-5)
    assert asked.columns.json()["questions"] == 3
    # Under the mixer a question token visits twice and an answer token once.
    assert asked.columns.visits == sum(
        len(model.get_decoder().layers) * (2 * len(context) + len(words))
        for _, context, words in requests
    )


def test_arguments_that_nobody_knows_are_refused() -> None:
    needs("lm-eval")
    from trol.errors import TrolError
    from trol.harness.lm_eval import Trol

    with pytest.raises(TrolError, match="no_such_setting"):
        Trol.create_from_arg_string("pretrained=trol-tiny,no_such_setting=1")
    model = Trol.create_from_arg_string("pretrained=trol-tiny,depth=0-1", {"device": "cuda:0"})
    assert model.depth == "0-1"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's cache, with POPE on disk: yes and no questions about boards."""
    hub = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(hub))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return hub


def test_the_suite_asks_what_is_on_disk(opened: tuple[Any, Any], hub: Path) -> None:
    needs("lmms-eval")
    import datasets

    texts = {key: datasets.Value("string") for key in ("question_id", "question", "answer")}
    texts |= {key: datasets.Value("string") for key in ("image_source", "category")}
    items = [item for item in board_items(60, 0) if item.answer in ("yes", "no")][:12]
    rows = [
        {"question": item.question, "answer": item.answer, "image": item.picture}
        | {"question_id": str(at), "image_source": "x", "category": "random"}
        for at, item in enumerate(items)
    ]
    folder = hub / "datasets--lmms-lab-encoder--POPE" / "snapshots" / "abc" / "data"
    folder.mkdir(parents=True)
    table = datasets.Dataset.from_list(
        rows, features=datasets.Features({**texts, "image": datasets.Image()})
    )
    table.to_parquet(str(folder / "test-00000-of-00001.parquet"))
    sets = run_suite(*opened, name="trol-tiny")["sets"]
    (pope,) = [row for row in sets if row["state"] == "measured"]
    assert pope["name"] == "POPE"
    right = 12 * pope["value"] / 100
    assert right == pytest.approx(round(right))
    assert pope["difference"] == pytest.approx(pope["value"] - 88.6)
    assert pope["depth_columns"]["questions"] == 12


def test_each_set_is_asked_as_the_released_code_asks(hub: Path) -> None:
    needs("lmms-eval")
    for one in published().sets:
        if one.decided_by:
            continue
        (hub / f"datasets--{one.data.replace('/', '--')}" / "snapshots" / "abc").mkdir(parents=True)
        next(hub.glob("*/snapshots/abc")).joinpath("x.parquet").touch()
        for part in one.parts:
            content = _plain_yaml(task_files(one) / f"{part.task}.yaml")
            assert content["dataset_path"] == str(one.place)
            assert content["generation_kwargs"]["max_new_tokens"] == one.tokens
            assert content["generation_kwargs"]["num_beams"] == 5
            assert part.metric in {metric["metric"] for metric in content["metric_list"]}
            asked = content.get("lmms_eval_specific_kwargs", {}).get("default", {})
            assert asked.get("post_prompt", one.prompt).strip() == one.prompt
        shutil.rmtree(hub)


def test_a_chat_of_lmms_eval_is_text_and_pictures() -> None:
    needs("lmms-eval")
    from trol.errors import DataError
    from trol.harness.lmms_eval import hosts_turn, manifest, settings_of

    turn = {"role": "user", "content": [{"type": "image", "url": 1}, {"type": "text", "text": "a"}]}
    assert hosts_turn(turn)["content"][0] == {"type": "image", "image": 1}
    with pytest.raises(DataError, match="not video"):
        hosts_turn({"role": "user", "content": [{"type": "video", "url": 1}]})
    given = {"until": "x", "temperature": 0, "top_p": 1.0, "num_beams": 5, "max_new_tokens": 3}
    assert settings_of(given) == ((("num_beams", 5),), ("x",), 3)
    sampled = dict(settings_of({"do_sample": True, "temperature": 0.5})[0])
    assert sampled == {"do_sample": True, "temperature": 0.5}
    assert manifest().chat_class_path == "trol.harness.lmms_eval.TrolChat"
