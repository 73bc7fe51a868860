"""Four and eight bits: only the decoder's own linear maps, read one by one; saved and opened."""

import logging
import weakref

import pytest
import torch
from torch import nn
from transformers import BitsAndBytesConfig

from family.published.folders import FAMILIES, published_folder
from family.published.test_loading import image_inputs
from trol.errors import HostError, UsageError
from trol.family import TrolForConditionalGeneration, memory
from trol.family.loading import load_model
from trol.family.memory import check_blocks, quantised, skip_parts
from trol.family.published.layouts import Lazy
from trol.family.published.opening import open_published

bnb = pytest.importorskip("bitsandbytes")
functional = pytest.importorskip("bitsandbytes.functional")

KINDS = {4: "Linear4bit", 8: "Linear8bitLt"}


@pytest.fixture(params=FAMILIES)
def folder(request, tmp_path):
    return published_folder(tmp_path / "it", request.param, dtype=torch.float16)


def opened(folder, bits, **settings):
    settings = {"dtype": torch.float16, "quantization_config": quantised(bits), **settings}
    return open_published(TrolForConditionalGeneration, folder, **settings)


def maps(model):
    """Names of the linear maps, whether quantised or not."""
    return {
        name: type(module).__name__
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    }


@pytest.mark.parametrize("bits", KINDS)
def test_only_the_decoders_own_maps_are_quantised(folder, bits):
    kinds = maps(opened(folder, bits))
    plain = maps(open_published(TrolForConditionalGeneration, folder))
    assert kinds.keys() == plain.keys()
    for name, kind in kinds.items():
        in_layers = name.startswith("model.language_model.layers.")
        skipped = name.endswith(("depth", "image_down", "image_up"))
        assert (kind == KINDS[bits]) == (in_layers and not skipped), name


@pytest.mark.parametrize("bits", KINDS)
def test_a_configuration_of_the_callers_own_spares_them_too(folder, bits):
    own = BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8)
    for given in (own, own.to_dict()):
        model = TrolForConditionalGeneration.from_pretrained(
            folder, quantization_config=given, dtype=torch.float16
        )
        assert maps(model) == maps(opened(folder, bits))
    assert own.llm_int8_skip_modules is None, "the caller's own is left alone"


def test_other_settings_are_left_alone():
    assert skip_parts({"dtype": "auto"}) == {"dtype": "auto"}
    given = {"quantization_config": {"quant_method": "torchao"}}
    assert skip_parts(given) is given
    kept = skip_parts({"quantization_config": BitsAndBytesConfig(llm_int8_skip_modules=["x"])})
    assert kept["quantization_config"].llm_int8_skip_modules[:2] == ["x", "model.vision_tower"]


@pytest.mark.parametrize("bits", KINDS)
def test_it_computes_what_its_rounded_weights_say(folder, bits):
    """As the full model does that is given the quantised weights' values."""
    model = opened(folder, bits)
    full = open_published(TrolForConditionalGeneration, folder, dtype=torch.float32)
    inputs = image_inputs(full)
    with torch.no_grad():
        own = full(**inputs).logits
        for name, module in model.named_modules():
            if type(module).__name__ == KINDS[bits]:
                full.get_submodule(name).weight.copy_(values(module, bits))
        rounded, computed = full(**inputs).logits, model(**inputs).logits.float()
    assert (computed - rounded).abs().max() < 0.1 * rounded.std()
    if bits == 4:  # eight bits round the states as well, by about as much as the weights
        assert (own - rounded).abs().max() > 0.5 * rounded.std()


def values(module, bits):
    if bits == 4:
        return functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
    return module.weight.data.float() * module.weight.SCB[:, None] / 127


@pytest.mark.parametrize("bits", KINDS)
def test_saved_and_opened_again(folder, bits, tmp_path):
    model = opened(folder, bits)
    model.save_pretrained(tmp_path / "saved")
    again = TrolForConditionalGeneration.from_pretrained(tmp_path / "saved")
    assert maps(again) == maps(model)
    inputs = image_inputs(model)
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits, model(**inputs).logits)
    settings = {"max_new_tokens": 3, "do_sample": False}
    assert torch.equal(again.generate(**inputs, **settings), model.generate(**inputs, **settings))


@pytest.mark.parametrize("bits", KINDS)
def test_it_is_read_one_tensor_after_the_other(folder, bits, monkeypatch):
    """Read as float16 for a model of float32: what was read before is gone, converted."""
    held, read = [], []
    before = Lazy.__getitem__

    def watched(self, index):
        tensor = before(self, index).clone()
        read.append(sum(one() is not None for one in held))
        held.append(weakref.ref(tensor))
        return tensor

    monkeypatch.setattr(Lazy, "__getitem__", watched)
    opened(folder, bits, dtype=torch.float32)
    assert len(read) > 60
    assert max(read) <= 2


@pytest.mark.parametrize("bits", KINDS)
def test_a_model_by_its_folder_and_bits(folder, bits, caplog):
    with caplog.at_level(logging.WARNING):
        model, processor = load_model(folder, bits=bits)
    assert KINDS[bits] in maps(model).values()
    assert processor.tokens_per_image == model.config.tokens_per_image
    assert [record for record in caplog.records if "trol" in record.name] == []


def test_widths_that_four_bits_cannot_take():
    says = (
        r"trol-tiny cannot be used in 4 bits: its map 'model\..*' has the shape \[170, 64\].*take 8"
    )
    with pytest.raises(HostError, match=says):
        load_model("trol-tiny", bits=4)
    model, _ = load_model("trol-tiny", bits=8)
    ids = torch.tensor([[1, 5, 6]])
    assert model(input_ids=ids).logits.isfinite().all()


def test_other_maps_have_any_width():
    check_blocks(nn.Sequential(nn.Linear(3, 5)), "it")


def test_eight_bits_compute_in_float16(folder, caplog):
    """In any other type bitsandbytes says at every call that it casts."""
    eight = BitsAndBytesConfig(load_in_8bit=True)
    model = TrolForConditionalGeneration.from_pretrained(folder, quantization_config=eight)
    assert model.dtype == torch.float16
    with caplog.at_level(logging.WARNING), torch.no_grad():
        model(**image_inputs(model))
    assert [record.message for record in caplog.records if "cast" in record.message] == []
    own = {"quantization_config": eight, "dtype": torch.float32}
    assert skip_parts(own)["dtype"] == torch.float32


def test_bitsandbytes_asks_for_no_package(caplog):
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    logger.warning("Failed to load CPU gemm_4bit_forward from kernels-community: %s.", "none")
    logger.warning("something else")
    assert [record.message for record in caplog.records] == ["something else"]


def test_what_cannot_be(monkeypatch):
    with pytest.raises(UsageError, match="bits is 3; give 4 or 8"):
        quantised(3)
    monkeypatch.setattr(memory, "find_spec", lambda name: None)
    with pytest.raises(HostError, match=r"pip install 'trol-vlm\[quant\]'"):
        quantised(4)
