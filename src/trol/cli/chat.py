"""`trol chat`: talk with a model in the terminal, about pictures if it sees.

`Conversation` keeps the turns with one model; `trol map`, `trol eval` and `trol demo` use it too.
"""

from __future__ import annotations

import sys
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from trol.cli import models, terminal
from trol.cli.terminal import option
from trol.errors import DataError, TrolError, UsageError

if TYPE_CHECKING:
    from PIL import Image

    from trol.depth import PolicyLike

EXAMPLES = (
    'trol chat --image docs/board.png --question "which digit is on the yellow tile?"',
    'trol chat HuggingFaceTB/SmolLM2-135M --question "The sky is" --max-new-tokens 20',
    'trol chat --image docs/board.png --question "is there a 7?" --depth all --json',
)
COMPLETES = (
    "This model has no chat template: it goes on from what you type, each line for itself; "
    "--chat-template gives it one."
)
COMMANDS = "/image PATH  /depth PLAN (alone: the model's own)  /reset  /quit"


def chat(
    model: terminal.Model = terminal.DEFAULT_MODEL,
    *,
    image: Annotated[
        list[str] | None, option("--image", "PATH", "A picture to talk about.")
    ] = None,
    question: Annotated[str | None, option("--question", "TEXT", "Answer this and leave.")] = None,
    named: Annotated[str | None, option("--model", "MODEL", "The same as MODEL.")] = None,
    depth: terminal.Depth = None,
    bits: Annotated[int | None, option("--bits", "4|8", "Quantise the decoder's weights.")] = None,
    max_new_tokens: terminal.MaxNewTokens = 64,
    chat_template: terminal.ChatTemplate = None,
    as_json: terminal.AsJson = False,
) -> None:
    """Talk with MODEL, about pictures if it sees.

    A model without a chat template goes on from what is typed, each line for itself.
    """
    from trol.data.images import open_image

    if named is not None:
        if model != terminal.DEFAULT_MODEL:
            raise UsageError(f"two models are named, {model!r} and --model {named!r}; name one.")
        model = named
    if question is not None and not question.strip():
        raise UsageError("--question is empty; say what you want to know.")
    if as_json and question is None:
        raise UsageError("--json needs --question: a conversation is not one object.")
    pictures = [open_image(path) for path in image or []]  # a bad one before the model is opened
    conversation = open_conversation(
        model, max_new_tokens=max_new_tokens, plan=depth, bits=bits, chat_template=chat_template
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


def _converse(conversation: Conversation) -> None:
    """Reads questions and commands until the end of input; after an error it goes on."""
    is_person = sys.stdin.isatty()
    if is_person:
        terminal.note(f"Ask away. {COMMANDS}")
    while True:
        try:
            line = input("you: " if is_person else "").strip()
        except EOFError:
            return
        if line in {"/quit", "/exit"}:
            return
        try:
            _turn(conversation, line)
        except TrolError as error:
            terminal.note(f"trol: {error}")


def _turn(conversation: Conversation, line: str) -> None:
    """Obeys one line: a command, or a question to answer."""
    from trol.data.images import open_image

    if not line.startswith("/"):
        conversation.ask(line, stream=True)
        return
    command, _, rest = line.partition(" ")
    match command:
        case "/image" if rest.strip():
            conversation.show(open_image(rest.strip()))
        case "/depth":
            conversation.use_plan(rest.strip())
        case "/reset":
            conversation.reset()
        case _:
            raise UsageError(f"{line!r} is no command of this chat; there are: {COMMANDS}")


def open_conversation(
    name: str,
    *,
    max_new_tokens: int,
    plan: str | None,
    bits: int | None = None,
    chat_template: str | None = None,
) -> Conversation:
    """A conversation with the model called `name`, as `open_model` opens it.

    Raises:
        UsageError: `plan` is no plan and no plan file, or does not fit the model; or
            `chat_template` is no template and no file of one.
    """
    if plan is not None:
        if not plan.strip():
            raise UsageError("--depth is empty; give a plan such as '0-3:2 4-7', or leave it out.")
        models.policy_of(plan)  # refused before the model is opened
    with terminal.quiet_libraries():
        model, processor = models.open_model(name, bits=bits, chat_template=chat_template)
    conversation = Conversation(model, processor, max_new_tokens=max_new_tokens)
    conversation.use_plan(plan)
    return conversation


@dataclass(frozen=True)
class Answer:
    """One answer, and the prompt that it answers."""

    text: str
    input_ids: Any
    """The prompt's token ids. Shape: [T]."""
    new_tokens: int
    seconds: float


class Conversation:
    """Turns with one model; pictures shown between turns go with the next question."""

    def __init__(self, model: Any, processor: Any, *, max_new_tokens: int) -> None:
        self.model = model
        self.processor = processor
        self.max_new_tokens = max_new_tokens
        self.plan: str | None = None
        self.policy: PolicyLike | None = None
        self.messages: list[dict[str, Any]] = []
        self.pictures: list[Image.Image] = []

    @property
    def tokenizer(self) -> Any:
        """The processor's tokenizer; a text model's processor is its tokenizer."""
        return getattr(self.processor, "tokenizer", self.processor)

    @property
    def completes(self) -> bool:
        """Whether the model goes on from what is typed, because no template makes it a chat."""
        from trol.host.chat_templates import own_template

        return own_template(self.processor) is None

    def show(self, picture: Image.Image) -> None:
        """Put a picture before the next question."""
        if self.tokenizer is self.processor:
            raise UsageError("this model reads text only; leave the picture out.")
        if self.completes:
            raise UsageError(
                "this model has no chat template that says where a picture stands; give one with "
                "--chat-template, or leave the picture out."
            )
        self.pictures.append(picture)

    def use_plan(self, text: str | None) -> None:
        """Answer under a plan, its text or file, from now on (None: the model's own policy)."""
        before = self.plan, self.policy
        self.plan = models.policy_text(text) if text else None
        self.policy = models.policy_of(text) if text else None
        try:
            with self.depth():
                pass
        except TrolError:
            self.plan, self.policy = before
            raise

    def depth(self) -> AbstractContextManager[None]:
        """The chosen plan is in force while this is open, if one was chosen."""
        from trol.depth.attachment import depth

        return nullcontext() if self.policy is None else depth(self.model, self.policy)

    def reset(self) -> None:
        """Forget all turns and pictures."""
        self.messages.clear()
        self.pictures.clear()

    def ask(self, question: str, *, stream: bool = False) -> Answer:
        """The model's answer to `question`; a question that fails leaves no trace in the turns.

        Without a chat template the answer is how the text goes on, and no turn is kept.
        """
        if not question.strip():
            raise UsageError("the question is empty; say what you want to know.")
        if not question.isprintable() and any("\ud800" <= mark <= "\udfff" for mark in question):
            raise DataError("the question is not UTF-8 text; type it again.")
        if self.completes:
            return self._generate(self.tokenizer(question, return_tensors="pt"), stream=stream)
        pictures = [{"type": "image", "image": picture} for picture in self.pictures]
        content = [*pictures, {"type": "text", "text": question}]
        messages = [*self.messages, {"role": "user", "content": content}]
        answer = self._generate(self._encoded(messages), stream=stream)
        content = [{"type": "text", "text": answer.text}]
        self.messages = [*messages, {"role": "assistant", "content": content}]
        self.pictures.clear()
        return answer

    def _encoded(self, messages: list[dict[str, Any]]) -> Any:
        """The messages as model inputs, with the answer tokens marked as training marks them."""
        from trol.data.answers import Answers
        from trol.depth import is_attached

        inputs = Answers(self.processor).encoded([messages], prompt=True)
        inputs = inputs.convert_to_tensors("pt")
        if not is_attached(self.model):
            inputs.pop("assistant_masks", None)
        return inputs

    def _generate(self, inputs: Any, *, stream: bool) -> Answer:
        import torch
        from transformers import TextStreamer

        length = inputs["input_ids"].shape[1]
        self._check_length(length)
        inputs = inputs.to(self.model.device)
        streamer = None
        if stream:
            streamer = TextStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        started = time.perf_counter()
        with self.depth(), torch.inference_mode():
            tokens = self.model.generate(
                **inputs, max_new_tokens=self.max_new_tokens, do_sample=False, streamer=streamer
            )
        new = tokens[0, length:]
        text = self.tokenizer.decode(new, skip_special_tokens=True).strip()
        return Answer(text, inputs["input_ids"][0], len(new), time.perf_counter() - started)

    def _check_length(self, length: int) -> None:
        from trol.evaluation.tasks import positions_of

        most = positions_of(self.model)
        if most is not None and length + self.max_new_tokens > most:
            raise DataError(
                f"the {'text' if self.completes else 'conversation'} has {length} tokens and the "
                f"answer may take {self.max_new_tokens}, but the model has {most} positions; ask "
                "something shorter, start again with /reset, or lower --max-new-tokens."
            )
