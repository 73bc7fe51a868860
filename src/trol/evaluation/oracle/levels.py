"""Answers of one batch of questions at every level; what the levels share is computed once.

With scope `answer`, the paper's, the prompt visits all layers at every level, so its keys and
values are the same for all: they are made once, and each level goes on from a copy. The last
token of the prompt, which predicts the first of the answer, is left to each level's `generate`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import LogitsProcessor

from trol.depth import Plan, depth
from trol.depth.planes import forked
from trol.evaluation.tasks import Item, fitted, prompts, tokenizer_of
from trol.host.cache import is_recurrent
from trol.host.names import CACHE
from trol.policies.planned import Planned

OracleScope = Literal["answer", "all"]

TEXT_ONLY = {"input_ids", "attention_mask"}
"""The inputs whose last column can be cut off, and nothing else changes."""

TEMPERATURE = 0.7
"""Of the answers drawn for the best-of-n control; usual where the best of several counts."""


@dataclass(frozen=True)
class Given:
    """One answer that the model gave."""

    text: str
    tokens: int
    """New tokens, the end among them."""


class Batch:
    """One batch of questions, ready to be answered at any level.

    Args:
        model: a transformers model, a policy attached or not.
        processor: its processor, or the tokenizer of a text model.
        items: the questions.
        scope: `answer`: the prompt visits every layer once; `all`: the plan holds for it as well.
        new_tokens: the most tokens of an answer.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        items: Sequence[Item],
        *,
        scope: OracleScope,
        new_tokens: int,
    ) -> None:
        self.model, self.new_tokens = model, new_tokens
        self.scope: OracleScope = scope
        self.tokenizer = tokenizer_of(processor)
        fitting = [fitted(model, processor, item, new_tokens) for item in items]
        self.inputs: dict[str, Tensor] = dict(prompts(processor, fitting).to(model.device))
        self._prefix: Any = self._shared_prefix() if self._may_share() else None

    def answers(self, plan: Plan, noise: LogitsProcessor | None = None) -> list[Given]:
        """What each question is answered at this level: greedily, or with `noise` on the logits."""
        settings = self._settings()
        if noise is not None:
            settings["logits_processor"] = [noise]
        if self._prefix is not None:
            settings[CACHE] = forked(self._prefix, planes=True)
        with depth(self.model, Planned(plan, scope=self.scope)), torch.inference_mode():
            tokens = self.model.generate(**self.inputs, **settings, max_new_tokens=self.new_tokens)
        new = tokens[:, self.inputs["input_ids"].shape[1] :]
        texts = self.tokenizer.batch_decode(new, skip_special_tokens=True)
        counts = _lengths(new, self._ends())
        return [Given(text.strip(), n) for text, n in zip(texts, counts, strict=True)]

    def _may_share(self) -> bool:
        if self.scope != "answer" or set(self.inputs) != TEXT_ONLY:
            return False
        # A row of one token would be nothing but padding without its last.
        return int(self.inputs["attention_mask"].sum(1).min()) > 1

    def _shared_prefix(self) -> Any:
        """The cache of all prompt tokens but the last, or None where it cannot be gone on from."""
        shorter = {name: values[:, :-1] for name, values in self.inputs.items()}
        with depth(self.model, "all"), torch.inference_mode():
            out = self.model.generate(
                **shorter, **self._settings(), max_new_tokens=1, return_dict_in_generate=True
            )
        cache = out[CACHE]
        # A recurrent state that began in one visit of a layer is not that of a second one.
        recurrent = any(is_recurrent(slot) for slot in cache.layers)
        return None if recurrent else cache

    def _settings(self) -> dict[str, Any]:
        padding = self.tokenizer.pad_token_id
        return {
            "do_sample": False,
            "num_beams": 1,
            "pad_token_id": 0 if padding is None else padding,
        }

    def _ends(self) -> list[int]:
        ends = self.model.generation_config.eos_token_id
        return [] if ends is None else [ends] if isinstance(ends, int) else list(ends)


class Noise(LogitsProcessor):
    """Gumbel noise by which a greedy choice draws from softmax(logits / temperature).

        argmax(logits / temperature - log(-log u)),   u uniform in (0, 1)

    Every row has its own stream of u, so that what is drawn for a question does not depend on
    the batch that it is asked in.

    Args:
        items: names of the rows' questions.
        sample: number of the draw.
        seed: of the whole run.
        temperature: of the distribution.
    """

    def __init__(
        self, items: Sequence[int], sample: int, seed: int, temperature: float = TEMPERATURE
    ) -> None:
        self.temperature = temperature
        self.sources = [
            torch.Generator().manual_seed(_stream(f"{seed}/{item}/{sample}")) for item in items
        ]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Noisy logits. Shape: [B, V], in and out."""
        del input_ids
        shape = scores.shape[1]
        drawn = torch.stack([torch.rand(shape, generator=one) for one in self.sources])
        # Kept off 0, whose logarithm is none.
        drawn = drawn.clamp_min(torch.finfo(drawn.dtype).tiny).to(scores.device)
        return scores.float() / self.temperature - torch.log(-torch.log(drawn))


def _stream(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big")


def _lengths(new: Tensor, ends: Sequence[int]) -> list[int]:
    """Tokens of each row up to its first end. Shape of `new`: [B, T]."""
    ended = torch.isin(new, torch.tensor(ends, dtype=new.dtype, device=new.device))
    before = ended.int().cumsum(1) - ended.int()  # ends before each token
    return (before == 0).sum(1).tolist()
