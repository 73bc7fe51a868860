"""The toy tokenizer of the golden sets, whose rule each set states."""

from __future__ import annotations

import re
from typing import Any

from transformers import AddedToken, PreTrainedTokenizer

from .sets import GoldenSet, NotGolden

RULE = re.compile(
    r"longest special first at each position; any other character c -> "
    r"(\d+) \+ ord\(c\) % \(text_hi - \1\); left padding with pad_token_id"
)
"""How a set states the rule; the number is the first id that is no special token's."""


def toy_tokenizer(golden: GoldenSet) -> ToyTokenizer:
    """The tokenizer of a set; `NotGolden` where it states a rule of another kind."""
    facts = golden.facts["eval.tokenizer"]
    rule = RULE.fullmatch(facts["rule"])
    if rule is None:
        raise NotGolden(
            f"{golden.folder} states the tokenizer {facts['rule']!r}, which the checker does not "
            f"know; it knows {RULE.pattern!r}."
        )
    config = golden.config
    return ToyTokenizer(int(rule[1]), config["text_hi"], facts["specials"], config["pad_token_id"])


class ToyTokenizer(PreTrainedTokenizer):
    """Longest special token first; any other character c is f + ord(c) mod (text_hi - f)."""

    model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012 - as transformers has it

    def __init__(
        self, first: int, text_hi: int, specials: dict[str, int], pad_token_id: int, **_: Any
    ) -> None:
        self.first, self.text_hi = first, text_hi
        self.given: list[str] = []
        """The texts of the latest call."""
        known = {number: token for token, number in specials.items()}
        known.setdefault(pad_token_id, f"<pad {pad_token_id}>")
        super().__init__(
            added_tokens_decoder={i: _special(token) for i, token in known.items()},
            bos_token=_special("<s>") if "<s>" in specials else None,
            eos_token=_special("</s>") if "</s>" in specials else None,
            pad_token=_special(known[pad_token_id]),
            padding_side="left",
            clean_up_tokenization_spaces=False,
        )

    def __call__(self, text: Any, *args: Any, **kwargs: Any) -> Any:
        self.given = [text] if isinstance(text, str) else list(text)
        return super().__call__(text, *args, **kwargs)

    @property
    def vocab_size(self) -> int:
        return self.text_hi

    def get_vocab(self) -> dict[str, int]:
        return dict(self.added_tokens_encoder)

    def _tokenize(self, text: str, **kwargs: Any) -> list[str]:
        return list(text)

    def _convert_token_to_id(self, token: str) -> int | None:
        if len(token) != 1:  # a special token that this set does not have
            return None
        return self.first + ord(token) % (self.text_hi - self.first)

    def _convert_id_to_token(self, index: int) -> str:
        return chr(index)


def _special(token: str) -> AddedToken:
    return AddedToken(token, special=True, normalized=False)
