"""Low-rank updates (LoRA) in place of the decoder's own matrices."""

from __future__ import annotations

from typing import Any

from peft import LoraConfig, get_peft_model


def low_rank(model: Any, rank: int) -> Any:
    """The model with updates of rank `rank` on every linear map of its decoder's layers.

        W x + (alpha / rank) B A x, with alpha = rank

    TroL, section 4(c): rank and alpha are 64. The policy's own parameters get no update: they
    learn whole, as the projector does.
    """
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=r".*language_model\..*\.layers\.\d+\.(?!depth).*proj"
        if _nests(model)
        else r".*language_model\.layers\.\d+\.(?!depth).*proj",
    )
    return get_peft_model(model, config)


def _nests(model: Any) -> bool:
    """Whether the decoder's layers lie one level deeper, as OPT's do."""
    return model.model.language_model is not model.get_decoder()
