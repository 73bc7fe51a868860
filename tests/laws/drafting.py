"""What the laws of speculation compare: everything that a greedy `generate` gives."""

from typing import Any

import torch

from hosts import Host
from trol.host.names import CACHE

from .subjects import attach_settled, gap, made

NEW = 10
"""Tokens of an answer."""


def settled(host: Host, name: str | None) -> Any:
    """The host with the policy of this name, or bare."""
    return attach_settled(host.build(), made(name)) if name else host.build()


def greedily(model: Any, inputs: Any, **settings: Any) -> Any:
    """Greedy `generate` with everything that it returns."""
    arguments = {"max_new_tokens": NEW, "do_sample": False, "return_dict_in_generate": True}
    arguments |= {"output_logits": True, "output_scores": True}
    return model.generate(**inputs, **arguments | settings)


def padded(host: Host) -> dict[str, Any]:
    """Three rows of different lengths; positions are left to `generate`."""
    batch = host.left_padded().batch
    return {name: value for name, value in batch.items() if name != "position_ids"}


def assert_equal(got: Any, wanted: Any, exact: float) -> None:
    """The same tokens, logits and scores, and a cache of the same length."""
    assert got.sequences.tolist() == wanted.sequences.tolist()
    for name in ("logits", "scores"):
        given, expected = (torch.stack(getattr(out, name), 1) for out in (got, wanted))
        finite = expected > -torch.inf
        assert gap(given[finite], expected[finite]) <= exact
    lengths = [int(out[CACHE].get_seq_length()) for out in (got, wanted)]
    assert lengths[0] == lengths[1]
