"""`trol chat`: talk with a model in the terminal, about pictures if it sees."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from trol.cli import terminal
from trol.cli.conversation import DEFAULT_NEW_TOKENS, start
from trol.errors import TrolError, UsageError

if TYPE_CHECKING:
    from PIL.Image import Image

    from trol.cli.conversation import Conversation

EXAMPLES = (
    'trol chat --image docs/board.png --question "which digit is on the yellow tile?"',
    'trol chat HuggingFaceTB/SmolLM2-135M --question "The sky is" --max-new-tokens 20',
    'trol chat --image docs/board.png --question "is there a 7?" --depth all --json',
)
COMPLETES = (
    "This model has no chat template: it goes on from what you type, each line for itself; "
    "--chat-template gives it one."
)
HELP = "/image PATH  /depth PLAN (alone: the model's own)  /reset  /quit"


def chat(
    model: terminal.Model = terminal.DEFAULT_MODEL,
    *,
    image: Annotated[
        list[str] | None, typer.Option("--image", metavar="PATH", help="A picture to talk about.")
    ] = None,
    question: Annotated[
        str | None, typer.Option("--question", metavar="TEXT", help="Answer this and leave.")
    ] = None,
    named: Annotated[
        str | None, typer.Option("--model", metavar="MODEL", help="The same as MODEL.")
    ] = None,
    depth: terminal.Depth = None,
    bits: Annotated[
        int | None, typer.Option("--bits", metavar="4|8", help="Quantise the decoder's weights.")
    ] = None,
    max_new_tokens: terminal.MaxNewTokens = DEFAULT_NEW_TOKENS,
    chat_template: terminal.ChatTemplate = None,
    as_json: terminal.AsJson = False,
) -> None:
    """Talk with MODEL, about pictures if it sees.

    A model without a chat template goes on from what is typed, each line for itself.
    """
    if named is not None:
        if model != terminal.DEFAULT_MODEL:
            raise UsageError(f"two models are named, {model!r} and --model {named!r}; name one.")
        model = named
    if question is not None and not question.strip():
        raise UsageError("--question is empty; say what you want to know.")
    if as_json and question is None:
        raise UsageError("--json needs --question: a conversation is not one object.")
    pictures = _opened(image or [])
    conversation = start(
        model,
        max_new_tokens=max_new_tokens,
        plan=depth,
        bits=bits,
        chat_template=chat_template,
    )
    if conversation.completes:
        terminal.note(COMPLETES)
    for picture in pictures:
        conversation.show(picture)
    if question is None:
        _converse(conversation)
    elif as_json:
        _answer_once(conversation, model, question)
    else:
        conversation.ask(question, stream=True)


def _opened(paths: list[str]) -> list[Image]:
    """The pictures, so that a bad one is refused before the model is loaded."""
    from trol.data.images import open_image

    return [open_image(path) for path in paths]


def _answer_once(conversation: Conversation, model: str, question: str) -> None:
    with terminal.noise_to_stderr():
        answer = conversation.ask(question)
    result = {
        "model": model,
        "question": question,
        "answer": answer.text,
        "depth": conversation.plan,
        "prompt_tokens": len(answer.input_ids),
        "new_tokens": answer.new_tokens,
        "seconds": round(answer.seconds, 3),
    }
    terminal.report(result, as_json=True, text=str)


def _converse(conversation: Conversation) -> None:
    """Read questions and commands until the end of input; what fails is said, and it goes on."""
    person = sys.stdin.isatty()
    if person:
        terminal.note(f"Ask away. {HELP}")
    while True:
        try:
            line = input("you: " if person else "").strip()
        except EOFError:
            return
        if line in {"/quit", "/exit"}:
            return
        try:
            _turn(conversation, line)
        except TrolError as error:
            terminal.note(f"trol: {error}")


def _turn(conversation: Conversation, line: str) -> None:
    """One line of the person: a command, or a question to answer."""
    if not line.startswith("/"):
        conversation.ask(line, stream=True)
        return
    command, _, rest = line.partition(" ")
    match command:
        case "/image" if rest.strip():
            conversation.show(rest.strip())
        case "/depth":
            conversation.use_plan(rest.strip())
        case "/reset":
            conversation.reset()
        case _:
            raise UsageError(f"{line!r} is no command of this chat; there are: {HELP}")
