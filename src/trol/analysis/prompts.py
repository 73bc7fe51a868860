"""From one prompt's trace to its map: which rows belong to the picture, which to the words.

L layers, R visits at most, T tokens of the trace (the prompt first, answers after it).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from trol.analysis.maps import DepthMap, grid_of
from trol.errors import UsageError

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor


def map_of(
    visits: Tensor,
    weights: Tensor,
    input_ids: Tensor,
    *,
    picture: Image.Image,
    image_token: int,
    tokenizer: Any,
    title: str = "",
) -> DepthMap:
    """The map of one prompt with one picture.

    Shapes: visits [L, T], weights [L, R + 1, T] (the weight of each visit's output, of no visit
    first), input_ids [prompt tokens]. The gate of a token is the weight of its later visits.
    """
    tokens = input_ids.cpu().numpy()
    prompt = len(tokens)
    shares = weights[:, 2:].sum(1)[:, :prompt].float().cpu().numpy().clip(0, 1)
    times = visits[:, :prompt].cpu().numpy()
    of_picture = np.flatnonzero(tokens == image_token)
    if not len(of_picture):
        raise UsageError("the prompt holds no image token; give one picture with --image.")
    quiet = {image_token, tokenizer.pad_token_id}  # role marks are shown: they go twice as well
    of_words = [place for place, token in enumerate(tokens.tolist()) if token not in quiet]
    words = {place: str(tokenizer.decode([tokens[place]])).strip() for place in of_words}
    shown = [place for place, word in words.items() if word]
    return DepthMap(
        picture=picture,
        grid=grid_of(len(of_picture), picture.size),
        gates=shares[:, of_picture],
        visits=times[:, of_picture],
        words=[words[place] for place in shown],
        word_gates=shares[:, shown],
        title=title,
    )


def as_values(depth_map: DepthMap) -> dict[str, Any]:
    """`depth_map` as plain values, gates to four digits; one list per layer."""
    return {
        "layers": len(depth_map.gates),
        "gate_per_layer": depth_map.gates.mean(1).round(4).tolist(),
        "image": {
            "grid": list(depth_map.grid),
            "gates": depth_map.gates.round(4).tolist(),
            "visits": depth_map.visits.tolist(),
        },
        "words": {
            "text": list(depth_map.words),
            "gates": depth_map.word_gates.round(4).tolist(),
        },
    }
