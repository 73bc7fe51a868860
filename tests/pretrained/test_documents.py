"""No line of the README and the docs gives a broken answer on a real model.

Python blocks that generate, and command lines and examples of verbs that name it, as they stand.
"""

from __future__ import annotations

import functools
import io
import json
import shlex
import sys
import threading
from importlib import import_module
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GenerationMixin

import trol
from cli.command import run
from test_documents import DOCUMENTS, commands, python_blocks
from trol.cli import VERBS
from trol.family.pretrained import ON_HUB
from trol.host.names import CACHE

pytestmark = pytest.mark.pretrained

(NAME,) = ON_HUB
"""What the pages call the model."""

WORSE = 4.0
"""How much less the plain model may expect the words of an answer than those of its own."""

Answer = tuple[Tensor, int]
"""Prompt and answer [1, T], and the length of the prompt."""


def is_broken(plain: Any, answer: Answer) -> bool:
    """Whether the plain model would not have written an answer, or it repeats itself.

    That is: its perplexity, as the plain model reads it, is over `WORSE` times that of the plain
    model's own answer of this length; or it has less than half as many different tokens.
    """
    tokens, prompt = answer
    new = tokens[0, prompt:]
    own = plain.generate(
        tokens[:, :prompt], attention_mask=torch.ones(1, prompt), max_new_tokens=len(new)
    )
    repeats = len(set(new.tolist())) < len(set(own[0, prompt:].tolist())) / 2
    return repeats or _perplexity(plain, tokens, prompt) > WORSE * _perplexity(plain, own, prompt)


def _perplexity(plain: Any, tokens: Tensor, prompt: int) -> float:
    with torch.no_grad():
        chances = plain(tokens).logits[0, prompt - 1 : -1].log_softmax(-1)
    return float(chances.gather(1, tokens[0, prompt:, None]).mean().neg().exp())


@pytest.fixture(scope="module")
def plain(smollm2: Path) -> Any:
    return trol.load_model(smollm2)


class Answers(list[Answer]):
    """What `generate` gave, of any model and in any thread; not what it asked of itself."""

    running: threading.RLock
    """Held while it runs."""


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> Answers:
    given, bare, inside = Answers(), GenerationMixin.generate, []
    given.running = threading.RLock()

    @functools.wraps(bare)
    def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
        with given.running:
            inside.append(self)
            try:
                tokens = bare(self, *args, **kwargs)
            finally:
                inside.pop()
            if not inside:
                asked = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
                given.append((tokens, asked.shape[1]))
        return tokens

    monkeypatch.setattr(GenerationMixin, "generate", generate)
    return given


def generating(path: Path) -> bool:
    blocks = "\n".join(python_blocks(path))
    return "model.generate" in blocks and "BK-Lee/" not in blocks


@pytest.mark.parametrize(
    "path", [path for path in DOCUMENTS if generating(path)], ids=lambda path: path.name
)
def test_python_blocks_answer_well(
    path: Path,
    smollm2: Path,
    plain: Any,
    answers: Answers,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    load = trol.load_model
    monkeypatch.setattr(
        trol, "load_model", lambda name, **given: load(smollm2 if name == NAME else name, **given)
    )
    monkeypatch.setattr(torch, "compile", lambda model, **_: model)
    model, tokenizer = load(smollm2)
    trol.attach(model, "0-11 12-13:2 14-29")  # as tests/test_documents.py does
    inputs = tokenizer("The sky is blue because", return_tensors="pt")
    given = {"model": model, "tokenizer": tokenizer, "inputs": inputs, "folder": smollm2}
    for code in python_blocks(path):
        exec(compile(code.replace("cache=cache", f"{CACHE}=cache"), str(path), "exec"), given)
    with answers.running:  # a block may end before its thread does
        assert answers
    monkeypatch.undo()
    for answer in answers:
        text = tokenizer.decode(answer[0][0, answer[1] :])
        assert not is_broken(plain[0], answer), f"{path.name}: {text!r}"


@pytest.mark.parametrize(
    "plan", ["0-21", "0-5:2 6-21 exit@22", "0-19 28-29", trol.EarlyExit("margin", 0.2)], ids=str
)
def test_broken_answers_are_told(plan: Any, plain: Any) -> None:
    """Plans and exits whose answers nobody would call one."""
    model, tokenizer = plain
    asked = tokenizer("The sky is blue because", return_tensors="pt")
    prompt = asked["input_ids"].shape[1]
    with trol.depth(model, plan):
        tokens = model.generate(**asked, max_new_tokens=20)
    assert is_broken(model, (tokens, prompt))
    assert not is_broken(model, (model.generate(**asked, max_new_tokens=20), prompt))


NOT_RUN = {"study"}
"""Verbs whose lines take an hour; they run at tiny size in tests/studies."""

LINES = {
    *(line for path in DOCUMENTS for line in commands(path)),
    *(line for home in VERBS.values() for line in import_module(home.split(":")[0]).EXAMPLES),
}
FEW = {
    "chat": "",
    "info": "",
    "eval": "--questions 1",
    "plan": "--questions 1 --keep 0.97",
    "curve": "--questions 1 --seeds 1 --keep 0.97",
    "export": "--questions 1",
    "calibrate": "--questions 12 --quality 0.5 --confidence 0.5",
}
"""Verb that the pages show with this model -> words that make it end soon."""


@pytest.mark.parametrize(
    "line",
    sorted(
        line for line in LINES if NAME in shlex.split(line) and shlex.split(line)[1] not in NOT_RUN
    ),
)
def test_commands_answer_well(
    line: str,
    smollm2: Path,
    plain: Any,
    answers: Answers,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, topic in (("notes.txt", "subscriptions"), ("README.md", "class")):
        Path(name).write_text(topics[topic])
    turns = [{"role": "user", "content": "What is the capital of Spain?"}]
    turns.append({"role": "assistant", "content": "The capital of Spain is Madrid."})
    Path("chat.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    monkeypatch.setattr(sys, "stdin", io.StringIO("What is the capital of France?\n"))
    words = [str(smollm2) if word == NAME else word for word in shlex.split(line)[1:]]
    assert run(*words, *FEW[words[0]].split()) == 0
    for answer in list(answers) if words[0] == "chat" else ():  # judging makes more of them
        assert not is_broken(plain[0], answer), capfd.readouterr().out
    if words[0] == "eval":
        _measures_well(words, capfd)


def _measures_well(words: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    """What the pages measure at another depth is no noise beside the model's own depth."""
    if "--depth" not in words:
        return
    capfd.readouterr()
    losses = []
    at = words.index("--depth")
    for depth in (words[at : at + 2], []):
        assert run(*words[:at], *words[at + 2 :], *depth, "--json", *FEW["eval"].split()) == 0
        tasks = json.loads(capfd.readouterr().out)["tasks"]
        losses.append([task["metrics"]["loss"] for task in tasks.values()])
    for other, own in zip(*losses, strict=True):
        assert other - own < torch.tensor(WORSE).log()
