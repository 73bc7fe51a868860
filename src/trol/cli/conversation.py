"""A conversation with a model: messages in, streamed answers out; or text that it goes on from."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Generator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trol.cli.models import plan_text
from trol.errors import DataError, TrolError, UsageError

if TYPE_CHECKING:
    from PIL import Image

DEFAULT_NEW_TOKENS = 64


@dataclass(frozen=True)
class Answer:
    """One answer and what it was made from."""

    text: str
    input_ids: Any
    """The prompt's token ids. Shape: [T]."""
    new_tokens: int
    seconds: float


class Conversation:
    """Turns with one model; pictures shown between turns go with the next question."""

    def __init__(
        self, model: Any, processor: Any, *, max_new_tokens: int = DEFAULT_NEW_TOKENS
    ) -> None:
        self.model = model
        self.processor = processor
        self.max_new_tokens = max_new_tokens
        self.plan: str | None = None
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

    def show(self, picture: str | Image.Image) -> None:
        """Put a picture, open or at a path, before the next question."""
        from trol.data.images import open_image

        if self.tokenizer is self.processor:
            raise UsageError("this model reads text only; leave the picture out.")
        if self.completes:
            raise UsageError(
                "this model has no chat template that says where a picture stands; give one with "
                "--chat-template, or leave the picture out."
            )
        self.pictures.append(open_image(picture))

    def use_plan(self, text: str | None) -> None:
        """Answer under a plan, its text or file, from now on (None: the model's own policy)."""
        before, self.plan = self.plan, plan_text(text) if text else None
        try:
            with self.depth():
                pass
        except TrolError:
            self.plan = before
            raise

    def reset(self) -> None:
        """Forget all turns and pictures."""
        self.messages.clear()
        self.pictures.clear()

    def ask(self, question: str, *, stream: bool = False) -> Answer:
        """The model's answer to `question`; a question that fails leaves no trace in the turns.

        Without a chat template it is how the text goes on, and no turn: each stands alone.
        """
        if not question.strip():
            raise UsageError("the question is empty; say what you want to know.")
        if not question.isprintable() and any("\ud800" <= mark <= "\udfff" for mark in question):
            raise DataError("the question is not UTF-8 text; type it again.")
        if self.completes:
            return self._generate(self.tokenizer(question, return_tensors="pt"), stream=stream)
        messages = [*self.messages, {"role": "user", "content": self._content(question)}]
        answer = self._generate(self._encoded(messages), stream=stream)
        self.messages = [*messages, {"role": "assistant", "content": _said(answer.text)}]
        self.pictures.clear()
        return answer

    @contextlib.contextmanager
    def depth(self) -> Generator[None]:
        """The chosen plan while open, if one was chosen."""
        from trol.depth.attachment import depth

        if self.plan is None:
            yield
            return
        with depth(self.model, self.plan):
            yield

    def _encoded(self, messages: list[dict[str, Any]]) -> Any:
        """The messages as model inputs, and who said what, found as training finds it."""
        from trol.data.answers import Answers
        from trol.depth import is_attached

        inputs = Answers(self.processor).encoded([messages], prompt=True)
        inputs = inputs.convert_to_tensors("pt")
        if not is_attached(self.model):
            inputs.pop("assistant_masks", None)
        return inputs

    def _check_length(self, length: int) -> None:
        from trol.evaluation.tasks import positions_of

        most = positions_of(self.model)
        if most is not None and length + self.max_new_tokens > most:
            what = "text" if self.completes else "conversation"
            raise DataError(
                f"the {what} has {length} tokens and the answer may take "
                f"{self.max_new_tokens}, but the model has {most} positions; ask something "
                "shorter, start again with /reset, or lower --max-new-tokens."
            )

    def _content(self, question: str) -> Any:
        pictures = [{"type": "image", "image": picture} for picture in self.pictures]
        return [*pictures, *_said(question)]

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
                **inputs,
                max_new_tokens=self.max_new_tokens,
                do_sample=False,
                streamer=streamer,
            )
        new = tokens[0, length:]
        text = self.tokenizer.decode(new, skip_special_tokens=True).strip()
        return Answer(text, inputs["input_ids"][0], len(new), time.perf_counter() - started)


def _said(text: str) -> list[dict[str, Any]]:
    return [{"type": "text", "text": text}]


def start(
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
    from trol.cli.models import open_model
    from trol.cli.terminal import no_library_bars, noise_to_stderr
    from trol.data.conversations import read_template

    if plan is not None:
        if not plan.strip():
            raise UsageError("--depth is empty; give a plan such as '0-3:2 4-7', or leave it out.")
        plan = plan_text(plan)
    template = None if chat_template is None else read_template(chat_template)
    no_library_bars()
    with noise_to_stderr():
        model, processor = open_model(name, bits=bits, chat_template=template)
    conversation = Conversation(model, processor, max_new_tokens=max_new_tokens)
    conversation.use_plan(plan)
    return conversation
