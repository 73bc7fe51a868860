"""`trol chat`: talk with a model in the terminal, about pictures if it sees."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

from trol.cli import terminal
from trol.cli.terminal import option
from trol.errors import TrolError, UsageError

if TYPE_CHECKING:
    from trol.cli.conversation import Answer, Conversation

EXAMPLES = (
    "trol chat smollm2",
    'trol chat smollm2 --question "Why is the sky blue?" --depth "0-13 15-29"',
    'trol chat --image docs/board.png --question "which digit is on the yellow tile?" --json',
)
COMPLETES = (
    "This model has no chat template: it goes on from what you type, each line for itself, for {} "
    "tokens at most; --max-new-tokens says how many, --chat-template gives it a template."
)
ANSWER, COMPLETION = 256, 64
"""Tokens of an answer at most, where nothing is said, and of a model without a chat template."""
TOKENS_HELP = f"Longest answer. Default: {ANSWER} tokens, without a chat template {COMPLETION}."


def chat(
    model: terminal.Model = terminal.DEFAULT_MODEL,
    *,
    image: Annotated[
        list[str] | None, option("--image", "PATH", "A picture to talk about, if MODEL sees.")
    ] = None,
    question: Annotated[str | None, option("--question", "TEXT", "Answer this and leave.")] = None,
    named: Annotated[str | None, option("--model", "MODEL", "The same as MODEL.")] = None,
    depth: terminal.Depth = None,
    bits: Annotated[int | None, option("--bits", "4|8", "Quantise the decoder's weights.")] = None,
    max_new_tokens: Annotated[
        int | None, option("--max-new-tokens", "N", TOKENS_HELP, min=1)
    ] = None,
    chat_template: terminal.ChatTemplate = None,
    as_json: terminal.AsJson = False,
) -> None:
    """Talk with MODEL, about pictures if it sees.

    Questions are read line by line until the end of input; in a terminal, /help lists what a
    conversation knows, such as another depth in the middle of it. A model without a chat template
    goes on from what is typed, each line for itself.
    """
    if named is not None:
        if model != terminal.DEFAULT_MODEL:
            raise UsageError(f"two models are named, {model!r} and --model {named!r}; name one.")
        model = named
    if question is not None and not question.strip():
        raise UsageError("--question is empty; say what you want to know.")
    if as_json and question is None:
        raise UsageError("--json needs --question: a conversation is not one object.")
    from trol.cli.conversation import open_conversation
    from trol.data.images import open_image

    pictures = [open_image(path) for path in image or []]  # a bad one before the model is opened
    conversation = open_conversation(
        model,
        max_new_tokens=max_new_tokens or ANSWER,
        plan=depth,
        bits=bits,
        chat_template=chat_template,
    )
    if conversation.completes:
        conversation.max_new_tokens = max_new_tokens or COMPLETION
        terminal.note(COMPLETES.format(conversation.max_new_tokens))
    for picture in pictures:
        conversation.show(picture)
    with terminal.short_warnings():
        if question is None:
            if sys.stdin.isatty():
                _greet(conversation, model)
            _converse(conversation, is_person=sys.stdin.isatty())
        elif as_json:
            _answer_once(conversation, model, question)
        elif conversation.ask(question, stream=True).ended == "interrupted":
            raise KeyboardInterrupt


def _answer_once(conversation: Conversation, model: str, question: str) -> None:
    with terminal.quiet_libraries():
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


def _greet(conversation: Conversation, model: str) -> None:
    """Says with whom a person talks, at which depth, and how to find out more."""
    import readline  # noqa: F401 - lines can be edited and called back where it is loaded

    terminal.note(f"{model}: {conversation.layers} layers; depth: {conversation.depth_in_words()}.")
    terminal.note("Ask away; /help lists commands, Ctrl-C ends an answer, Ctrl-D the conversation.")


def _converse(conversation: Conversation, *, is_person: bool) -> None:
    """Reads questions and commands until the end of input; after an error it goes on."""
    while True:
        try:
            line = input("you: " if is_person else "").strip()
        except EOFError:
            if is_person:
                terminal.note("")  # what follows begins a line of its own
            return
        except KeyboardInterrupt:
            if not is_person:
                raise
            terminal.note("\nCtrl-D or /quit leaves.")
            continue
        if line in {"/quit", "/exit"}:
            return
        if is_person and not line:
            continue
        try:
            _turn(conversation, line, is_person=is_person)
        except TrolError as error:
            terminal.note(f"trol: {error}")


def _turn(conversation: Conversation, line: str, *, is_person: bool) -> None:
    """Obeys one line: a command, or a question to answer."""
    from trol.data.images import open_image

    if not line.startswith("/"):
        _say_how_it_ended(conversation.ask(line, stream=True), is_person=is_person)
        return
    command, _, rest = line.partition(" ")
    match command:
        case "/image" if rest.strip():
            conversation.check_sees()
            conversation.show(open_image(rest.strip()))
        case "/depth":
            conversation.use_plan(rest.strip())
            if is_person:
                terminal.note(f"From now on: {conversation.depth_in_words()}.")
        case "/reset":
            conversation.reset()
            if is_person:
                terminal.note("All turns are forgotten; the depth stays.")
        case "/help":
            terminal.note(_help(conversation))
        case _:
            known = ", ".join(commands(conversation))
            raise UsageError(f"{line!r} is no command of this chat; there are: {known}.")


def commands(conversation: Conversation) -> dict[str, str]:
    """The commands of a conversation with this model, and what they do."""
    layers = conversation.layers
    plan = f"0-{layers // 2 - 1} {layers // 2 + 1}-{layers - 1}" if layers > 3 else "all"
    return {
        "/depth PLAN": f'answer under a plan from now on, such as "{plan}"',
        "/depth": "the model's own depth again",
        **({"/image PATH": "show a picture before the next question"} if conversation.sees else {}),
        "/reset": "forget all turns",
        "/help": "this list",
        "/quit": "leave, as Ctrl-D does; Ctrl-C ends an answer and not the conversation",
    }


def _help(conversation: Conversation) -> str:
    lines = [f"  {name:<13}{what}" for name, what in commands(conversation).items()]
    return "\n".join([*lines, f"Depth: {conversation.depth_in_words()}."])


def _say_how_it_ended(answer: Answer, *, is_person: bool) -> None:
    """A note where an answer did not end by itself; Ctrl-C in a pipe ends everything."""
    if answer.ended == "interrupted" and not is_person:
        raise KeyboardInterrupt
    if not is_person:
        return
    if answer.ended == "interrupted":
        terminal.note("(stopped; the conversation goes on)")
    elif answer.ended == "longest":
        terminal.note(f"(cut after {answer.new_tokens} tokens; --max-new-tokens N allows more)")
