"""What a bare host can do: each check compares two ways to compute the same thing.

A check returns the largest difference of the logits, or raises where the host cannot.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from trol.host.names import CACHE

from .host import Host, Inputs

NEW = 3
"""Tokens generated in a check."""

Check = Callable[[Host, PreTrainedModel], float]


def greedy(model: PreTrainedModel, inputs: Inputs, **settings) -> tuple[Tensor, Tensor]:
    """New tokens [B, N] of greedy `generate` with these settings, and their logits [B, N, V]."""
    settings = {"max_new_tokens": NEW, "do_sample": False} | settings
    out = model.generate(**inputs, **settings, output_logits=True, return_dict_in_generate=True)
    return out.sequences[:, inputs["input_ids"].shape[1] :], torch.stack(out.logits, 1)


def recomputed(host: Host, model: PreTrainedModel, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """The same from a plain loop: no cache, one whole forward for each new token."""
    tokens, steps = inputs["input_ids"][:, :0], []
    for _ in range(NEW):
        steps.append(model(**host.extend(inputs, tokens), use_cache=False).logits[:, -1])
        tokens = torch.cat([tokens, steps[-1].argmax(-1, keepdim=True)], 1)
    return tokens, torch.stack(steps, 1)


def generate(host: Host, model: PreTrainedModel) -> float:
    """Cached decoding is recomputation."""
    inputs = host.inputs()
    return _gap(greedy(model, inputs), recomputed(host, model, inputs))


def left_padding(host: Host, model: PreTrainedModel) -> float:
    """A left-padded batch decodes each row as if it were alone, and its plain forward agrees."""
    rows = host.left_padded()
    alone = [greedy(model, row) for row in rows.alone]
    alone_tokens, alone_logits = (torch.cat(parts) for parts in zip(*alone, strict=True))
    last = model(**rows.batch).logits[:, -1]
    return max(
        _gap(greedy(model, rows.batch), (alone_tokens, alone_logits)),
        _difference(last, alone_logits[:, 0]),
    )


def right_padding(host: Host, model: PreTrainedModel) -> float:
    """A right-padded batch gives each row the logits that it has alone."""
    rows = host.right_padded()
    batched = model(**rows.batch).logits
    alone = [model(**row).logits[0] for row in rows.alone]
    return max(_difference(batched[i, : len(one)], one) for i, one in enumerate(alone))


def chunks(host: Host, model: PreTrainedModel) -> float:
    """Forwards on one cache, the image in the first, then token by token, are one forward."""
    return _piecewise(host, model, masked=False)


def masked_chunks(host: Host, model: PreTrainedModel) -> float:
    """The same with the attention mask of the row so far passed to every forward."""
    return _piecewise(host, model, masked=True)


def causal(host: Host, model: PreTrainedModel) -> float:
    """Another last token leaves the earlier logits as they are."""
    inputs = host.inputs()
    ids = inputs["input_ids"].clone()
    ids[:, -1] = 3 + (ids[:, -1] - 2) % 80
    other = model(**inputs | {"input_ids": ids}).logits
    return _difference(model(**inputs).logits[:, :-1], other[:, :-1])


def chunked_prefill(host: Host, model: PreTrainedModel) -> float:
    """`generate` reads the prompt four tokens at a time; an image is cut in two."""
    inputs = host.inputs()
    return _gap(greedy(model, inputs, prefill_chunk_size=4), greedy(model, inputs))


def static_cache(host: Host, model: PreTrainedModel) -> float:
    inputs = host.inputs()
    static = greedy(model, inputs, cache_implementation="static", disable_compile=True)
    return _gap(static, greedy(model, inputs))


def assisted(host: Host, model: PreTrainedModel) -> float:
    """Drafts looked up in the prompt change nothing."""
    inputs = host.inputs()
    return _gap(greedy(model, inputs, prompt_lookup_num_tokens=2), greedy(model, inputs))


def early_exit_assistant(host: Host, model: PreTrainedModel) -> float:
    """Drafts from the model's own first two layers change nothing."""
    inputs = host.inputs()
    return _gap(greedy(model, inputs, assistant_early_exit=2), greedy(model, inputs))


def beams(host: Host, model: PreTrainedModel) -> float:
    """Beams reorder the cache rightly: without a cache, the beams are the same."""
    inputs = host.inputs()
    cached, _ = greedy(model, inputs, num_beams=2)
    plain, _ = greedy(model, inputs, num_beams=2, use_cache=False)
    assert torch.equal(cached, plain)
    return 0.0


CHECKS: dict[str, Check] = {
    check.__name__: check
    for check in (
        generate,
        left_padding,
        right_padding,
        chunks,
        masked_chunks,
        causal,
        chunked_prefill,
        static_cache,
        assisted,
        early_exit_assistant,
        beams,
    )
}


def _piecewise(host: Host, model: PreTrainedModel, *, masked: bool) -> float:
    inputs = host.inputs()
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    length = ids.shape[1]
    cut = length - 3
    cache = DynamicCache(config=model.config)
    first = {k: v[:, :cut] if v.shape == ids.shape else v for k, v in inputs.items()}
    parts = [model(**first, **{CACHE: cache}).logits]
    for end in range(cut + 1, length + 1):
        seen = {"attention_mask": mask[:, :end]} if masked else {}
        one = ids[:, end - 1 : end]
        parts.append(model(input_ids=one, **seen, **{CACHE: cache}).logits)
    return _difference(torch.cat(parts, 1), model(**inputs, use_cache=False).logits)


def _gap(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> float:
    assert torch.equal(a[0], b[0]), f"tokens {a[0].tolist()} are not {b[0].tolist()}"
    return _difference(a[1], b[1])


def _difference(a: Tensor, b: Tensor) -> float:
    return (a - b).abs().max().item()
