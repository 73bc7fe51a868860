"""A host: one transformers family as a tiny, seeded, random float32 model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import cycle, islice
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
)

Inputs = dict[str, Tensor]
Side = Literal["left", "right"]

VOCABULARY = 99
"""Tokens. Id 0 pads; 3-89 are text; 90 and above are a VLM's image marks."""
TEXT_IDS = (3, 90)
PAD = 0

PER_TOKEN = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")
"""Inputs of shape [B, T]; every other input lists images, one or more to a row."""

OWN_RANGE = ("A_log", "dt_bias", ".D", "sinks")
"""Parameters whose range matters: they keep the family's initial values."""


@dataclass(frozen=True)
class Picture:
    """How a family takes one image: its marks in the text, its pixels, its extra inputs."""

    block: tuple[int, ...]
    """Token ids put into the text for one image, placeholders already expanded."""
    image_id: int
    """The placeholder's id."""
    shape: tuple[int, ...]
    """Shape of one row's `pixel_values`, row axis included."""
    extra: Mapping[str, tuple[tuple[int, ...], ...]] = field(default_factory=dict)
    """Further inputs per image, such as `image_grid_thw`."""
    types: str | None = None
    """Name of the input that holds 1 at placeholders and 0 elsewhere."""


@dataclass(frozen=True)
class Padded:
    """Rows of different length as one padded batch, and each of them alone."""

    batch: Inputs
    alone: tuple[Inputs, ...]


@dataclass(frozen=True)
class Host:
    """One family: how to build it, feed it, and what its bare model cannot do."""

    name: str
    model_type: str
    settings: Mapping[str, Any]
    """Flat config settings; of the decoder where the family is a VLM."""
    layer_types: tuple[str, ...] = ()
    """Kinds of layer, repeated down the stack; empty where the family knows one kind."""
    outer: Mapping[str, Any] = field(default_factory=dict)
    """A VLM's own settings, its vision tower's among them."""
    picture: Picture | None = None
    hybrid: bool = False
    """Some layers carry a recurrent state instead of, or beside, keys and values."""
    attns: tuple[str, ...] = ("eager", "sdpa")
    positions: bool = False
    """The bare forward reads a left-padded row rightly only with `position_ids`."""
    default_exact: float = 5e-5
    """Largest logit difference allowed between two ways to compute the same thing: some
    times what the bare host shows (logits have a standard deviation of 0.6 to 3)."""
    cannot: Mapping[str, str] = field(default_factory=dict)
    """What the bare model cannot do, with the reason; keys as in `checks.CHECKS`."""

    @property
    def kind(self) -> Literal["text", "vlm"]:
        return "vlm" if self.picture else "text"

    @property
    def eager_only(self) -> bool:
        return self.attns == ("eager",)

    def config(self, layers: int = 4) -> PreTrainedConfig:
        """The family's configuration with this many decoder layers."""
        text = dict(self.settings, num_hidden_layers=layers)
        if self.layer_types:
            text["layer_types"] = list(islice(cycle(self.layer_types), layers))
        if self.picture:
            return AutoConfig.for_model(self.model_type, text_config=text, **self.outer)
        return AutoConfig.for_model(self.model_type, **text)

    def build(self, attn: str | None = None, layers: int = 4, seed: int = 0) -> PreTrainedModel:
        """The model in eval mode, the same weights for the same seed and either attention."""
        auto = AutoModelForImageTextToText if self.picture else AutoModelForCausalLM
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = auto.from_config(
                self.config(layers), attn_implementation=attn or self.attns[-1], dtype=torch.float32
            )
        _randomise(model, seed)
        generation = model.generation_config
        generation.eos_token_id, generation.bos_token_id, generation.pad_token_id = None, None, PAD
        return model.eval()

    def inputs(self, batch: int = 1, length: int = 9, seed: int = 0) -> Inputs:
        """Rows of `length` text tokens each, and in a VLM one image's block within them."""
        return _stack([self._row(length, seed * 1000 + row) for row in range(batch)])

    def left_padded(self, lengths: Sequence[int] = (5, 9, 7), seed: int = 0) -> Padded:
        """Rows with these many text tokens, padded in front."""
        return self._padded(lengths, seed, "left")

    def right_padded(self, lengths: Sequence[int] = (5, 9, 7), seed: int = 0) -> Padded:
        """Rows with these many text tokens, padded behind."""
        return self._padded(lengths, seed, "right")

    def extend(self, inputs: Inputs, tokens: Tensor) -> Inputs:
        """The inputs with text tokens [B, N] behind them, as for a run without a cache."""
        longer = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
        longer |= {n: torch.zeros_like(tokens) for n in PER_TOKEN if n not in longer}
        out = {n: torch.cat([v, longer[n]], 1) if n in longer else v for n, v in inputs.items()}
        return _with_positions(out) if "position_ids" in inputs else out

    def _padded(self, lengths: Sequence[int], seed: int, side: Side) -> Padded:
        alone = tuple(self._row(n, seed * 1000 + row) for row, n in enumerate(lengths))
        longest = max(row["input_ids"].shape[1] for row in alone)
        batch = _stack([_pad(row, longest, side) for row in alone])
        return Padded(_with_positions(batch) if self.positions else batch, alone)

    def _row(self, length: int, seed: int) -> Inputs:
        source = torch.Generator().manual_seed(seed)
        text = torch.randint(*TEXT_IDS, (length,), generator=source)
        if self.picture is None:
            return _marked(text)
        middle = length // 2
        ids = torch.cat([text[:middle], torch.tensor(self.picture.block), text[middle:]])
        row = _marked(ids)
        row["pixel_values"] = torch.randn(self.picture.shape, generator=source)
        row |= {name: torch.tensor(value) for name, value in self.picture.extra.items()}
        if self.picture.types:
            row[self.picture.types] = (row["input_ids"] == self.picture.image_id).long()
        return row


def _marked(ids: Tensor) -> Inputs:
    return {"input_ids": ids[None], "attention_mask": torch.ones_like(ids)[None]}


def _pad(row: Inputs, longest: int, side: Side) -> Inputs:
    missing = longest - row["input_ids"].shape[1]
    room = (missing, 0) if side == "left" else (0, missing)
    return {
        name: torch.nn.functional.pad(value, room, value=PAD) if name in PER_TOKEN else value
        for name, value in row.items()
    }


def _stack(rows: Sequence[Inputs]) -> Inputs:
    return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}


def _with_positions(inputs: Inputs) -> Inputs:
    positions = (inputs["attention_mask"].cumsum(1) - 1).clamp_min(0)
    return inputs | {"position_ids": positions}


@torch.no_grad()
def _randomise(model: PreTrainedModel, seed: int) -> None:
    """Weights of unit gain and uneven norms and biases, so that every layer matters.

    Rows of the embedding and the head outside the text ids are zero: a logit of zero never
    wins, so no greedy run picks a padding token or an image mark, and a sampled one hardly ever.
    """
    source = torch.Generator().manual_seed(seed)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = embedding.weight is head.weight
    for name, weight in model.named_parameters():
        noise = torch.randn(weight.shape, generator=source)
        if name.endswith(OWN_RANGE):
            continue
        if weight is embedding.weight or weight is head.weight:
            weight.copy_((0.1 if tied else 0.5) * noise)
        elif weight.ndim == 1:
            weight.add_(0.2 * noise)
        else:
            weight.copy_(noise * 1.2 / weight[0].numel() ** 0.5)
    for table in (embedding, head):
        table.weight[: TEXT_IDS[0]] = 0
        table.weight[TEXT_IDS[1] :] = 0
