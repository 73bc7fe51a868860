"""What a study measures: a model, the text that it reads, and under which policies."""

import warnings
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaForCausalLM

from trol.checkpoints.adapter import text_digest, weights_digest
from trol.data.own_files import SPLITS
from trol.data.topics import topic_text
from trol.depth import AbstractPolicy, Plan, attach, depth, detach, is_attached
from trol.errors import UntrainedWarning
from trol.evaluation.answers import losses
from trol.evaluation.hidden_states import layers_of
from trol.evaluation.items import Item
from trol.evaluation.tasks import questions_of
from trol.family.loading import load_model
from trol.family.presets import byte_level_tokenizer, text_decoder
from trol.policies.planned import Planned

TEXT = "pydoc"
"""The task whose windows are read."""

TINY = {"hidden_size": 32, "layers": 8, "heads": 2, "positions": 1024}
"""Sizes of the random decoder that a study can be tried on."""

TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"


class Subject:
    """A model without a policy, opened when it is first needed.

    Args:
        name: what opens it: a name, a folder or a hub name; empty where arms make their own.
        amounts: how much is measured, by name.
        seeds: of whatever is drawn.
        folder: where what takes long to make may be kept.
    """

    def __init__(self, name: str, amounts: Mapping[str, Any], seeds: int, folder: Path) -> None:
        self.name, self.amounts, self.seeds, self.folder = name, amounts, seeds, folder

    @cached_property
    def opened(self) -> tuple[Any, Any]:
        """The model in evaluation mode, without a policy, and its processor."""
        model, processor = load_model(self.name)
        if is_attached(model):
            detach(model)
        return model.eval(), processor

    @property
    def model(self) -> Any:
        """The model."""
        return self.opened[0]

    @property
    def processor(self) -> Any:
        """Its processor, or tokenizer."""
        return self.opened[1]

    @property
    def layers(self) -> int:
        """Layers of its decoder, or of those that arms make."""
        return layers_of(self.model) if self.name else self.amounts["layers"]

    def header(self) -> dict[str, Any]:
        """What measurements belong to: this model, this text, these amounts.

        Not the number of seeds: an arm of a seed names it, so more of them go on from fewer.
        """
        amounts = {"amounts": dict(self.amounts)}
        if not self.name:
            return {"weights": None, **amounts}
        text = {split: text_digest(topic_text(split)) for split in SPLITS}
        return {"weights": weights_digest(self.model), "text": text, **amounts}

    def windows(self, split: str = "test") -> list[Item]:
        """Windows of text: `test` judges, `validation` chooses; they share no topic."""
        count = self.amounts["windows" if split == "test" else "chosen_by"]
        window = self.amounts["window"]
        return questions_of(
            self.model, self.processor, TEXT, count, seed=0, split=split, window=window
        )

    def losses(self, policy: AbstractPolicy | str) -> list[float]:
        """Nats per token of each window that judges, under a policy without parameters."""
        with depth(self.model, policy):
            return rounded(losses(self.model, self.processor, self.windows()))

    def losses_attached(self, policy: AbstractPolicy, seed: int = 0) -> list[float]:
        """As `losses`, under a policy whose parameters are made with this seed."""
        with attached_for_a_while(self.model, policy, seed):
            return rounded(losses(self.model, self.processor, self.windows()))


@contextmanager
def attached_for_a_while(model: Any, policy: AbstractPolicy, seed: int = 0) -> Generator[None]:
    """Attaches a policy, its parameters made with this seed, to a model that has none.

    That they are not trained is what is studied, so there is no warning.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        attach(model, policy)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UntrainedWarning)
            yield
    finally:
        detach(model)


def rounded(values: list[float]) -> list[float]:
    """Numbers with five digits, more than any interval has."""
    return [round(value, 5) for value in values]


def planned(plan: Plan | str, *, keep_first: int = 0) -> Planned:
    """A plan for all tokens but the first `keep_first` of each window."""
    return Planned(plan, scope="all", keep_first=keep_first)


def leaving_out(gone: Any, layers: int) -> Plan:
    """The plan that visits all layers once but those `gone`."""
    gone = {gone} if isinstance(gone, int) else set(gone)
    return Plan([int(layer not in gone) for layer in range(layers)])


def twice(layer: int, layers: int) -> Plan:
    """The plan that visits one layer twice and all others once."""
    return Plan([1 + (one == layer) for one in range(layers)])


def make_tiny(folder: Path) -> Path:
    """A random decoder of a few layers that knows nothing, saved in `folder`: to try a study."""
    tokenizer = byte_level_tokenizer([topic_text("train")[:20_000]], 300)
    tokenizer.chat_template = TEMPLATE
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(text_decoder(tokenizer, **TINY))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
