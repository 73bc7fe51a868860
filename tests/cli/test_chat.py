"""`trol chat`: one question, several turns, and what it refuses."""

import io
import json
from functools import partial
from pathlib import Path

import pytest

import trol
from cli.command import run
from trol.cli.chat import Conversation
from trol.data.images import open_image
from trol.errors import UsageError

pytestmark = pytest.mark.usefixtures("tiny_model")
QUESTION = "which digit is on the yellow tile?"


chat = partial(run, "chat", "--max-new-tokens", 3)


def test_one_question_as_json(board: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert chat("--image", board, "--question", QUESTION, "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert result["question"] == QUESTION
    assert 1 <= result["new_tokens"] <= 3
    assert result["prompt_tokens"] > 9


def test_the_stream_says_what_json_says(board: str, capsys: pytest.CaptureFixture[str]) -> None:
    chat("--image", board, "--question", QUESTION, "--json")
    answer = json.loads(capsys.readouterr().out)["answer"]
    assert chat("--image", board, "--question", QUESTION) == 0
    assert capsys.readouterr().out.strip() == answer


def test_turns_from_a_pipe(
    board: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What fails is said, and the conversation goes on."""
    lines = [f"/image {board}", QUESTION, "", "/nonsense", "/depth 0-9", "/depth all", "/reset"]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join([*lines, "is there a 7?", "/quit"])))
    assert chat() == 0
    captured = capsys.readouterr()
    said = [line for line in captured.err.splitlines() if line.startswith("trol: ")]
    assert len(said) == 3
    assert "question is empty" in said[0]
    assert "/nonsense" in said[1]
    assert "0-9" in said[2]


def test_a_plan_is_in_force_for_its_turns(board: str) -> None:
    conversation = Conversation(*trol.load_model("tiny"), max_new_tokens=2)
    conversation.show(open_image(board))
    seen = []
    for plan in (None, "all", "0-1:3 2"):
        conversation.use_plan(plan)
        with trol.trace(conversation.model) as trace:
            conversation.ask("is there a 7?")
        seen.append(trace.visits[:, 0, 0].tolist())
    assert seen == [[2, 2, 2, 2], [1, 1, 1, 1], [3, 3, 1, 0]]
    with pytest.raises(UsageError):
        conversation.use_plan("7")
    assert conversation.plan == "0-1:3 2"


def test_the_end_of_input_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert chat() == 0


def test_a_question_that_fails_is_forgotten(board: str) -> None:
    conversation = Conversation(*trol.load_model("tiny"), max_new_tokens=2)
    conversation.show(open_image(board))
    with pytest.raises(UsageError, match="empty"):
        conversation.ask("  ")
    assert conversation.messages == []
    assert len(conversation.pictures) == 1
    conversation.ask("is there a 7?")
    conversation.ask("how many red tiles are there?")
    assert [turn["role"] for turn in conversation.messages] == ["user", "assistant"] * 2
    assert conversation.pictures == []
    conversation.reset()
    assert conversation.messages == []


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["--question", " "], 2, "--question is empty"),
        (["--json"], 2, "--json needs --question"),
        (["--depth", "0-9", "--question", "x"], 2, "0-9"),
        (["--image", "absent.png", "--question", "x"], 1, "absent.png"),
        (["--image", "NO_PICTURE", "--question", "x"], 1, "not a picture"),
        (["--image", "TRUNCATED", "--question", "x"], 1, "truncated"),
    ],
)
def test_bad_input(
    words: list[str],
    code: int,
    says: str,
    board: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    no_picture, truncated = tmp_path / "notes.png", tmp_path / "half.png"
    no_picture.write_text("not a picture")
    truncated.write_bytes(Path(board).read_bytes()[:-200])
    paths = {"NO_PICTURE": str(no_picture), "TRUNCATED": str(truncated)}
    assert chat(*(paths.get(word, word) for word in words)) == code
    captured = capsys.readouterr()
    assert says in captured.err
    assert "Traceback" not in captured.err
    assert captured.out == ""
