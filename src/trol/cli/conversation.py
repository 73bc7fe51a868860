"""`Conversation`: turns with one model; `trol chat`, `map`, `eval` and `demo` use it.

It imports torch and transformers, so verbs import it inside their functions.
"""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from transformers import TextStreamer

from trol.cli import models, terminal
from trol.depth import attached, depth, is_attached
from trol.depth.policy import AbstractPolicy, Plain, PolicyLike, StackBounds, resolve
from trol.errors import DataError, TrolError, UsageError
from trol.evaluation.hidden_states import layers_of
from trol.host.chat_templates import own_template

if TYPE_CHECKING:
    from PIL import Image


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
    ended: Literal["by itself", "longest", "interrupted"]
    """What ended it: the model, the most tokens that it may have, or Ctrl-C."""


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
        return own_template(self.processor) is None

    @property
    def sees(self) -> bool:
        """Whether the model can be shown pictures."""
        return self.tokenizer is not self.processor

    @property
    def layers(self) -> int:
        """How many layers the decoder has."""
        return layers_of(self.model)

    def check_sees(self) -> None:
        """Raises `UsageError` where the model cannot be shown a picture."""
        if not self.sees:
            raise UsageError("this model reads text only; leave the picture out.")
        if self.completes:
            raise UsageError(
                "this model has no chat template that says where a picture stands; give one with "
                "--chat-template, or leave the picture out."
            )

    def show(self, picture: Image.Image) -> None:
        """Put a picture before the next question."""
        self.check_sees()
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
        return nullcontext() if self.policy is None else depth(self.model, self.policy)

    def depth_in_words(self) -> str:
        """The depth in force, and how many layers a token visits under it."""
        own = attached(self.model)[1].depth_policy if is_attached(self.model) else Plain()
        visits = visits_in_words(own, self.layers)
        if self.policy is None:
            return f"the model's own ({own.name}); layer visits: {visits}"
        chosen = visits_in_words(resolve(self.policy), self.layers)
        return f"{self.plan}; layer visits: {chosen} (the model's own: {visits})"

    def reset(self) -> None:
        """Forget all turns and pictures."""
        self.messages.clear()
        self.pictures.clear()

    def ask(self, question: str, *, stream: bool = False) -> Answer:
        """The model's answer to `question`; a question that fails leaves no trace in the turns.

        Without a chat template the answer is how the text goes on, and no turn is kept. Ctrl-C
        ends an answer that is streamed; what was said until then is its turn.
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
        if answer.text or answer.ended != "interrupted":
            content = [{"type": "text", "text": answer.text}]
            self.messages = [*messages, {"role": "assistant", "content": content}]
            self.pictures.clear()
        return answer

    def _encoded(self, messages: list[dict[str, Any]]) -> Any:
        """The messages as model inputs, with the answer tokens marked as training marks them."""
        from trol.data.answers import Answers

        inputs = Answers(self.processor).encoded([messages], prompt=True)
        inputs = inputs.convert_to_tensors("pt")
        if not is_attached(self.model):
            inputs.pop("assistant_masks", None)
        return inputs

    def _generate(self, inputs: Any, *, stream: bool) -> Answer:
        length = inputs["input_ids"].shape[1]
        most = self._room(length)
        inputs = inputs.to(self.model.device)
        streamer = _Streamed(self.tokenizer) if stream else None
        started, ended = time.perf_counter(), None
        try:
            with self.depth(), torch.inference_mode():
                tokens = self.model.generate(
                    **inputs, max_new_tokens=most, do_sample=False, streamer=streamer
                )
            new = tokens[0, length:].tolist()
        except KeyboardInterrupt:
            if streamer is None:
                raise
            streamer.end()
            new, ended = streamer.ids, "interrupted"
        text = self.tokenizer.decode(new, skip_special_tokens=True).strip()
        if ended is None:
            ended = "by itself" if len(new) < most or self._is_end(new[-1]) else "longest"
        return Answer(text, inputs["input_ids"][0], len(new), time.perf_counter() - started, ended)

    def _is_end(self, token: int) -> bool:
        ends = self.model.generation_config.eos_token_id
        return token in (ends if isinstance(ends, list) else [ends])

    def _room(self, length: int) -> int:
        """The most tokens of an answer to a prompt of `length` tokens."""
        from trol.evaluation.items import positions_of

        most = positions_of(self.model)
        if most is None:
            return self.max_new_tokens
        if length >= most:
            raise DataError(
                f"the {'text' if self.completes else 'conversation'} has {length} tokens, but the "
                f"model has {most} positions, so there is no room for an answer; ask something "
                "shorter, or start again with /reset."
            )
        return min(self.max_new_tokens, most - length)


class _Streamed(TextStreamer):
    """Prints an answer as it grows, without blanks around it; keeps its ids for an interrupt."""

    def __init__(self, tokenizer: Any) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.ids: list[int] = []
        self._said, self._blanks = False, ""  # blanks wait for what comes after them

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        text = self._blanks + text if self._said else text.lstrip()
        kept = text.rstrip()
        self._said, self._blanks = self._said or bool(kept), text[len(kept) :]
        super().on_finalized_text(kept, stream_end)

    def put(self, value: torch.Tensor) -> None:
        if not self.next_tokens_are_prompt:
            self.ids += value.flatten().tolist()
        super().put(value)


def visits_in_words(policy: AbstractPolicy, layers: int) -> str:
    """How many layers a token visits under a policy, by role where roles differ."""
    bounds = StackBounds.of(policy, layers).layers
    least, most = sum(one.least for one in bounds), sum(one.most for one in bounds)
    count = f"{most}" if least == most else f"{least} to {most}"
    if policy.keep_first and policy.scope != "answer" and count != str(layers):
        which = "each token" if policy.scope == "all" else f"each token of the {policy.scope}"
        first = "the first" if policy.keep_first == 1 else f"the first {policy.keep_first}"
        return f"{count} for {which} after {first}, {layers} for others"
    if policy.scope == "all" or count == str(layers):
        return f"{count} for each token"
    return f"{count} for a token of the {policy.scope}, {layers} for others"
