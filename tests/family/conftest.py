"""A tiny TroL with weights large enough for images and words to matter, and its processor."""

import pytest
import torch

from family.samples import TEXTS, enlarged
from trol.family import TrolForConditionalGeneration, tiny, tiny_processor


@pytest.fixture(scope="session")
def processor():
    return tiny_processor(TEXTS)


@pytest.fixture(scope="session")
def model(processor):
    torch.manual_seed(0)
    return enlarged(TrolForConditionalGeneration(tiny(len(processor.tokenizer))))


@pytest.fixture(scope="session")
def encode(processor):
    """Conversations to a model's inputs, as tensors with the generation prompt."""

    def run(conversations, side="left", **kwargs):
        return processor.apply_chat_template(
            conversations,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding_side": side},
            **kwargs,
        )

    return run
