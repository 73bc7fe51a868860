"""What bare hosts cannot do on one release of transformers, and can on all others.

`test_zoo.py` holds each row to it: what is named here fails there, and nothing else does.
"""

from dataclasses import replace

import transformers
from transformers import cache_utils

from .host import Host

RELEASE = ".".join(transformers.__version__.split(".")[:2])
OLDEST = RELEASE == "5.16"

FP8 = hasattr(cache_utils, "Fp8QuantizedLayer")
"""Whether there is a cache that quantises without another library."""

SWITCHES_ROPE = not OLDEST
"""Whether transformers' own Phi-3 reads all tokens again where its RoPE switches: 5.16 drops the
cache there and goes on with the newest token alone."""

GRAPHS = 2 if OLDEST else 1
"""Graphs that `generate` compiles of a bare host: 5.16 compiles its prompt as well."""

IMAGES_WITHOUT_TORCHVISION = not OLDEST
"""Whether image processors of other families open without torchvision (from 5.18)."""

WHOLE_PROMPTS = {
    "chunked_prefill": "generate hands the pictures to the first chunk, whichever tokens it has"
}
HALF_CHANGED = {
    "early_exit_assistant": "the draft's cache has the layers of the whole configuration"
}

CANNOT: dict[str, dict[str, dict[str, str]]] = {
    "5.16": {
        **dict.fromkeys(("mistral", "qwen2", "qwen3", "gemma3"), HALF_CHANGED),
        **dict.fromkeys(
            ("llava", "idefics3", "smolvlm", "internvl", "qwen2_5_vl", "qwen3_vl"), WHOLE_PROMPTS
        ),
        "gemma3_vl": {"static_cache": "its masks are made for the whole length of the cache"},
    }
}
"""Release -> host -> check -> reason."""

CAN: dict[str, dict[str, tuple[str, ...]]] = {"5.16": {"gpt_oss": ("early_exit_assistant",)}}
"""What they can on one release alone."""

BARE_ONLY: dict[str, tuple[str, ...]] = {"gpt_oss": ("early_exit_assistant",)} if OLDEST else {}
"""What hosts can while no layer is skipped: 5.16's windows show too many keys while they record."""

EVERY_ATTENTION: tuple[str, ...] = ("gemma2",) if OLDEST else ()
"""Hosts that do not refuse the attention that they cannot run."""

SAME_VISITS_FOR_ALL_ROWS = {"falcon_h1": "each of its layers has a recurrent state"}
if OLDEST:
    SAME_VISITS_FOR_ALL_ROWS["qwen2_5_vl"] = "its rotary tables have three axes before the rows"
"""Hosts whose rows cannot have visits of their own."""


def here(host: Host) -> Host:
    """The host as it is on this transformers."""
    more = CANNOT.get(RELEASE, {}).get(host.name, {})
    fewer = CAN.get(RELEASE, {}).get(host.name, ())
    cannot = {check: why for check, why in host.cannot.items() if check not in fewer}
    return replace(host, cannot={**cannot, **more})
