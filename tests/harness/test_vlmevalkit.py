"""The page's model for VLMEvalKit answers as trol does; stand-ins give the names it imports."""

import base64
import re
import sys
from io import BytesIO
from pathlib import Path
from types import ModuleType
from typing import Any

import pandas
import pytest
from PIL import Image

import trol
from trol.evaluation import evaluate
from trol.evaluation.answers import answers
from trol.evaluation.tasks import TASKS
from trol.harness.opening import in_depth

PAGE = (Path(__file__).parents[2] / "docs" / "harnesses.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```\w*\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
COUNT = 45


class BaseModel:
    """As VLMEvalKit's: a message is a list of parts, pictures by their path."""

    def generate(self, message: list[dict[str, str]], dataset: str) -> str:
        assert all(part["type"] in self.allowed_types for part in message)  # type: ignore[attr-defined]
        return self.generate_inner(message, dataset)  # type: ignore[attr-defined]


def block(with_text: str) -> str:
    (found,) = [code for code in BLOCKS if with_text in code]
    return found


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The names of the page's file; only what it itself registers is in VLMEvalKit's lists."""
    models: dict[str, Any] = {}
    sets: list[Any] = []
    names: dict[str, dict[str, Any]] = {
        "vlmeval": {},
        "vlmeval.config": {"supported_VLM": models},
        "vlmeval.dataset": {"DATASET_CLASSES": sets, "CustomVQADataset": object},
        "vlmeval.smp": {"load": lambda path: pandas.read_csv(path, sep="\t")},
        "vlmeval.vlm": {},
        "vlmeval.vlm.base": {"BaseModel": BaseModel},
    }
    for name, content in names.items():
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr("atexit.register", lambda said: said)
    exec(compile(block("class Trol("), "vlmeval_trol.py", "exec"), {"__name__": "vlmeval_trol"})
    return {"models": models, "sets": sets}


@pytest.mark.parametrize("depth", [None, "plain"])
def test_the_pages_model_and_mark_give_trols_own_figure(
    depth: str | None, recipe: dict[str, Any], tmp_path: Path
) -> None:
    model = recipe["models"]["trol-tiny"](depth=depth)
    items = TASKS["boards"].items(COUNT, 0)
    said = []
    for number, item in enumerate(items):
        assert item.picture is not None
        path = tmp_path / f"{number}.png"
        item.picture.save(path)
        message = [
            {"type": "image", "value": str(path)},
            {"type": "text", "value": item.question},
        ]
        said.append(model.generate(message, "boards"))
    opened, processor = trol.load_model("trol-tiny")
    with in_depth(opened, depth):
        assert said == answers(opened, processor, items, new_tokens=4)
        own = evaluate(opened, processor, ["boards"], questions=COUNT)["tasks"]["boards"]
    columns = model.columns.json()
    assert columns["questions"] == COUNT
    assert (columns["layer_visits_per_token"] == 2) == (depth == "plain")
    rows = [
        {"answer": i.answer, "type": i.type, "question": i.question, "prediction": text}
        for i, text in zip(items, said, strict=True)
    ]
    pandas.DataFrame(rows).to_csv(tmp_path / "said.tsv", sep="\t", index=False)
    (boards,) = (one for one in recipe["sets"] if one.supported_datasets() == ["boards"])
    assert boards().evaluate(str(tmp_path / "said.tsv")) == {"exact": own["accuracy"]}
    assert 0 < own["accuracy"] < 1


def test_the_pages_table_holds_the_questions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(block("boards.tsv"), "boards", "exec"), {})
    table = pandas.read_csv("boards.tsv", sep="\t").astype(str)
    assert table["index"].is_unique
    items = TASKS["boards"].items(len(table), 0)
    columns = table[["question", "answer", "type"]].to_numpy().tolist()
    assert columns == [[item.question, item.answer, item.type] for item in items]
    for item, coded in zip(items, table["image"], strict=True):
        picture = Image.open(BytesIO(base64.b64decode(coded))).convert("RGB")
        assert item.picture is not None
        assert picture.tobytes() == item.picture.tobytes()
