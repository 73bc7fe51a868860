"""lm-eval's model `trol`: its own classes, with trol's opening, roles, depth and depth columns.

lm-eval has no entry points, so something has to import this module: `trol eval --harness lm-eval`,
`python -m trol.harness lm_eval`, or one of trol's task files that is named by its path.
"""
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.hf_vlms import HFMultimodalLM
from lm_eval.models.huggingface import HFLM
from lm_eval.utils import simple_parse_args_string
from transformers import ProcessorMixin

from trol.depth.roles import IGNORED_LABEL
from trol.evaluation.answers import labelled_tokens
from trol.evaluation.depth_columns import DepthColumns
from trol.evaluation.items import BATCH, tokenizer_of
from trol.harness.local_tasks import exact, rouge  # noqa: F401 - task files name them here
from trol.harness.opening import in_depth, joined, opened
from trol.host.chat_templates import start_of

NO_CHOICE = ("cuda", "cuda:0")
"""Devices that lm-eval's command and its classes name where the user names none."""

Continuation = tuple[Any, list[int], list[int]]
"""A request, the ids of its context, and those of its continuation."""


class _Depth:
    """What both classes add to lm-eval's.

    Args:
        model: the model.
        processor: its processor; of a text decoder, its tokenizer.
        depth: a plan or a policy's name, if not the model's own.
        settings: as lm-eval's class takes them.
    """

    def __init__(
        self, model: Any, processor: Any, *, depth: str | None = None, **settings: Any
    ) -> None:
        self.reader, self.depth = processor, depth
        self.columns = DepthColumns(model)
        settings = {"batch_size": BATCH, **settings}
        super().__init__(model, backend="causal", **settings)  # type: ignore[call-arg]
        accelerator = joined()
        if accelerator is not None:  # lm-eval itself does this for two GPUs or more, and names
            self.accelerator = accelerator
            self._rank, self._world_size = accelerator.process_index, accelerator.num_processes

    def _create_tokenizer(self, pretrained: Any, tokenizer: Any = None, **_: Any) -> None:
        self.processor, self.tokenizer = self.reader, tokenizer_of(self.reader)

    @contextmanager
    def _answering(self, rows: int) -> Generator[None]:
        with in_depth(self.columns.model, self.depth), self.columns.batch(rows):
            yield

    def _model_generate(self, context: Any, *args: Any, **kwargs: Any) -> Any:
        with self._answering(len(context)):
            return super()._model_generate(context, *args, **kwargs)  # type: ignore[misc]

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        """The answers; the first question is timed.

        Requests with pictures and without are answered apart: lm-eval takes all for what the first
        one is.
        """
        answers: dict[int, str] = {}
        for shows in (False, True):
            places = [at for at, one in enumerate(requests) if (len(one.args) > 2) == shows]
            if places:
                some = [requests[at] for at in places]
                given = super().generate_until(some, disable_tqdm=disable_tqdm)  # type: ignore[misc]
                answers |= dict(zip(places, given, strict=True))
        for request in requests[:1]:
            with in_depth(self.columns.model, self.depth):
                self.columns.time(self._inputs(*request.args))
        return [answers[at] for at in range(len(requests))]

    def _inputs(self, context: str, _settings: Any, media: Any = None) -> Any:
        """One question as `generate` takes it."""
        if media is not None:
            return self.tok_batch_multimodal_encode([context], [media["visual"]])  # type: ignore[attr-defined]
        ids, mask = self.tok_batch_encode([context])  # type: ignore[attr-defined]
        return {"input_ids": ids.to(self.device), "attention_mask": mask.to(self.device)}  # type: ignore[attr-defined]

    def _loglikelihood_tokens(
        self,
        requests: Sequence[Continuation],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        """Log probability of each continuation, and whether it is the greedy one.

        lm-eval's own hands a model ids alone. Here continuations have the role answer, as they
        would have in `generate`.
        """
        size = override_bs or self.batch_size  # type: ignore[attr-defined]
        size = BATCH if size == "auto" else int(size)
        order = sorted(range(len(requests)), key=lambda at: -len(requests[at][1] + requests[at][2]))
        results: dict[int, tuple[float, bool]] = {}
        for start in range(0, len(order), size):
            places = order[start : start + size]
            some = [requests[at] for at in places]
            with self._answering(len(some)):
                read = labelled_tokens(self.columns.model, self._labelled(some))
            for row, at in enumerate(places):
                own = read.row == row
                results[at] = (
                    float(read.log_probability[own].sum()),
                    bool(read.likeliest[own].all()),
                )
                if requests[at][0] is not None:
                    self.cache_hook.add_partial("loglikelihood", requests[at][0], results[at])  # type: ignore[attr-defined]
        return [results[at] for at in range(len(requests))]

    def _labelled(self, requests: Iterable[Continuation]) -> dict[str, torch.Tensor]:
        """Contexts with continuations, cut on the left and padded on the right: [B, T]."""
        rows = [
            ((context + words)[-(self.max_length + 1) :], len(words))  # type: ignore[attr-defined]
            for _, context, words in requests
        ]
        shape = len(rows), max(len(ids) for ids, _ in rows)
        ids, mask = (torch.zeros(shape, dtype=torch.long) for _ in range(2))
        labels = torch.full(shape, IGNORED_LABEL)
        for at, (row, words) in enumerate(rows):
            ids[at, : len(row)], mask[at, : len(row)] = torch.tensor(row), 1
            labels[at, len(row) - words : len(row)] = ids[at, len(row) - words : len(row)]
        batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        return {name: each.to(self.columns.model.device) for name, each in batch.items()}


class TextModel(_Depth, HFLM):
    """A model that reads text alone."""


class SeeingModel(_Depth, HFMultimodalLM):
    """A model that is shown pictures, too."""

    def __init__(self, model: Any, processor: Any, **settings: Any) -> None:
        own = getattr(processor, "image_token", None)
        super().__init__(model, processor, image_string=own, **settings)

    def _model_multimodal_generate(self, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        with self._answering(len(inputs["input_ids"])):
            return super()._model_multimodal_generate(inputs, *args, **kwargs)

    def tok_batch_multimodal_encode(
        self, strings: list[str], images: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """As lm-eval does, but a template's begin token is not put there twice."""
        begin = self.tokenizer.bos_token
        if self.chat_applied and start_of(self.tokenizer):
            strings = [string.removeprefix(begin) for string in strings]
        return super().tok_batch_multimodal_encode(strings, images, *args, **kwargs)


def wrapped(model: Any, processor: Any, **settings: Any) -> HFLM:
    """An opened model as lm-eval takes it."""
    sees = isinstance(processor, ProcessorMixin)
    return (SeeingModel if sees else TextModel)(model, processor, **settings)


@register_model("trol")
class Trol(HFLM):
    """Makes the model that `--model trol --model_args pretrained=NAME,...` names."""

    @classmethod
    def create_from_arg_obj(cls, arg_dict: Any, additional_config: Any = None) -> Any:
        """The model of these arguments; `trol.harness.opening.opened` says which there are."""
        settings = {**arg_dict, **{k: v for k, v in (additional_config or {}).items() if v}}
        own = {
            key: settings.pop(key)
            for key in ("batch_size", "max_batch_size", "max_length", "depth")
            if key in settings
        }
        if settings.get("device") in NO_CHOICE:
            del settings["device"]
        model, processor = opened(
            settings.pop("pretrained", "trol-tiny"), depth=own.get("depth"), **settings
        )
        return wrapped(model, processor, **own)

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: Any = None) -> Any:
        """The same for arguments in one text."""
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)
