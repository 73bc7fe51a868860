"""lmms-eval's model `trol`, which its entry point `lmms_eval.models` finds; chats alone."""
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from itertools import groupby
from typing import Any

from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest

from trol.errors import DataError, UsageError
from trol.evaluation.answers import answers
from trol.evaluation.depth_columns import DepthColumns
from trol.evaluation.items import BATCH, Item, fitted_prompts
from trol.evaluation.tasks import check_reads
from trol.harness.opening import in_depth, joined, opened

GENERATED = ("num_beams", "do_sample", "temperature", "top_p", "top_k", "length_penalty")
"""Settings of a task's generation that `generate` takes as they are."""

NEW_TOKENS = 1024
"""Longest answer where a task says nothing."""


def manifest() -> ModelManifest:
    """What the entry point gives."""
    return ModelManifest("trol", chat_class_path="trol.harness.lmms_eval.TrolChat")


class TrolChat(lmms):
    """A model that answers chats with pictures, batch by batch, as `trol eval` asks it.

    Args:
        pretrained: the model's name, or the model.
        processor: its processor, with a model.
        depth: a plan or a policy's name, if not the model's own.
        batch_size: questions answered at once.
        max_batch_size: taken and not used.
        settings: as `trol.harness.opening.opened` takes them.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: Any = "trol-tiny",
        processor: Any = None,
        *,
        depth: str | None = None,
        batch_size: int | str = BATCH,
        max_batch_size: Any = None,
        **settings: Any,
    ) -> None:
        super().__init__()
        del max_batch_size
        model = pretrained
        if processor is None:
            model, processor = opened(pretrained, depth=depth, **settings)
        # Not as a module of its own: lmms-eval takes those away before we are read.
        self.columns, self.reader, self.depth = DepthColumns(model), processor, depth
        self.size, self.device = int(batch_size), model.device
        accelerator = joined()
        if accelerator is not None:
            self.accelerator = accelerator
            self._rank, self._world_size = accelerator.process_index, accelerator.num_processes

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """The answers, in order; the first question is timed."""
        results: list[str] = []
        chats = [(settings_of(request.args[2]), self._item(request)) for request in requests]
        for settings, some in groupby(chats, key=lambda chat: chat[0]):
            results += self._answers([item for _, item in some], *settings)
        return results

    def _item(self, request: Any) -> Item:
        _, to_messages, _, place, task, split = request.args
        turns = tuple(hosts_turn(turn) for turn in to_messages(self.task_dict[task][split][place]))
        texts = [part["text"] for part in turns[-1]["content"] if part["type"] == "text"]
        item = Item(None, "".join(texts), "", task, turns=turns)
        check_reads(self.reader, task, [item])
        return item

    def _answers(self, items: list[Item], generated: Any, stops: Any, tokens: int) -> list[str]:
        model = self.columns.model
        with ExitStack() as stack:
            stack.enter_context(in_depth(model, self.depth))
            texts = answers(
                model,
                self.reader,
                items,
                new_tokens=tokens,
                batch=self.size,
                settings=dict(generated),
                around=self.columns.batch,
            )
            self.columns.time(fitted_prompts(model, self.reader, items[:1], tokens))
        for stop in stops:
            texts = [text.split(stop)[0] for text in texts]
        return texts

    def loglikelihood(self, requests: Any) -> Any:
        """Not there: lmms-eval asks chat models for answers alone."""
        raise UsageError("the model trol answers chats; choose a task that generates.")

    def generate_until_multi_round(self, requests: Any) -> Any:
        """Not there."""
        raise UsageError("the model trol answers one round; choose a task of one round.")


def settings_of(given: Mapping[str, Any]) -> tuple[tuple[tuple[str, Any], ...], Any, int]:
    """What `generate` takes of a task's settings, texts that end an answer, and its longest."""
    sampled = bool(given.get("do_sample"))
    chosen = {key: given[key] for key in GENERATED if given.get(key) is not None}
    if not sampled:
        chosen = {key: chosen[key] for key in ("num_beams", "length_penalty") if key in chosen}
    stops = given.get("until") or ()
    stops = (stops,) if isinstance(stops, str) else tuple(stops)
    return tuple(sorted(chosen.items())), stops, int(given.get("max_new_tokens", NEW_TOKENS))


def hosts_turn(turn: Mapping[str, Any]) -> dict[str, Any]:
    """A turn as transformers takes it.

    Raises:
        DataError: it has something other than text and pictures.
    """
    parts = []
    for part in turn["content"]:
        if part["type"] == "text":
            parts.append({"type": "text", "text": part["text"]})
        elif part["type"] == "image":
            parts.append({"type": "image", "image": part["url"]})
        else:
            raise DataError(f"trol reads text and pictures, not {part['type']}; leave it out.")
    return {"role": turn["role"], "content": parts}
