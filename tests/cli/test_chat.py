"""`trol chat`: one question, several turns, a person at a terminal, and what it refuses."""

import io
import json
import os
import pty
import select
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

import trol
from cli.command import run
from trol.cli.chat import commands
from trol.cli.conversation import Conversation, _Streamed, visits_in_words
from trol.data.images import open_image
from trol.depth import attached
from trol.depth.attachment import gates_of
from trol.errors import UsageError
from trol.family.presets import byte_level_tokenizer, text_decoder

pytestmark = pytest.mark.usefixtures("tiny_model")
CHAT = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
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
    assert capsys.readouterr().out == f"{answer}\n"


@pytest.mark.parametrize("text", ["a b", " a\n\nb \n\n", "\n a", "a   ", " \n ", ""])
def test_a_stream_has_no_blanks_around_it(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Those inside stay, however the text is cut."""
    for cut in range(len(text) + 1):
        stream = _Streamed(None)
        for part in (text[:cut], text[cut:]):
            stream.on_finalized_text(part)
        stream.on_finalized_text("", stream_end=True)
        assert capsys.readouterr().out == f"{text.strip()}\n"


@pytest.mark.parametrize(
    ("template", "given", "most"),
    [(None, [], 64), (None, ["--max-new-tokens", 3], 3), (CHAT, [], 256)],
)
def test_completions_are_short_unless_asked_for(
    template: str | None,
    given: list[Any],
    most: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    conversation = reader(template, positions=512)
    conversation.model.generation_config.eos_token_id = None  # it never ends by itself
    opened = (conversation.model, conversation.tokenizer)
    monkeypatch.setitem(vars(trol), "load_model", lambda name: opened)
    assert run("chat", "--question", "Why?", "--json", *given) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["new_tokens"] == most
    assert (f"for {most} tokens at most" in captured.err) == (template is None)


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


def reader(template: str | None, *, positions: int = 256) -> Conversation:
    """A conversation with a tiny random model that reads text alone."""
    tokenizer = byte_level_tokenizer(["Why is the sky blue?"], 300)
    tokenizer.chat_template = template
    torch.manual_seed(0)
    config = text_decoder(tokenizer, hidden_size=32, layers=6, heads=2, positions=positions)
    return Conversation(LlamaForCausalLM(config).eval(), tokenizer, max_new_tokens=4)


def test_what_the_model_cannot_do_is_not_offered() -> None:
    seeing = Conversation(*trol.load_model("tiny"), max_new_tokens=2)
    reading = reader(CHAT)
    assert set(commands(seeing)) - set(commands(reading)) == {"/image PATH"}
    with pytest.raises(UsageError, match="reads text only"):
        reading.check_sees()
    example = commands(reading)["/depth PLAN"].split('"')[1]
    reading.use_plan(example)  # the plan that is named fits the model


@pytest.mark.parametrize(
    ("policy", "words"),
    [
        ("all", "6 for each token"),
        ("0-2 4:3", "6 for each token"),
        ("0-2 4", "4 for each token"),
        (trol.Planned("0-2 4", keep_first=1), "4 for each token after the first, 6 for others"),
        (trol.Planned("0-2 4", keep_first=3), "4 for each token after the first 3, 6 for others"),
        (
            trol.TrolMixer(keep_first=1),
            "12 for each token of the question after the first, 6 for others",
        ),
        (trol.TrolMixer(), "12 for a token of the question, 6 for others"),
        (trol.EarlyExit(first=2), "2 to 6 for a token of the answer, 6 for others"),
    ],
    ids=str,
)
def test_layer_visits_in_words(policy: Any, words: str) -> None:
    assert visits_in_words(trol.depth.policy.resolve(policy), 6) == words


def test_the_depth_may_change_between_turns() -> None:
    """The conversation goes on, and each turn is what a new one under its plan would answer."""
    conversation = reader(CHAT)
    for plan in (None, "0-2 4-5", None):
        conversation.use_plan(plan)
        assert (f"{plan};" if plan else "own (plain);") in conversation.depth_in_words()
        earlier = list(conversation.messages)
        answer = conversation.ask("Why?").text
        again = reader(CHAT)
        again.use_plan(plan)
        again.messages = earlier
        assert again.ask("Why?").text == answer
    assert len(conversation.messages) == 6


@pytest.mark.parametrize("said", [0, 3])
def test_an_interrupt_ends_the_answer_alone(said: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was said until then is the turn; nothing said, no turn."""
    conversation = reader(CHAT)
    ids = conversation.tokenizer("sky", add_special_tokens=False)["input_ids"]

    def interrupted(*, input_ids: torch.Tensor, streamer: Any, **_: Any) -> None:
        if streamer is not None:
            streamer.put(input_ids.cpu())
            for token in ids[:said]:
                streamer.put(torch.tensor([token]))
        raise KeyboardInterrupt

    monkeypatch.setattr(conversation.model, "generate", interrupted)
    answer = conversation.ask("Why?", stream=True)
    assert answer.ended == "interrupted"
    assert answer.text == ("sky" if said else "")
    assert len(conversation.messages) == (2 if said else 0)
    with pytest.raises(KeyboardInterrupt):
        conversation.ask("Why?")  # without a stream nobody saw a part of it


def test_an_answer_ends_where_the_positions_do() -> None:
    conversation = reader(None, positions=64)
    conversation.max_new_tokens = 1000
    answer = conversation.ask("Why is the sky blue? " * 5)
    assert (answer.ended, len(answer.input_ids) + answer.new_tokens) == ("longest", 64)
    with pytest.raises(trol.errors.DataError, match="64 positions, so there is no room"):
        conversation.ask("Why is the sky blue? " * 20)


@pytest.mark.parametrize(
    ("depth", "says"),
    [(None, "gates were never trained"), ("early_exit", "was not calibrated on this model")],
)
@pytest.mark.parametrize("way", ["--question", "stdin", "--json"])
@pytest.mark.filterwarnings("always::trol.errors.UntrainedWarning")
def test_a_warning_is_one_line_of_the_conversation(
    tiny_model: Any,
    depth: str | None,
    says: str,
    way: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for gate in gates_of(attached(tiny_model)[1]):
        gate.mark_untrained()
    monkeypatch.setattr("sys.stdin", io.StringIO("is there a 7?"))
    words = [] if way == "stdin" else ["--question", "is there a 7?"]
    words += ["--json"] if way == "--json" else []
    assert chat(*words, *([] if depth is None else ["--depth", depth])) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if says in line]
    assert said
    assert all(line.startswith("trol: ") for line in said)


PATIENCE, PRESSES, LEAVE = 15, 5, b"\x04"
Step = tuple[bytes, bytes | Callable[[int], None]]


def at_a_terminal(steps: list[Step]) -> tuple[str, int]:
    """All that `trol chat` writes on a terminal, and its exit code; each step waits for a text.

    After `PATIENCE` seconds of silence what was called last is called again, then Ctrl-D is
    pressed, since both are lost while a terminal changes its mode; in the end it is killed.
    """
    child, terminal = pty.fork()
    if child == 0:
        # A shell hands on to what it starts in the background that Ctrl-C is ignored.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
        os.execv(sys.executable, [sys.executable, "-m", "trol", "chat", "trol-tiny"])
    seen, place, pressed = b"", 0, list[int]()
    again: Callable[[int], None] | None = None
    try:
        for text, keys in [*steps, (b"\0", b"")]:
            while text not in seen[place:]:
                if not select.select([terminal], [], [], PATIENCE)[0]:
                    if again is not None:
                        again(child)
                        again = None
                        continue
                    pressed.append(os.write(terminal, LEAVE))
                    if len(pressed) > PRESSES:
                        os.kill(child, signal.SIGKILL)
                seen += os.read(terminal, 4096)
            place = seen.index(text, place) + len(text)
            again = keys if callable(keys) else None
            keys(child) if callable(keys) else os.write(terminal, keys)
    except OSError:  # the program has left
        pass
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    os.close(terminal)
    return seen.decode(), code


def interrupt(child: int) -> None:
    """Ctrl-C at the prompt, which is there once the last command has been obeyed."""
    time.sleep(1)
    os.kill(child, signal.SIGINT)


def test_a_person_at_a_terminal() -> None:
    prompt = b"you: "
    seen, code = at_a_terminal(
        [
            (prompt, b"is there a 7?\n"),
            (prompt, b"/depth all\n"),
            (prompt, b"is there a 5?\n"),
            (prompt, b"/depth\n"),
            (prompt, b"/help\n"),
            (prompt, b"/reset\n"),
            (prompt, interrupt),
            (prompt, LEAVE),
        ]
    )
    assert code == 0, seen
    assert "trol-tiny: 2 layers; depth: the model's own (trol_mixer); layer visits: 4" in seen
    assert "From now on: all; layer visits: 2 for each token (the model's own: 4" in seen
    assert "From now on: the model's own" in seen
    assert "/image PATH" in seen
    assert "Ctrl-D or /quit leaves." in seen
    assert "Traceback" not in seen
